"""The state of a training run in; checkpoints out that outlive a kill, and the newest good one back.

They lie in $DVC_ROOT/.runs, outside of every output, in a folder named after all that decides the result: a run finds
its own checkpoints and no other's. DVC_ROOT is set by DVC and names the main repository in temporary experiments too.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from stages.models.room import KEPT
from stages.refusal import Refusal

KEPT_DAYS = 7  # what no training has gone on with for so long is deleted
AT_LEAST_SECONDS = 60.0
SHARE = 0.01  # of the time, at most, that writing takes where the interval is chosen here
DOWNLOADS = "downloads"  # in .runs too, and download's own affair
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
CODE = Path(__file__).parent.parent
# What libraries read from the environment that changes how sums are rounded.
ROUNDING = ("ATEN_", "CUBLAS", "CUDNN", "DNNL", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN", "PYTORCH_", "TORCH")
# The same of torch-xla, and what tells it how many devices there are.
ROUNDING += ("CPU_NUM_DEVICES", "LIBTPU", "PJRT_", "TPU_", "XLA_")


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps; `state` is JSON."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class Run:
    """The checkpoints of one run, each a folder named by its step and its manifest's hash."""

    def __init__(self, folder: Path, interval_minutes: float | str):
        """interval_minutes: between two checkpoints; "auto": one, or more where writing one takes long."""
        self.folder = folder
        self.interval_seconds = AT_LEAST_SECONDS if interval_minutes == "auto" else interval_minutes * 60
        self.automatic = interval_minutes == "auto"
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.written >= self.interval_seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint whole or not at all; of those before it, the newest stays."""
        began = time.monotonic()
        state = json.dumps({**checkpoint.state, "step": checkpoint.step}, allow_nan=False).encode()
        tensors = {name: value.cpu() for name, value in checkpoint.tensors.items()}
        files = {TENSORS: safetensors.torch.save(tensors), STATE: state}
        manifest = json.dumps({name: [len(content), sha256(content)] for name, content in files.items()}).encode()
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name, content in {**files, MANIFEST: manifest}.items():
                with (partial / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(partial)
            partial.rename(self.folder / f"step{checkpoint.step:09d}-{sha256(manifest)[:16]}")
            _sync_folder(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.keep(KEPT)
        self.written = time.monotonic()
        if self.automatic:
            self.interval_seconds = max(AT_LEAST_SECONDS, (self.written - began) / SHARE)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is what was written; damaged ones are told of and deleted.

        Raises Refusal where the disk cannot read one: it may be able to later.
        """
        for folder in reversed(self._folders()):
            try:
                return _read(folder)
            except (FileNotFoundError, ValueError) as error:
                print(f"{folder}: {error}; the checkpoint before it is used", file=sys.stderr)
                shutil.rmtree(folder)
            except OSError as error:
                raise Refusal(
                    f"{folder}: {error}; see to its disk, or delete the folder to go on from the checkpoint before it"
                ) from None
        return None

    def keep(self, count: int) -> None:
        """Delete all but the newest `count`."""
        for folder in self._folders()[: len(self._folders()) - count]:
            shutil.rmtree(folder)
        if count == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step*"))


def _read(folder: Path) -> Checkpoint:
    """Raises ValueError or FileNotFoundError where a byte is not what was written, OSError where none can be read."""
    manifest = (folder / MANIFEST).read_bytes()
    if sha256(manifest)[:16] != folder.name.partition("-")[2]:
        raise ValueError(f"{MANIFEST} is not what was written")
    contents = {}
    for name, (size, digest) in json.loads(manifest).items():
        contents[name] = (folder / name).read_bytes()
        if (len(contents[name]), sha256(contents[name])) != (size, digest):
            raise ValueError(f"{name} is not what was written")
    state = json.loads(contents[STATE])
    return Checkpoint(state.pop("step"), safetensors.torch.load(contents[TENSORS]), state)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(out: Path, decisive: dict[str, Any], interval_minutes: float | str) -> Iterator[Run]:
    """Yield the run that `decisive` (JSON) names, for as long as no other may train it or write to `out`.

    Raises Refusal where another does.
    """
    runs = Path(os.environ.get("DVC_ROOT", ".")).resolve() / ".runs"
    name = sha256(json.dumps(decisive, sort_keys=True).encode())[:32]
    place = sha256(str(out.resolve()).encode())[:32]
    runs.mkdir(exist_ok=True)
    with (
        locked(runs / f"{place}.lock", f"{out}: another training writes to it"),
        locked(runs / f"{name}.lock", f"{out}: another training makes the very same adapter"),
    ):
        _delete_old(runs)
        yield Run(runs / name, interval_minutes)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock that the kernel gives up when this process ends, however it ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "that has just begun"
            raise Refusal(f"{busy}: process {holder}; wait for its end, or end it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _delete_old(runs: Path) -> None:
    before = time.time() - KEPT_DAYS * 86400
    for path in runs.iterdir():
        with contextlib.suppress(Refusal, FileNotFoundError):
            if path.is_dir() and path.name != DOWNLOADS and path.stat().st_mtime < before:
                with locked(runs / f"{path.name}.lock", "in use"):
                    shutil.rmtree(path)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def checksums(files: dict[str, Path]) -> dict[str, str]:
    """The sha256 of each file, several at a time."""

    def checksum(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(checksum, files.values()), strict=True))


def surroundings(device: str) -> dict[str, Any]:
    """What decides a result beside parameters and inputs: code, packages, processor, and how sums are rounded."""
    modules = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    ours = {str(path.relative_to(CODE)): path for path in map(Path.resolve, modules) if path.is_relative_to(CODE)}
    packages = {f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}
    return {
        "code": checksums(ours),
        "packages": sorted(packages),
        "python": platform.python_version(),
        "processor": [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()],
        "gpu": [torch.cuda.get_device_name(), torch.version.cuda] if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(ROUNDING)},
    }


def _processor() -> str:
    with contextlib.suppress(FileNotFoundError):  # there on Linux alone
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
