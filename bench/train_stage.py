"""What a user waits for: the whole train stage on 10,000 rows of text-to-SQL, beside Unsloth's whole script.

    TOKENIZER=models/base python -m bench.train_stage OUT.json FOLDER [VARIANT …]

Each variant is a process, timed from its start to its exit; of both, rows and model are made before, once, and lie in
FOLDER. `ours` is the train stage's command in dvc.yaml, on rows that encode has made, with one validation of 100 rows
at its end. `unsloth` is bench/peer_unsloth.py, which tokenizes its rows itself (`tokenize` of its `seconds_of`), as its
users wait for it, and validates nothing. Same rows, one epoch, 48 rows a step, rank 16 on all linear layers; ours
learns the answers, Unsloth every token, of which its rows have one more. Weights are random.

A process begins with no compiled code kept from before; a name that ends in -again keeps what the one before left.

TOKENIZER: a folder with Gemma 3's tokenizer, chat template and generation_config.json, read when FOLDER is made.
MODEL: a Gemma 3 shape of bench/train.py, gemma3-1b unless said. ROWS: 10,000 unless said. UNSLOTH_SITE: a folder of
packages that Unsloth's process finds before all others.
"""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute
import pyarrow.parquet
import ruamel.yaml

from stages.outputs import write_json

ROOT = Path(__file__).parent.parent
VARIANTS = ("ours", "ours-nf4", "unsloth", "unsloth-nf4")
VALIDATION_ROWS = 100
LONGEST_SECONDS = 420
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
YAML = ruamel.yaml.YAML(typ="safe", pure=True)


def write_params(folder: Path, quantize: str | None, **sections: dict) -> None:
    """The repository's parameters with the recipe, and with `sections` in place of its own."""
    params = YAML.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["lora"] |= {"r": 16, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear", "quantize": quantize}
    # shuffled, as Unsloth has them: no step is cheaper because its rows begin alike
    params["train"] |= {"epochs": 1.0, "batch_size": 48, "order": "shuffled", "learning_rate": 1e-4, "validations": 1}
    params["encode"]["max_length"] = 2048
    params["prepare"] |= {"group_by": "query", "validation": 0.03, "test": 0.02}
    params |= sections
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML.dump(params, file)


def stage(folder: Path, module: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-m", f"stages.{module}", *arguments], cwd=folder, env=environment, check=True)


def cut(path: Path, count: int) -> None:
    """Keep a file's first `count` lines."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    path.write_text("".join(lines), encoding="utf-8")


def make_base(folder: Path, tokenizer: Path, shape: str) -> None:
    import torch
    from transformers import Gemma3ForCausalLM

    from bench.train import MODELS

    config = copy.deepcopy(MODELS[shape])
    config.vocab_size = 262144  # the tokenizer's, for shapes that have a smaller one
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma3ForCausalLM(config)
    model.save_pretrained(folder)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def make_rows(folder: Path, rows: int) -> None:
    """data/conversations by the real stage, of which `rows` are kept to train on."""
    from bench.data import TASKS, write_rows

    write_params(folder, None, task=TASKS["text_to_sql"])
    (folder / "data/raw").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "data/raw/rows.jsonl", "text_to_sql", rows + rows // 8 + 200)
    stage(folder, "prepare", "data/raw", "data/conversations", "metrics/data.json")
    cut(folder / "data/conversations/train.jsonl", rows)
    cut(folder / "data/conversations/validation.jsonl", VALIDATION_ROWS)


def make_texts(folder: Path) -> None:
    """The training rows as Unsloth's notebooks have them: the chat template's text without its BOS, which the
    tokenizer writes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "models/base", local_files_only=True)
    with (
        (folder / "data/conversations/train.jsonl").open(encoding="utf-8") as conversations,
        (folder / "data/texts.jsonl").open("w", encoding="utf-8") as texts,
    ):
        for line in conversations:
            text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            texts.write(json.dumps({"text": text.removeprefix("<bos>")}) + "\n")


def make(folder: Path) -> None:
    """What is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "models/base/config.json").exists():
        make_base(folder / "models/base", Path(os.environ["TOKENIZER"]), os.environ.get("MODEL", "gemma3-1b"))
    if not (folder / "data/conversations").exists():
        make_rows(folder, int(os.environ.get("ROWS", "10000")))
    write_params(folder, None)
    if not (folder / "data/tokens").exists():
        stage(folder, "encode", "models/base", "data/conversations", "data/tokens", "metrics/tokens.json")
        make_texts(folder)
    if not (folder / "data/validation").exists():
        stage(folder, "validation", "data/conversations", "data/validation")


def environment_of(variant: str, caches: Path) -> dict[str, str]:
    """Compiled code goes below `caches`."""
    before = [os.environ["UNSLOTH_SITE"]] if variant.startswith("unsloth") and "UNSLOTH_SITE" in os.environ else []
    paths = [*before, str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": ":".join(paths),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
    }


def command_of(variant: str, folder: Path) -> list[str]:
    if variant.startswith("unsloth"):
        parts = ["models/base", "data/texts.jsonl", "models/unsloth", *(["nf4"] if "nf4" in variant else [])]
        return [sys.executable, "-m", "bench.peer_unsloth", *parts]
    write_params(folder, "nf4" if "nf4" in variant else None)
    python, *parts = YAML.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["cmd"].split()
    assert python == "python"
    return [sys.executable, *parts]


def ours(folder: Path) -> dict:
    """What the stage has written of itself."""
    column = pyarrow.parquet.read_table(folder / "data/tokens/train.parquet")["input_ids"]
    timing = json.loads((folder / "metrics/timing.json").read_text())["train"]
    with (folder / "metrics/loss.csv").open() as file:
        last = [point for point in csv.DictReader(file) if point["loss"]][-1]
    with (folder / "metrics/telemetry.csv").open() as file:
        first = next(csv.DictReader(file))
    return {
        "rows": len(column),
        "tokens": pyarrow.compute.sum(pyarrow.compute.list_value_length(column)).as_py(),
        "steps": int(last["step"]),
        "first_step_seconds": float(first["seconds"]),
        "loss": float(last["loss"]),
        "gradient_norm": float(last["gradient_norm"]),
        "tokens_per_second_of_training": timing["tokens_per_second"],
        "peak_gib": timing["peak_gib"],
        "device": timing.get("gpu", timing["device"]),
    }


def unsloth(output: str, began: float) -> dict:
    """What the script has said, the ends of its parts made into their seconds."""
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    parts, end = {}, began
    for name, then in found.pop("ends").items():
        parts[name], end = round(then - end, 1), then
    return found | {"seconds_of": parts}


def measured(folder: Path, name: str) -> dict:
    """One process of a variant, by the clock; `missing` and why, where it ends badly."""
    variant = name.removesuffix("-again")
    caches = folder.resolve() / "caches" / variant
    if name == variant:
        shutil.rmtree(caches, ignore_errors=True)
    for left in (".runs", "models/adapter", "models/unsloth", "metrics/timing.json"):
        path = folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    command, environment = command_of(variant, folder), environment_of(variant, caches)
    log = folder / f"{name}.log"
    began, clock = time.time(), time.monotonic()
    with log.open("wb") as file:
        try:
            given = {"cwd": folder, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, timeout=LONGEST_SECONDS, check=False, **given)
            failed = f"exit status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failed = f"not done after {LONGEST_SECONDS} s"
    seconds = time.monotonic() - clock
    output = log.read_text(encoding="utf-8", errors="replace")
    if failed:
        return {"variant": name, "missing": f"{failed}: {output[-1500:]}"}
    found = unsloth(output, began) if variant.startswith("unsloth") else ours(folder)
    if not found["gradient_norm"] > 0:
        return {"variant": name, "missing": f"the gradient's norm was {found['gradient_norm']}"}
    whole = {"seconds": round(seconds, 1), "tokens_per_second": round(found["tokens"] / seconds)}
    return {"variant": name, "model": os.environ.get("MODEL", "gemma3-1b"), **whole, **found}


def main(out: Path, folder: Path, *names: str) -> None:
    # in a process of its own: what it takes of a GPU is given back
    subprocess.run([sys.executable, "-m", "bench.train_stage", "make", str(folder)], check=True)
    results = []
    for name in names or VARIANTS:
        results.append(measured(folder, name))
        print(json.dumps(results[-1]), flush=True)
        write_json(out, results)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
