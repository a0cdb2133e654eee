"""A run from beginning to end, and every stage but the downloads again: what it took, what came out the same.

    python -m bench.default_run OUT.json        in the top folder of a clone, with its params.yaml

On a GPU set machine.deterministic to true, without which training does not give the same bytes twice. Writes
`repro_seconds`, of `dvc repro`; `seconds`, metrics/timing.json; the metrics; and by name the stages that, forced, gave
dvc.lock the same outputs (`identical`) or others (`different`).
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from ruamel.yaml import YAML

from bench.cpu_formats import cpu
from stages.outputs import write_json
from stages.params import load

METRICS = ("train", "merge", "base", "few_shot", "tuned")
# in the order of the pipeline; what is downloaded is checked by its sums
STAGES = (
    *("prepare", "encode", "validation", "train", "merge", "evaluate@base", "evaluate@few_shot", "evaluate@tuned"),
    "report",
)


def outputs() -> dict[str, dict[str, str]]:
    """Of each stage in dvc.lock, the md5 of each output."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.lock"))["stages"]
    return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}


def repro(*arguments: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "dvc", "repro", *arguments], check=True)
    return round(time.monotonic() - began, 1)


def main(out: Path) -> None:
    seconds = repro()
    first = outputs()
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "torch": torch.__version__.partition("+")[0],
        "machine.deterministic": load().machine.deterministic,
        "repro_seconds": seconds,
        "seconds": json.loads(Path("metrics/timing.json").read_text()),
        **{name: json.loads(Path(f"metrics/{name}.json").read_text()) for name in METRICS},
        "identical": [],
        "different": [],
    }
    write_json(out, found)
    for stage in STAGES:
        repro("--force", "--single-item", stage)
        found["identical" if outputs()[stage] == first[stage] else "different"].append(stage)
        write_json(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
