"""How many tokens a second several GPUs train beside one, each step the same rows; and what a base that they share
takes of each.

    python -m bench.gpus gemma3-4b 2 48 96      the shape with random weights, two devices, steps of 48 and of 96 rows
    python -m bench.gpus shard gemma3-27b 2 16  an nf4 base whose layers two devices share, steps of 16 rows

Adds training, and of the first number of rows speedup_2, to bench/results/gpus.json; the second adds sharded and, of
the 27B shape, fsdp_27b_gib_per_gpu, what each card has lost to its process at the end. On a CPU (`tiny 2 16`) they
only print.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.train import folder_of, ours
from stages.models.ranks import Ranks, launch
from stages.outputs import write_json

RESULTS = Path("bench/results/gpus.json")


def measure(model: str, rows_a_step: int, out: str, ranks: Ranks) -> None:
    found = ours(model, rows_a_step=rows_a_step, ranks=ranks)
    found["peak_gib"] = ranks.of_all(found.get("peak_gib"))
    if ranks.first:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def measure_shared(model: str, rows_a_step: int, out: str, ranks: Ranks) -> None:
    found = ours(model, "nf4", rows_a_step=rows_a_step, ranks=ranks, shard_base=True)
    held = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = round((total - free) / 2**30, 2)
    found |= {"peak_gib": ranks.of_all(found.get("peak_gib")), "held_gib": ranks.of_all(held)}
    if ranks.first:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def shard(model: str, count: int, rows_a_step: int) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    names = tuple(f"cuda:{n}" for n in range(count)) if kind == "cuda" else ("cpu",) * count
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        launch(measure_shared, (model, rows_a_step, out.name), names)
        found = json.loads(Path(out.name).read_text(encoding="utf-8"))
    row = {"model": model, "quantize": "nf4", "devices": count, "rows_a_step": rows_a_step, **found}
    print(json.dumps(row))
    if kind == "cuda":
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        per_gpu = {"fsdp_27b_gib_per_gpu": found["held_gib"]} if model == "gemma3-27b" else {}
        write_json(RESULTS, {**known, **per_gpu, "sharded": row})


def main(arguments: list[str]) -> None:
    if arguments[0] == "shard":
        shard(arguments[1], int(arguments[2]), int(arguments[3]))
        return
    model, count, *rows = arguments[0], *map(int, arguments[1:])
    folder_of(model)  # made once, before several look for it
    torch.cuda.empty_cache()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    training = []
    for rows_a_step in rows:
        rates = {}
        # one again at the end, to show drift
        for devices in (1, count, 1):
            names = tuple(f"cuda:{n}" for n in range(devices)) if kind == "cuda" else ("cpu",) * devices
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                launch(measure, (model, rows_a_step, out.name), names)
                found = json.loads(Path(out.name).read_text(encoding="utf-8"))
            training.append({"model": model, "devices": devices, "rows_a_step": rows_a_step, **found})
            print(json.dumps(training[-1]), file=sys.stderr, flush=True)
            rates.setdefault(devices, []).append(found["tokens_per_second"])
        speedup = round(rates[count][0] * 2 / sum(rates[1]), 3)
        training[-2]["speedup"] = speedup
        print(f"{rows_a_step} rows a step: {count} devices are {speedup} times as fast as one")
    if kind == "cuda":
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        first = next(one["speedup"] for one in training if "speedup" in one)
        write_json(RESULTS, {**known, f"speedup_{count}": first, "training": training})


if __name__ == "__main__":
    main(sys.argv[1:])
