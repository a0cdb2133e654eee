"""Does training hold more memory at its 2,000th step than at its 100th? Loader, packs, trainer and checkpoints, long.

    python -m bench.soak [MODEL [GIB]]      a shape of bench/train.py with random weights; GIB: take no more of the GPU

Rows are those of bench/train.py, their lengths lognormal and shuffled anew in each epoch, so that hardly two packs are
of one size. On a GPU, MODEL is gemma3-270m unless named, packs are as large as stages/models/memory.py says the card
takes, and a step has rows enough to fill one; on a CPU `tiniest`, with four rows a step, a quarter as long. Checkpoints
are written as in any training.

Adds to `soak` in bench/results/reliability.json: `resident_gib`, what the process held after each of the steps that
STEPS names, and on a GPU `allocated_gib` and `reserved_gib`, what PyTorch's tensors and its allocator held there;
`growth_gib`, the last of the card's figures (on a CPU: of the process's) less the first.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

from bench import train as bench
from bench.checkpoints import RESULTS
from bench.cpu_formats import cpu
from stages import train
from stages.models.checkpoints import Run
from stages.models.fused import fuse
from stages.models.compiled import compile_pieces
from stages.models.load import load_model
from stages.models.lora import add_adapters
from stages.models.machine import resolve
from stages.models.watch import resident_gib
from stages.outputs import write_json
from stages.params import load
from stages.models import memory

STEPS = (100, 500, 1000, 2000)
STEPS_AN_EPOCH = 100
CPU_TOKENS = 256  # of a pack
CPU_ROWS = 4  # a step
LONGEST = 2048  # tokens a row, of bench.train.rows
ROOM = 0.9  # of the card: stages/models/memory.py errs by a few hundredths (memory_estimate_error)


class Levels(TrainerCallback):
    """What is held after each of STEPS."""

    def __init__(self):
        self.held: dict[str, dict[int, float]] = {}

    def on_step_end(self, args, state, control, **_):
        if state.global_step not in STEPS:
            return
        now = {"resident_gib": resident_gib()}
        if args.device.type == "cuda":
            now["allocated_gib"] = torch.cuda.memory_allocated() / memory.GIB
            now["reserved_gib"] = torch.cuda.memory_reserved() / memory.GIB
        for name, value in now.items():
            self.held.setdefault(name, {})[state.global_step] = round(value, 3)
        print(f"step {state.global_step}: {now}", file=sys.stderr, flush=True)


def most_tokens(folder: Path, lora, device: str, room: float) -> int:
    """Of a pack: on a GPU, the most that stages/models/memory.py gives `room` bytes of the card."""
    if device == "cpu":
        return CPU_TOKENS
    shape = memory.shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return memory.most_tokens(shape, lora, device, "bfloat16", LONGEST, True, False, ROOM * room)


def quarter(row: dict) -> dict:
    """A row of a quarter of its tokens, half of them supervised."""
    kept = len(row["input_ids"]) // 4
    start = row["prompt_tokens"] - kept // 2
    tokens = {key: row[key][start : start + kept] for key in ("input_ids", "labels")}
    return {**tokens, "id": row["id"], "prompt_tokens": kept // 2}


def soaked(model: str, gib: float = math.inf) -> dict:
    folder, params = bench.folder_of(model), load()
    device, room = "cuda" if torch.cuda.is_available() else "cpu", 0.0
    if device == "cuda":
        torch.cuda.empty_cache()  # of the random weights, where they were made just now
        free, whole = torch.cuda.mem_get_info()
        room = min(free, gib * memory.GIB)
        torch.cuda.set_per_process_memory_fraction(room / whole)
    else:
        torch.set_num_threads(1)  # on weights this small, more only wait for one another
    tokens = most_tokens(folder, params.lora, device, room)
    if tokens is None:
        sys.exit(f"{gib:g} GiB: by the estimate not one row of {LONGEST} tokens of {model} fits; take more")
    there = {"device": device, "devices": 1, "dtype": "bfloat16", "tokens_per_pack": tokens}
    machine = resolve(params.machine.model_copy(update=there))
    adapted = add_adapters(load_model(folder, device, machine.dtype), params.lora, 0)
    fuse(adapted)
    if device == "cuda":
        compile_pieces(adapted.get_base_model())
    sample = bench.rows(1000, 4096)
    mean = sum(len(row["input_ids"]) for row in sample) / len(sample)
    rows_a_step = int(tokens / mean) if device == "cuda" else CPU_ROWS
    made = bench.rows(rows_a_step * STEPS_AN_EPOCH, bench.MODELS[model].vocab_size)
    if device == "cpu":
        made = [quarter(row) for row in made]
    epochs = STEPS[-1] / STEPS_AN_EPOCH
    settings = params.train.model_copy(update={"epochs": epochs, "batch_size": rows_a_step, "order": "shuffled"})
    levels = Levels()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch) / "checkpoints", "auto")
        trainer = train.Trainer(adapted, bench.tokenizer(), settings, machine, made, made[:20], scratch, run, None)
        trainer.add_callback(levels)
        with trainer.watch.shown(lambda values, step: None):
            trainer.train()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu()}, {os.cpu_count()} cores"
    first, *_, last = levels.held["reserved_gib" if device == "cuda" else "resident_gib"].values()
    return {
        "model": model,
        "device": name,
        **({"room_gib": round(room / memory.GIB, 1)} if room else {}),
        "tokens_per_pack": tokens,
        "rows_a_step": rows_a_step,
        "tokens_per_second": round(trainer.watch.tokens_per_second),
        **levels.held,
        "growth_gib": round(last - first, 3),
    }


def main(arguments: list[str]) -> None:
    model = arguments[0] if arguments else "gemma3-270m" if torch.cuda.is_available() else "tiniest"
    found = soaked(model, *map(float, arguments[1:2]))
    print(json.dumps(found, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    same = ("model", "device", "room_gib")
    others = [one for one in known.get("soak", []) if any(one.get(key) != found.get(key) for key in same)]
    write_json(RESULTS, {**known, "soak": [*others, found]})


if __name__ == "__main__":
    main(sys.argv[1:])
