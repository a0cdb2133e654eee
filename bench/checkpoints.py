"""What a checkpoint of params.yaml's training costs: its size, the seconds to write one, to read it back, to find it.

    python -m bench.checkpoints models/base data/tokens

Adds `checkpoint` to bench/results/reliability.json.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stages.models.checkpoints import AT_LEAST_SECONDS, Checkpoint, Run
from stages.models.load import load_model
from stages.models.lora import add_adapters
from stages.models.machine import resolve
from stages.models.state import generators, moments, trained
from stages.outputs import write_json
from stages.params import load
from stages.train import decisive

RESULTS = Path("bench/results/reliability.json")


def seconds(work: Callable[[], object]) -> float:
    """The median of five."""
    taken = []
    for _ in range(5):
        began = time.monotonic()
        work()
        taken.append(time.monotonic() - began)
    return round(statistics.median(taken), 3)


def main(arguments: list[str]) -> None:
    base, tokens = map(Path, arguments)
    params = load()
    machine = resolve(params.machine)
    model = add_adapters(load_model(base, machine.device, machine.dtype), params.lora, params.train.seed)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for adapter in adapters:
        adapter.data, adapter.grad = adapter.data.float(), torch.zeros_like(adapter, dtype=torch.float32)
    optimizer = torch.optim.AdamW(adapters)
    optimizer.step()
    device = torch.device(machine.device)
    tensors = {**trained(model), **moments(optimizer), **generators(device)}
    points = [{"step": n, "loss": 0.123456789, "learning_rate": 1e-3, "gradient_norm": 1.23456} for n in range(1000)]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Run(Path(folder) / "run", "auto")
        steps = iter(range(1, 10))
        found = {
            "model": base.name,
            "device": machine.device,
            "adapter_parameters": sum(adapter.numel() for adapter in adapters),
            "write_seconds": seconds(lambda: run.save(Checkpoint(next(steps), tensors, {"history": points}))),
            "read_seconds": seconds(run.latest),
            "mb": round(sum(file.stat().st_size for file in next(run.folder.iterdir()).iterdir()) / 1e6, 1),
            "interval_seconds": AT_LEAST_SECONDS,
        }
    files = [tokens / "train.parquet", tokens / "validation.parquet"]
    found["fingerprint_seconds"] = seconds(lambda: decisive(params, machine, base, files))
    found["share_of_time"] = round(found["write_seconds"] / AT_LEAST_SECONDS, 5)
    print(json.dumps(found, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, "checkpoint": found})


if __name__ == "__main__":
    main(sys.argv[1:])
