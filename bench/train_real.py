"""The default run's training, real model and real rows, beside TRL and plain transformers, each in its own process.

    python -m bench.train_real FOLDER [VARIANT …]
    python -m bench.train_real curves FOLDER NAME=LOSS.csv …

FOLDER is a repository in which the pipeline has run up to encode, with its params.yaml. The first 50 steps of the
default schedule (TRL: 10 steps of as many rows, of which the first two are not timed); the first variant again at the
end, to show drift. `plain` is what the others must agree with: float32, transformers' eager attention, a row at a time,
torch's AdamW; `plain-nf4` is that on the values that nf4 keeps; beyond BOUND, or with a gradient of zero, the exit
status is 1. Writes, after each variant, `machine` and `rows` of bench/results/train_cpu.json, or on a GPU of
train_real_gpu.json.

curves: the metrics/loss.csv of runs of FOLDER's params.yaml, whatever made them: their first 50 steps beside those of
`plain` with the schedule of the whole run. Writes bench/results/train_curves.json.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import csv
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from trl import SFTConfig, SFTTrainer

from bench.cpu_formats import cpu
from bench.train import Counter, Marks
from stages import train
from stages.models.checkpoints import Run
from stages.models.fused import fuse
from stages.models.compiled import compile_pieces
from stages.models.load import load_model
from stages.models.lora import add_adapters
from stages.models.machine import resolve
from stages.models.quantized import round_weights
from stages.models.schedule import schedule
from stages.models.tokens import read_rows
from stages.outputs import write_json
from stages.params import Params, load

RESULTS = Path(__file__).parent / "results"
STEPS, TRL_STEPS, WARM = 50, 10, 2
# nats a token that a step's loss may differ from that of plain float32, of losses from 3.0 to 0.5
BOUND = {"float32": 0.002, "bfloat16": 0.2}


def ours(
    folder: Path,
    params: Params,
    rows: list[dict],
    dtype: str = "auto",
    order: str | None = None,
    quantize: str | None = None,
) -> dict:
    machine = resolve(params.machine.model_copy(update={"dtype": dtype}))
    base = load_model(folder, machine.device, machine.dtype, quantize=quantize)
    model = add_adapters(base, params.lora, params.train.seed)
    fuse(model)
    if machine.device == "cuda":
        compile_pieces(model.get_base_model())
    steps = math.ceil(len(rows) / params.train.batch_size)
    settings = params.train.model_copy(
        update={"epochs": (STEPS - 0.5) / steps, "order": order or params.train.order, "validations": 1}
    )
    marks = Marks()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        run = Run(Path(scratch) / "checkpoints", 10**6)
        trainer = train.Trainer(model, tokenizer, settings, machine, rows, rows[:1], scratch, run, None)
        trainer.add_callback(marks)
        trainer.train()
    points = [point for point in trainer.history if "loss" in point]
    return {
        "format": str(machine.dtype).removeprefix("torch."),
        **rate(marks, [sum(len(rows[i]["input_ids"]) for i in one["rows"]) for one in trainer.train_dataset]),
        "losses": [point["loss"] for point in points],
        "gradient_norms": [point["gradient_norm"] for point in points],
    }


def plain(folder: Path, params: Params, rows: list[dict], quantize: str | None = None, planned: int = STEPS) -> dict:
    """The first STEPS of so many `planned` ones."""
    device = resolve(params.machine).device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    if quantize:
        round_weights(model, quantize)
    model = add_adapters(model, params.lora, params.train.seed).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, params.train.learning_rate, weight_decay=params.train.weight_decay)
    warm = math.ceil(params.train.warmup_ratio * planned)
    rates = get_scheduler(params.train.schedule, optimizer, warm, planned)
    marks, counted, losses, norms = Marks(), [], [], []
    for step in schedule(rows, params.train.batch_size, 1.0, params.train.seed, params.train.order)[:STEPS]:
        supervised = sum(label != -100 for i in step for label in rows[i]["labels"])
        total = 0.0
        for i in step:
            ids, labels = (torch.tensor(rows[i][name], device=device)[None].long() for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / supervised
            loss.backward()
            total += float(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, params.train.max_grad_norm)))
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(total)
        counted.append(sum(len(rows[i]["input_ids"]) for i in step))
        marks.times.append(time.monotonic())
    return {"format": "float32", **rate(marks, counted), "losses": losses, "gradient_norms": norms}


def trl(folder: Path, params: Params, rows: list[dict], bf16: bool, checkpointing: bool = False) -> dict:
    """TRL's trainer at the same rows a step, rank and learning rate; all else its own defaults, activation
    `checkpointing` among them where that is asked for."""
    marks = Marks()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=params.train.batch_size,
            learning_rate=params.train.learning_rate,
            max_steps=TRL_STEPS,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        made = [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in rows
        ]
        lora = LoraConfig(r=params.lora.r, lora_alpha=params.lora.alpha, target_modules="all-linear")
        dtype = torch.bfloat16 if bf16 else torch.float32
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            args=arguments,
            train_dataset=Dataset.from_list(made),
            processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
            callbacks=[marks, counter := Counter()],
            peft_config=lora,
        )
        counter.trainer = trainer
        trainer.train()
    counted = [after - before for before, after in itertools.pairwise([0, *counter.seen])]
    return {"format": str(dtype).removeprefix("torch."), **rate(marks, counted)}


def rate(marks: Marks, tokens: list[int]) -> dict:
    """Tokens of rows, padding aside, a second, over all steps but the first two."""
    return {
        "tokens_per_second": round(sum(tokens[WARM:]) / (marks.times[-1] - marks.times[WARM - 1]), 1),
        "first_step_seconds": round(marks.times[0] - marks.began, 1),
        "peak_gib": round(train.memory_gib(torch.device("cuda" if torch.cuda.is_available() else "cpu")), 2),
    }


VARIANTS = {
    "ours": ours,
    "ours-float32": lambda *given: ours(*given, dtype="float32"),
    "ours-bfloat16": lambda *given: ours(*given, dtype="bfloat16"),
    "ours-nf4": lambda *given: ours(*given, quantize="nf4"),
    "ours-shuffled": lambda *given: ours(*given, order="shuffled"),
    "trl": lambda *given: trl(*given, bf16=True),
    "trl-defaults": lambda *given: trl(*given, bf16=True, checkpointing=True),
    "trl-float32": lambda *given: trl(*given, bf16=False),
    "plain": plain,
    "plain-nf4": lambda *given: plain(*given, quantize="nf4"),
}


def main(arguments: list[str]) -> None:
    if arguments[0] == "one":
        source = Path(arguments[1])
        rows = read_rows(source / "data/tokens/train.parquet")
        found = VARIANTS[arguments[2]](source / "models/base", load(source / "params.yaml"), rows)
        print("RESULT " + json.dumps(found))
        return
    if arguments[0] == "curves":
        compare_curves(Path(arguments[1]), dict(argument.split("=", 1) for argument in arguments[2:]))
        return
    names = arguments[1:] or list(VARIANTS)
    found = []
    for name in [*names, names[0]]:
        done = subprocess.run(
            [sys.executable, "-m", "bench.train_real", "one", arguments[0], name], stdout=subprocess.PIPE, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[0][7:]) if lines else {"missing": f"exit status {done.returncode}"}
        found.append({"variant": name, "model": "Gemma 3 270M", **result})
        print({key: value for key, value in found[-1].items() if not isinstance(value, list)}, file=sys.stderr)
        check(keep(found))


def check(rows: list[dict]) -> None:
    """End with exit status 1 where a loss is not within BOUND, or a gradient was zero."""
    for row in rows:
        bound, largest = BOUND.get(row.get("format")), row.get("loss_difference", {"max": 0.0})["max"]
        if not row.get("smallest_gradient_norm", 1.0) > 0 or (bound is not None and not largest <= bound):
            sys.exit(f"{row['variant']}: gradient norm {row['smallest_gradient_norm']}, {largest} from plain float32")


def compare_curves(folder: Path, files: dict[str, str]) -> None:
    rows, params = read_rows(folder / "data/tokens/train.parquet"), load(folder / "params.yaml")
    curves = {}
    for name, file in files.items():
        with Path(file).open(encoding="utf-8", newline="") as opened:
            curves[name] = [point for point in csv.DictReader(opened) if point["loss"]]
    lengths = {len(points) for points in curves.values()}
    assert len(lengths) == 1, f"runs of {sorted(lengths)} steps are not of one schedule"
    (planned,) = lengths
    right = plain(folder / "models/base", params, rows, params.lora.quantize, planned)
    found = {}
    for name, points in {name: points[:STEPS] for name, points in curves.items()}.items():
        norms = [float(point["gradient_norm"]) for point in points]
        found[name] = {
            "loss_difference": apart([float(point["loss"]) for point in points], right["losses"]),
            "gradient_norm_difference": apart(norms, right["gradient_norms"]),
            "smallest_gradient_norm": min(norms),
        }
    beside = {"losses": right["losses"], "gradient_norms": right["gradient_norms"]}
    beside["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    write_json(RESULTS / "train_curves.json", {"steps": STEPS, "planned": planned, "runs": found, "plain": beside})
    print(json.dumps(found, indent=2), file=sys.stderr)
    check([{"variant": name, "format": "bfloat16", **one} for name, one in found.items()])


def apart(found: list[float], right: list[float]) -> dict[str, float]:
    differences = [abs(a - b) for a, b in zip(found, right, strict=True)]
    return {"mean": round(sum(differences) / len(differences), 6), "max": round(max(differences), 6)}


def keep(found: list[dict]) -> list[dict]:
    """Write what has been measured so far, each one's losses beside those that they must agree with; the rows."""
    right = {one["variant"]: one["losses"] for one in found if one["variant"].startswith("plain") and "losses" in one}
    rows = []
    for one in found:
        row = {key: value for key, value in one.items() if key not in ("losses", "gradient_norms")}
        beside = right.get("plain-nf4" if one["variant"].endswith("nf4") else "plain")
        if "losses" in one:
            row["smallest_gradient_norm"] = min(one["gradient_norms"])
            row["last_loss"] = round(one["losses"][-1], 5)
            if beside and one["variant"] != "ours-shuffled":  # other rows a step
                row["loss_difference"] = apart(one["losses"], beside)
        rows.append(row)
    machine = {"cpu": cpu(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    file = RESULTS / ("train_real_gpu.json" if torch.cuda.is_available() else "train_cpu.json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, {**known, "machine": machine, "rows": rows})
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
