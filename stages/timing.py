"""metrics/timing.json: seconds, tokens per second and memory, a stage at a time; metrics/telemetry.csv: how those of
training went. No stage's output: dvc hashes none."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from stages.outputs import write_json

TIMING = Path("metrics/timing.json")
TELEMETRY = Path("metrics/telemetry.csv")  # stages/models/watch.py writes it


def record(stage: str, **figures: Any) -> None:
    """Replace a stage's figures; the others' stay as they are."""
    try:
        timing = json.loads(TIMING.read_text())
    except FileNotFoundError:
        timing = {}
    write_json(TIMING, dict(sorted({**timing, stage: figures}.items())))


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)
