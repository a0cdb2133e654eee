"""`machine: auto` resolved: the device, the number format and the sizes that suit what this machine has."""

import ctypes
import importlib.util
import math
import os
import time
from dataclasses import dataclass

import torch

from stages.params import Machine
from stages.refusal import Refusal

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOKENS_PER_PACK = {"cpu": 1024, "cuda": 24576, "xla": 1024}
ROWS_PER_BATCH = {"cpu": 105, "cuda": 256}
FASTER = 0.8  # share of float32's time that bfloat16 must stay under to be chosen


@dataclass(frozen=True)
class Resolved:
    """What `machine` came to here; recorded in metrics/timing.json."""

    device: str
    devices: tuple[str, ...]
    dtype: torch.dtype
    tokens_per_pack: int
    rows_per_batch: int
    engine: str
    deterministic: bool = False


def resolve_training(machine: Machine) -> Resolved:
    """As `resolve`, where TPUs are a device too: all those of this machine, in one process."""
    if machine.device != "xla":
        return resolve(machine)
    if importlib.util.find_spec("torch_xla") is None:
        raise Refusal(
            "params.yaml: machine.device is xla, but torch-xla is not installed here: make install-tpu, and run it all "
            "from .venv-tpu"
        )
    dtype = torch.bfloat16 if machine.dtype == "auto" else getattr(torch, machine.dtype)
    tokens = TOKENS_PER_PACK["xla"] if machine.tokens_per_pack == "auto" else machine.tokens_per_pack
    return Resolved("xla", ("xla",), dtype, tokens, rows_per_batch=0, engine=machine.engine)


def resolve(machine: Machine) -> Resolved:
    """Fill in what is `auto`; raises Refusal for a device or format that this machine lacks. What xla means to training
    alone is cpu here: TPUs neither merge nor answer."""
    if machine.device == "xla":
        machine = machine.model_copy(update={"device": "cpu", "devices": 1, "tokens_per_pack": "auto"})
    there = "cuda" if torch.cuda.is_available() else "cpu"
    device = there if machine.device == "auto" else machine.device
    if device == "cuda" and there != "cuda":
        raise Refusal("params.yaml: machine.device is cuda, but torch sees no GPU here; set it to auto")
    dtype = getattr(torch, machine.dtype) if machine.dtype != "auto" else _fastest(device)
    if device == "cpu":
        keep_freed_memory()
    there = torch.cuda.device_count() if device == "cuda" else 1
    count = there if machine.devices == "auto" else machine.devices
    if device == "cuda" and count > there:
        raise Refusal(f"params.yaml: machine.devices is {count}, but torch sees {there} here; set it to auto")
    devices = tuple(f"cuda:{number}" for number in range(count)) if device == "cuda" else (device,) * count
    tokens = TOKENS_PER_PACK[device] if machine.tokens_per_pack == "auto" else machine.tokens_per_pack
    rows = ROWS_PER_BATCH[device] if machine.rows_per_batch == "auto" else machine.rows_per_batch
    if machine.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise Refusal(
            "params.yaml: machine.engine is vllm, which is not installed; set it to batches, or: pip install "
            "vllm==0.32.0"
        )
    return Resolved(device, devices, dtype, tokens, rows, machine.engine, machine.deterministic)


def add_in_one_order() -> None:
    """Have this process's kernels on a GPU add up in the same order each time: attention's and gathering's way back do
    not by default, nor does cuBLAS where its workspace is not laid out beforehand (its manual, "Results
    reproducibility")."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: it would give each large tensor back to the kernel, whose zeroing of the same
    pages again takes a fifth of the time that training and generation take on a CPU. Elsewhere than glibc: nothing."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 << 20)


def _fastest(device: str) -> torch.dtype:
    """bfloat16 on a GPU; on a CPU the format that it multiplies faster, which no flag of the processor tells: of two
    with avx512_bf16, one is 2.4 times as fast in bfloat16 as in float32, the other 0.6 times (bench/README.md)."""
    if device == "cuda":
        return torch.bfloat16
    seconds = _product_seconds((torch.float32, torch.bfloat16))
    # a difference that another run might see the other way round does not decide
    return torch.bfloat16 if seconds[torch.bfloat16] < FASTER * seconds[torch.float32] else torch.float32


def _product_seconds(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """How long a matrix product of the size that training a small model is made of takes, about two milliseconds.

    The shortest of 21, taken in turn and on one thread: threads wait for each other where other programs run, and
    those must not decide the format."""
    pairs = {dtype: (torch.ones(256, 640, dtype=dtype), torch.ones(2048, 640, dtype=dtype)) for dtype in dtypes}
    seconds = dict.fromkeys(dtypes, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(21):
        for dtype, (x, weight) in pairs.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return seconds
