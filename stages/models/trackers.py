"""machine.report_to in; TensorBoard, Weights & Biases or MLflow told of every step out, by accelerate's trackers.

What they write on this machine lies in $DVC_ROOT/logs, which neither git nor dvc looks at; DVC_ROOT names the main
repository in temporary experiments too. Each process is a run of its own, one that goes on after a kill too.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from stages.refusal import Refusal

PROJECT = "lorepro"  # what Weights & Biases and MLflow group runs under
MOST_UNTOLD = 100  # steps that a tracker may be behind
END_SECONDS = 60.0  # that a tracker has for what it has not been told yet, when the training is done
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
    with contextlib.ExitStack() as begun:
        listeners = []
        for name in names:
            try:
                logs.mkdir(exist_ok=True)
            except OSError as error:
                raise Refusal(f"{logs}: machine.report_to writes there: {error.strerror}; make room for it") from None
            listeners.append(Listener(name, _tracker(name, run, logs), parameters))
            begun.callback(listeners[-1].end)

        def tell(values: dict[str, float], step: int) -> None:
            for listener in listeners:
                listener.tell(values, step)

        yield tell


class Listener:
    """A tracker in a thread of its own: training neither waits for its server nor ends with it."""

    def __init__(self, name: str, tracker: Any, parameters: dict[str, Any]):
        """`tracker`: one of accelerate's. Raises Refusal where it cannot begin."""
        self.name, self.tracker = name, tracker
        self.thread = ThreadPoolExecutor(1)  # one, as MLflow's run is the thread's that began it
        self.untold: deque[tuple[int, Future]] = deque()
        self.step, self.lost = 0, False
        errors: tuple = (OSError, ImportError)  # mlflow-skinny without sqlalchemy
        if name in ERRORS:
            module, error = ERRORS[name]
            errors += (getattr(importlib.import_module(module), error),)
        try:
            self.thread.submit(tracker.start).result()
            self.thread.submit(tracker.store_init_configuration, parameters).result()
        except errors as error:
            raise Refusal(
                f"params.yaml: machine.report_to: {name} cannot begin: {error}; mend it, or take it out"
            ) from None

    def tell(self, values: dict[str, float], step: int) -> None:
        """Have it told in its turn; where it is too slow for the steps, not of all of them, but of every validation."""
        self._look()
        self.step = step
        if not self.lost and (len(self.untold) < MOST_UNTOLD or "validation_loss" in values):
            self.untold.append((step, self.thread.submit(self.tracker.log, values, step=step)))

    def end(self) -> None:
        """End the tracker's run; leave it, should it take over END_SECONDS."""
        if self.lost:
            return
        self.untold.append((self.step, self.thread.submit(self.tracker.finish)))
        wait([asked for _, asked in self.untold], END_SECONDS, FIRST_EXCEPTION)
        self._look()
        if self.untold and not self.lost:
            self._leave(self.untold[0][0], f"it took over {END_SECONDS:.0f} s")
        self.thread.shutdown(wait=False)

    def _look(self) -> None:
        while not self.lost and self.untold and self.untold[0][1].done():
            step, asked = self.untold.popleft()
            if asked.exception():
                self._leave(step, str(asked.exception()))

    def _leave(self, step: int, why: str) -> None:
        self.lost = True
        self.thread.shutdown(wait=False, cancel_futures=True)
        why = " ".join(why.split())[:200]
        print(f"{self.name} is told nothing from step {step:,} on: {why}; training goes on", file=sys.stderr)


def _tracker(name: str, run: str, logs: Path) -> Any:
    # here, as tools/doctor.py asks refuse_missing without torch
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        return TensorBoardTracker(run, logs / "tensorboard")
    if name == "wandb":
        # figures and parameters are what was asked for: not the repository, nor what stands in the terminal
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        os.environ.setdefault("WANDB_DISABLE_CODE", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "30")  # seconds; else it waits for ever for a server that is gone
        return WandBTracker(PROJECT, name=run, dir=logs)
    import mlflow

    # else it asks a server that is gone 8 times, over 4 minutes, and where that hangs for up to 2 minutes each
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{logs}/mlflow.db")
    return MLflowTracker(PROJECT, run_name=run)
