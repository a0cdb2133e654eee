"""machine.report_to in; TensorBoard, Weights & Biases or MLflow told of every step out, by accelerate's trackers.

What they write on this machine lies in $DVC_ROOT/logs, which neither git nor dvc looks at; DVC_ROOT names the main
repository in temporary experiments too.

They are told how training ends: MLflow that it finished, failed or was killed, Weights & Biases whether it failed.
SIGKILL leaves no time for that: MLflow shows such a run as running, Weights & Biases as crashed. Each process is a run
of its own, one that goes on after a kill too, and tells from which step.
"""

import contextlib
import importlib
import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.refusal import Refusal

PROJECT = "lorepro"  # what Weights & Biases and MLflow group runs under
MOST_UNTOLD = 100  # steps that a tracker may be behind
BEGIN_SECONDS = 120.0  # that a tracker has to begin; the longest that one itself waits for its server are W&B's 90
END_SECONDS = 60.0  # that all have together for what they have not been told yet, when the training is done
KILLED_SECONDS = 3.0  # where it was told to end, and is killed if it does not (ranks.END_SECONDS, refusal.LAST_SECONDS)
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # as MLflow calls it
# Those that were run beside what requirements.txt pins; mlflow whole would have pip put other versions in their place.
INSTALL = {
    "tensorboard": "tensorboard==2.21.0",
    "wandb": "wandb==0.31.0",
    "mlflow": "mlflow-skinny==3.17.2 sqlalchemy alembic",
}
Tell = Callable[[dict[str, float], int], None]  # figures by name, and the step that they are of
ERRORS = {"wandb": ("wandb.errors", "Error"), "mlflow": ("mlflow.exceptions", "MlflowException")}


def refuse_missing(names: list[str]) -> None:
    """Raise Refusal where one of `names` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Refusal(
                f"params.yaml: machine.report_to names {name}, which is not installed; take it out, or: pip install "
                f"{INSTALL[name]}"
            )


@contextlib.contextmanager
def started(names: list[str], parameters: dict[str, Any]) -> Iterator[Tell]:
    """Begin a run with its parameters in each of `names`; yield what tells all of them of a step.

    Raises Refusal where one cannot begin: no account, no server. One that fails later is told nothing more.
    """
    logs = Path(os.environ.get("DVC_ROOT", ".")).resolve() / "logs"
    run = f"{os.environ.get('DVC_EXP_NAME', 'train')}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    listeners: list[Listener] = []

    def tell(values: dict[str, float], step: int) -> None:
        for listener in listeners:
            listener.tell(values, step)

    try:
        for name in names:
            try:
                logs.mkdir(exist_ok=True)
            except OSError as error:
                raise Refusal(f"{logs}: machine.report_to writes there: {error.strerror}; make room for it") from None
            listeners.append(Listener(name, *_tracker(name, run, logs), parameters))
        yield tell
    except BaseException as error:
        _end(listeners, FAILED if isinstance(error, Exception) else KILLED)
        raise
    _end(listeners, FINISHED)


class Listener:
    """A tracker in a thread of its own: training neither waits for its server nor ends with it. Python, when it ends,
    does not wait for a daemon thread."""

    def __init__(self, name: str, tracker: Any, finish: Callable[[str], object], parameters: dict[str, Any]):
        """`tracker`: one of accelerate's; `finish` ends its run with a status. Raises Refusal where it cannot begin."""
        self.name, self.tracker, self.finish = name, tracker, finish
        self.untold: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self.begun = threading.Event()
        self.step, self.status, self.lost = 0, "", False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._listen, args=(parameters,), daemon=True)
        self.thread.start()
        if not self.begun.wait(BEGIN_SECONDS):
            raise Refusal(
                f"params.yaml: machine.report_to: {name} has not begun after {BEGIN_SECONDS:.0f} s; see to its server, "
                "or take it out"
            )
        errors: tuple = (OSError, ImportError)  # mlflow-skinny without sqlalchemy
        if name in ERRORS:
            module, error = ERRORS[name]
            errors += (getattr(importlib.import_module(module), error),)
        if isinstance(self.error, errors):
            raise Refusal(f"params.yaml: machine.report_to: {name} cannot begin: {self.error}; mend it, or take it out")
        if self.error:
            raise self.error

    def _listen(self, parameters: dict[str, Any]) -> None:
        """All that the tracker does, from its beginning to its end, in one thread, as MLflow's run is the thread's."""
        try:
            self.tracker.start()
            self.tracker.store_init_configuration(parameters)
            self.begun.set()
            while told := self.untold.get():
                self.step, values = told
                if self.status != KILLED:
                    self.tracker.log(values, step=self.step)
            self.finish(self.status)
        except Exception as error:  # noqa: BLE001 - whatever a client raises: it is said, and training goes on
            self.error = error
        finally:
            self.begun.set()

    def tell(self, values: dict[str, float], step: int) -> None:
        """Have it told in its turn; where it is too slow for the steps, not of all of them, but of every validation."""
        if self.error:
            self._leave(str(self.error))
        if not self.lost and (self.untold.qsize() < MOST_UNTOLD or "validation_loss" in values):
            self.untold.put((step, values))

    def end(self, status: str) -> None:
        """Have it end its run when it has been told all."""
        self.status = status
        self.untold.put(None)

    def wait(self, seconds: float, of: float) -> None:
        """Leave it where it has not ended in so many seconds, the rest `of` those that there were."""
        self.thread.join(seconds)
        if self.error or self.thread.is_alive():
            self._leave(str(self.error or f"it took over {of:.0f} s"))

    def _leave(self, why: str) -> None:
        if self.lost:
            return
        self.lost = True
        why = " ".join(why.split())[:200]
        then = "it may show the run as running" if self.status else "training goes on"
        print(f"{self.name} is told nothing from step {self.step:,} on: {why}; {then}", file=sys.stderr)


def _end(listeners: list[Listener], status: str) -> None:
    """End all of them at once, however many do not answer."""
    seconds = KILLED_SECONDS if status == KILLED else END_SECONDS
    until = time.monotonic() + seconds
    for listener in listeners:
        listener.end(status)
    for listener in listeners:
        listener.wait(max(0.0, until - time.monotonic()), seconds)


def _tracker(name: str, run: str, logs: Path) -> tuple[Any, Callable[[str], object]]:
    """accelerate's tracker, and what ends its run with a status, which accelerate's own `finish` does not take."""
    # here, as tools/doctor.py asks refuse_missing without torch
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        board = TensorBoardTracker(run, logs / "tensorboard")
        return board, lambda status: board.finish()  # it has no status
    if name == "wandb":
        # figures and parameters are what was asked for: not the repository, nor what stands in the terminal
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        os.environ.setdefault("WANDB_DISABLE_CODE", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "30")  # seconds; else it waits for ever for a server that is gone
        weights_and_biases = WandBTracker(PROJECT, name=run, dir=logs)
        return weights_and_biases, lambda status: weights_and_biases.run.finish(exit_code=int(status != FINISHED))
    # else it tells its makers how it is used, and as Python ends waits for their server
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    # else it asks a server that is gone 8 times, over 4 minutes, and where that hangs for up to 2 minutes each
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{logs}/mlflow.db")
    return MLflowTracker(PROJECT, run_name=run), mlflow.end_run
