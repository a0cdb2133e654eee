"""How much faster several GPUs answer than one, loading included, and whether the answers are the same.

    python -m bench.devices gemma3-1b       random weights of that shape, 768 prompts

Adds generation_devices to bench/results/evaluation.json.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.generation import RESULTS, random_model
from stages.evaluate import answer_on_all
from stages.models.machine import resolve
from stages.outputs import write_json
from stages.params import load

PROMPTS = 768


def main(arguments: list[str]) -> None:
    params = load()
    machine = resolve(params.machine)
    chance = random.Random(0)
    prompts = [[2, *(chance.randrange(1000, 200_000) for _ in range(chance.randint(60, 300)))] for _ in range(PROMPTS)]
    seconds, answers = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        random_model(arguments[0], Path(scratch))
        for count in sorted({1, len(machine.devices)}):
            began = time.monotonic()
            some = replace(machine, devices=machine.devices[:count])
            answers[count] = answer_on_all(Path(scratch), params, some, prompts, lambda rows: None)
            seconds[count] = round(time.monotonic() - began, 1)
    one, all_ = answers[1], answers[len(machine.devices)]
    same = sum(a == b for a, b in zip(one, all_, strict=True))
    found = {"device": torch.cuda.get_device_name(), "rows": PROMPTS, "seconds": seconds, "same_answers": same}
    print(json.dumps(found))
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_json(RESULTS, {**known, "generation_devices": found})


if __name__ == "__main__":
    main(sys.argv[1:])
