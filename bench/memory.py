"""What training takes beside what stages.models.memory says it will, each size in its own process, on random weights.

    python -m bench.memory                  GPU_CASES where there is a GPU, under five minutes; else CPU_CASES
    python -m bench.memory estimate         the estimates anew beside the figures that are there, nothing run
    python -m bench.memory one MODEL FORMAT TOKENS [nf4]

Packs are full: rows of a quarter of TOKENS each, none alike, the loss on the last quarter of each. Writes to
bench/results/gpus.json, after each size, `memory`, and the largest difference, as a share of what was read,
`memory_estimate_error`, of `peak_gib` and of `held_gib` alike. Beside them stand the runs of
bench/results/train_h200.json, with the packs that their rows made. On a GPU `peak_gib` is what PyTorch held at most,
and `held_gib` what the card had lost to the process by the end, with what the allocator keeps and CUDA's own: compared
with `needed_gib`, it is what the doctor asks for.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import train as bench
from stages import train
from stages.models.checkpoints import Run
from stages.models.compiled import compile_pieces
from stages.models.load import load_model
from stages.models.fused import fuse
from stages.models.lora import add_adapters
from stages.models.machine import resolve
from stages.models.packs import pack
from stages.outputs import write_json
from stages.params import Params, load
from stages.models import memory

RESULTS = Path(__file__).parent / "results/gpus.json"
H200 = Path(__file__).parent / "results/train_h200.json"
# Of H200. Those before kept act(gate)·up (fused._GatedLora), in packs of 16,384 tokens at most; of 9B and int8 nothing
# was read since.
FIRST_RUN = 8
STEPS = 2  # most is held from the second on, when the optimizer has its moments
LONGEST_SECONDS = 150  # on a GPU
CPU_CASES = [
    ("llama-135m", "float32", 1024),
    ("gemma3-270m", "float32", 512),
    ("gemma3-270m", "float32", 1024),
    ("gemma3-1b", "float32", 512),
]
GPU_CASES = [
    ("gemma3-270m", "bfloat16", 8192),
    ("gemma3-270m", "bfloat16", 16384),
    ("gemma3-1b", "bfloat16", 8192),
    ("gemma3-1b", "bfloat16", 16384),
    ("gemma3-4b", "bfloat16", 8192),
    ("gemma3-4b", "bfloat16", 8192, "nf4"),
    ("gemma3-4b", "bfloat16", 16384),
]
# SmolLM2 135M's
LLAMA = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def folder_of(name: str) -> Path:
    if name != "llama-135m":
        return bench.folder_of(name)
    folder = bench.SCRATCH / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LLAMA).to(torch.bfloat16).save_pretrained(folder)
    return folder


def rows(count: int, length: int, vocabulary: int) -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(1000, vocabulary, (length,), generator=draw).tolist()
        prompt = length - length // 4
        made.append({"id": str(number), "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def one(name: str, dtype: str, tokens: int, quantize: str | None = None) -> dict:
    """Train for STEPS steps of one full pack each."""
    folder, params = folder_of(name), settings(tokens)
    machine = resolve(params.machine.model_copy(update={"dtype": dtype, "tokens_per_pack": tokens, "devices": 1}))
    cuda = machine.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()  # of the random weights, where they were made just now
        torch.cuda.reset_peak_memory_stats()
    lora = params.lora.model_copy(update={"quantize": quantize})
    model = add_adapters(load_model(folder, machine.device, machine.dtype, quantize=quantize), lora, 0)
    fuse(model)
    if cuda:
        compile_pieces(model.get_base_model())
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    made = rows(4 * STEPS, tokens // 4, vocabulary)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch) / "checkpoints", 10**6)
        trainer = train.Trainer(model, bench.tokenizer(), params.train, machine, made, made[:2], scratch, run, None)
        trainer.train()
    found = {"device": "cpu", "peak_gib": round(train.memory_gib(torch.device(machine.device)), 2)}
    if cuda:
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "held_gib": round((total - free) / memory.GIB, 2)}
    return found


def settings(tokens: int) -> Params:
    params = load()
    update = {"epochs": 1.0, "batch_size": 4, "order": "shuffled", "validations": 1}
    return params.model_copy(update={"train": params.train.model_copy(update=update)})


def judged(found: dict) -> dict:
    """`found` with the GiB that the estimate expects PyTorch, or on a CPU the process, to report, and how far off."""
    folder = bench.SCRATCH / found["model"] / "config.json"
    known = LLAMA if found["model"] == "llama-135m" else bench.MODELS[found["model"]]
    config = json.loads(folder.read_text()) if folder.is_file() else {**known.to_dict(), "dtype": "bfloat16"}
    asked = {"r": 16, "quantize": found.get("quantize"), "dropout": found.get("dropout", 0.0)}
    lora = load().lora.model_copy(update=asked)
    device = "cpu" if found["device"] == "cpu" else "cuda"
    shape = memory.shape(config)
    row = found.get("row", found["longest"])
    expected = memory.training(shape, lora, device, found["format"], found["tokens"], row, shared=False)
    errors = {"error": expected.peak / memory.GIB / found["peak_gib"] - 1}
    needed = {}
    if "held_gib" in found:
        needed["needed_gib"] = round(expected.needed / memory.GIB, 2)
        errors["needed_error"] = expected.needed / memory.GIB / found["held_gib"] - 1
    errors = {name: round(error, 3) for name, error in errors.items()}
    return found | {"estimated_gib": round(expected.peak / memory.GIB, 2), **needed, **errors}


def row_of(piece) -> int:
    """The tokens of a row of which a pack would hold as many scores as this one's rows do."""
    return round(sum((segment.end - segment.start) ** 2 for segment in piece.segments) / len(piece))


def earlier() -> list[dict]:
    """The runs on an H200 that are there, with the largest pack that their rows make."""
    found = []
    for run in json.loads(H200.read_text()):
        if not run["variant"].startswith("ours") or run["run"] < FIRST_RUN:
            continue
        made = bench.rows(bench.ROWS_A_STEP * bench.steps_of(run["model"]), bench.MODELS[run["model"]].vocab_size)
        asked = bench.TOKENS_PER_PACK.get(run["variant"], memory.TOKENS_PER_PACK["cuda"])
        steps = train.schedule(made, bench.ROWS_A_STEP, 1.0, 0, "shuffled")
        packs = [piece for step in steps for piece in pack([made[i] for i in step], asked)]
        found.append(
            {
                "model": run["model"],
                "format": "bfloat16",
                "tokens": max(map(len, packs)),
                "longest": max(len(row["input_ids"]) for row in made),
                "row": max(map(row_of, packs)),
                **({"quantize": run["variant"][5:]} if run["variant"][5:] in memory.QUANTIZED_BYTES else {}),
                **({"dropout": 0.05} if run["variant"] == "ours-dropout" else {}),
                "device": run["device"],
                "peak_gib": run["peak_gib"],
                "from": H200.name,
            }
        )
    return found


def measured(name: str, dtype: str, tokens: int, quantize: str | None = None) -> dict | None:
    """`one` in a process of its own; None, and why on stderr, where it failed."""
    asked = [name, dtype, str(tokens), *([quantize] if quantize else [])]
    longest = LONGEST_SECONDS if torch.cuda.is_available() else 10 * LONGEST_SECONDS
    command = ["timeout", str(longest), sys.executable, "-m", "bench.memory", "one", *asked]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{asked}: exit status {done.returncode}\n{done.stderr[-1000:]}", file=sys.stderr)
        return None
    case = {"model": name, "format": dtype, "tokens": tokens, "longest": tokens // 4}
    found = judged(case | ({"quantize": quantize} if quantize else {}) | json.loads(lines[0][7:]))
    print(json.dumps(found), f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def keep(runs: list[dict]) -> None:
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    worst = max(abs(run[name]) for run in runs for name in ("error", "needed_error") if name in run)
    write_json(RESULTS, {**before, "memory_estimate_error": worst, "memory": runs})


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["one"]:
        name, dtype, tokens, *quantize = arguments[1:]
        print("RESULT " + json.dumps(one(name, dtype, int(tokens), *quantize)))
        return
    before = json.loads(RESULTS.read_text()).get("memory", []) if RESULTS.is_file() else []
    runs = [judged(run) for run in before if "from" not in run] + [judged(run) for run in earlier()]
    keep(runs)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    for case in [] if arguments == ["estimate"] else cases:
        found = measured(*case)
        if found:
            same = ("model", "format", "tokens", "quantize", "device")
            runs = [found, *(run for run in runs if "from" in run or any(run.get(k) != found.get(k) for k in same))]
            keep(runs)


if __name__ == "__main__":
    main(sys.argv[1:])
