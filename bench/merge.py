"""What merging costs: memory, seconds and the disk's share of them, beside a plain copy and beside PEFT's own merge.

    python -m bench.merge models/base models/adapter      the real model
    python -m bench.merge gemma2-9b                       random weights of that shape, 18.5 GB, and as much again free

Each variant is a process of its own, lorepro and the copy again at the end; what was written before is on the disk and
the base's files are out of the page cache when it begins, and the clock, which starts when the libraries are imported,
stops when what was written is on the disk. `peak_anonymous_gib` is the largest RssAnon of /proc/PID/status, read every
10 ms: memory that the kernel cannot take back, what is mapped from files left out; `peak_resident_gib` is VmHWM, the
kernel's own high-water mark, with it. The variant `check` is what the stage does before and after merging, with two
rows of 64 tokens: answers of the base with its adapter, and of the base alone in the merged model's place. Writes
bench/results/merge.json.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from bench.cpu_formats import cpu
from stages.merge import answers_logits, compare, merge, repair, write_model
from stages.models.load import load_model
from stages.models.machine import resolve
from stages.models.shards import ELEMENTS_PER_BLOCK, Stored, write_shard
from stages.outputs import write_json
from stages.params import load

RESULTS = Path("bench/results/merge.json")
SHARD = "2GB"
VARIANTS = ("cp", "lorepro", "peft", "check", "lorepro", "cp")
SHAPES = {
    "gemma2-9b": {
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    }
}


def write_random(shape: dict[str, int], base: Path, adapter: Path, shard: str = "5GB") -> None:
    """A base of that shape in bfloat16 and an adapter of rank 16 on all linear layers, a block in memory at a time."""
    config = Gemma2Config(**shape, dtype="bfloat16", architectures=["Gemma2ForCausalLM"])
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config).bfloat16()
    config.save_pretrained(base)
    GenerationConfig(eos_token_id=1, bos_token_id=2, pad_token_id=0).save_pretrained(base)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard)
    noise = torch.randn(2 * ELEMENTS_PER_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def blocks(name: str) -> Iterator[torch.Tensor]:
        left = state[name].numel()
        while left:
            count = min(left, ELEMENTS_PER_BLOCK)
            start = (left * 2654435761) % ELEMENTS_PER_BLOCK
            yield noise[start : start + count]
            left -= count

    for file, names in split.filename_to_tensors.items():
        write_shard(base / file, {n: Stored(base, "BF16", tuple(state[n].shape), 0) for n in names}, blocks)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora, low_cpu_mem_usage=True)
    tuned.peft_config["default"].save_pretrained(adapter)
    tensors = {
        name.replace(".default", ""): torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
        for name, parameter in tuned.named_parameters()
        if "lora_" in name
    }
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    dtype = AutoConfig.from_pretrained(base).dtype
    model = merge(load_model(base, "cpu", dtype), adapter, None)
    model.generation_config = repair(GenerationConfig.from_pretrained(base))
    model.save_pretrained(out, max_shard_size=SHARD)


def run(variant: str, base: Path, adapter: Path, out: Path) -> dict:
    """One variant in a process of its own."""
    os.sync()
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "bench.merge", "child", variant, base, adapter, out]
    if variant == "cp":
        command = ["cp", *base.glob("*.safetensors"), out]
    out.mkdir()
    began = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    peaks = {"RssAnon": 0, "VmHWM": 0}
    watching = threading.Thread(target=watch, args=(process.pid, peaks))
    watching.start()
    said, _ = process.communicate()
    ended = time.monotonic()
    watching.join()
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    row = {"variant": variant, "model": base.name, "gb": round(size / 1e9, 2)}
    memory = {
        "peak_anonymous_gib": round(peaks["RssAnon"] / 2**20, 2),
        "peak_resident_gib": round(peaks["VmHWM"] / 2**20, 2),
    }
    if process.returncode:
        return row | {"failed": process.returncode} | memory
    seconds = time.monotonic() - began
    start = float(said or 0)  # what the process took to import its libraries
    return row | {
        "seconds": round(seconds - start, 1),
        "of_it_waiting_for_the_disk_at_the_end": round(began + seconds - ended, 1),
        "seconds_to_start": round(start, 1),
        "mb_per_second": round(size / 1e6 / (seconds - start)),
        **memory,
        "sha256": None if variant in ("cp", "check") else digest(out),
    }


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the largest of each figure of the process, in KiB, until it ends."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        found = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if name in peaks
        }
        if not found:  # it has ended and waits to be asked
            return
        peaks.update({name: max(peaks[name], value) for name, value in found.items()})
        time.sleep(0.01)


def digest(folder: Path) -> str:
    """One sum over the names and bytes of the files of weights and their index."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("model*")):
        whole.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(16 << 20):
                whole.update(piece)
    return whole.hexdigest()


def _born() -> float:
    """When this process began, in seconds since the machine started: field 22 of proc(5)'s stat."""
    after_the_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(after_the_name[19]) / os.sysconf("SC_CLK_TCK")


def child(variant: str, base: Path, adapter: Path, out: Path) -> None:
    print(time.clock_gettime(time.CLOCK_BOOTTIME) - _born(), flush=True)
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory does not suffice, this process goes
    machine = resolve(load().machine.model_copy(update={"device": "cpu", "devices": 1, "dtype": "bfloat16"}))
    if variant == "peft":
        merge_by_peft(base, adapter, out)
    elif variant == "check":
        ids = list(range(1000, 1064))
        rows = [{"id": n, "input_ids": ids, "labels": [-100] * 64, "prompt_tokens": 32} for n in "ab"]
        compare(answers_logits(base, adapter, rows, machine), answers_logits(base, None, rows, machine))
    else:
        write_model(base, adapter, out, SHARD, "cpu", None)


def main(arguments: list[str]) -> None:
    if arguments[0] == "child":
        child(arguments[1], *map(Path, arguments[2:]))
        return
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        scratch = Path(scratch)
        if arguments[0] in SHAPES:
            base, adapter = scratch / arguments[0], scratch / "adapter"
            write_random(SHAPES[arguments[0]], base, adapter)
        else:
            base, adapter = scratch / "gemma3-270m", Path(arguments[1])
            base.symlink_to(Path(arguments[0]).resolve())
        rows = []
        for variant in VARIANTS:
            rows.append(run(variant, base, adapter, scratch / "out"))
            shutil.rmtree(scratch / "out")
            print(json.dumps(rows[-1]), file=sys.stderr)
    sums = {row.pop("sha256", None) for row in rows} - {None}
    machine = {"cpu": cpu(), "cores": os.cpu_count(), "torch": torch.__version__}
    for row in rows:
        if row["variant"] not in ("cp", "check") and "failed" not in row:
            row["same_bytes"] = len(sums) == 1
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    kept = [one for one in before if one["rows"][0]["model"] != rows[0]["model"]]
    write_json(RESULTS, [*kept, {"machine": machine, "rows": rows}])


if __name__ == "__main__":
    main(sys.argv[1:])
