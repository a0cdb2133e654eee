"""machine.report_to in; TensorBoard, Weights & Biases or MLflow told of every step out, by accelerate's trackers.

What they write on this machine lies in $DVC_ROOT/logs, which neither git nor dvc looks at; DVC_ROOT names the main
repository in temporary experiments too. Each process is a run of its own, one that goes on after a kill too.
"""

import contextlib
import importlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from stages.models.watch import Tell
from stages.refusal import Refusal

PROJECT = "lorepro"  # what Weights & Biases and MLflow group runs under
# Those that were run beside what requirements.txt pins; mlflow whole would have pip put other versions in their place.
INSTALL = {
    "tensorboard": "tensorboard==2.21.0",
    "wandb": "wandb==0.31.0",
    "mlflow": "mlflow-skinny==3.17.2 sqlalchemy alembic",
}
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

    Raises Refusal where one cannot begin: no account, no server.
    """
    logs = Path(os.environ.get("DVC_ROOT", ".")).resolve() / "logs"
    run = f"{os.environ.get('DVC_EXP_NAME', 'train')}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    trackers = [_begun(name, run, logs, parameters) for name in names]

    def tell(values: dict[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield tell
    finally:
        for tracker in trackers:
            tracker.finish()


def _begun(name: str, run: str, logs: Path, parameters: dict[str, Any]) -> GeneralTracker:
    logs.mkdir(exist_ok=True)
    errors: tuple = (OSError,)
    if name in ERRORS:
        module, error = ERRORS[name]
        errors += (getattr(importlib.import_module(module), error),)
    try:
        tracker = _tracker(name, run, logs)
        tracker.start()
        tracker.store_init_configuration(parameters)
    except errors as error:
        raise Refusal(
            f"params.yaml: machine.report_to: {name} cannot begin: {error}; mend it, or take it out"
        ) from None
    return tracker


def _tracker(name: str, run: str, logs: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker(run, logs / "tensorboard")
    if name == "wandb":
        # figures and parameters are what was asked for: not the repository, nor what stands in the terminal
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        os.environ.setdefault("WANDB_DISABLE_CODE", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        return WandBTracker(PROJECT, name=run, dir=logs)
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{logs}/mlflow.db")
    mlflow.config.enable_async_logging()  # or each step would wait for the server
    return MLflowTracker(PROJECT, run_name=run)
