"""`machine: auto` resolved: the device, the number format and the sizes that suit what this machine has."""

import ctypes
from dataclasses import dataclass

import torch

from stages.params import Machine
from stages.refusal import Refusal

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOKENS_PER_PACK = {"cpu": 1024, "cuda": 16384}
ROWS_PER_BATCH = {"cpu": 105, "cuda": 256}


@dataclass(frozen=True)
class Resolved:
    """What `machine` came to here; recorded in metrics/timing.json."""

    device: str
    dtype: torch.dtype
    tokens_per_pack: int
    rows_per_batch: int


def resolve(machine: Machine) -> Resolved:
    """Fill in what is `auto`; raises Refusal for a device or format that this machine lacks."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    device = there if machine.device == "auto" else machine.device
    if device == "cuda" and there != "cuda":
        raise Refusal("params.yaml: machine.device is cuda, but torch sees no GPU here; set it to auto")
    dtype = getattr(torch, machine.dtype) if machine.dtype != "auto" else _fastest(device)
    if device == "cpu":
        _keep_freed_memory()
    tokens = TOKENS_PER_PACK[device] if machine.tokens_per_pack == "auto" else machine.tokens_per_pack
    rows = ROWS_PER_BATCH[device] if machine.rows_per_batch == "auto" else machine.rows_per_batch
    return Resolved(device, dtype, tokens, rows)


def _keep_freed_memory() -> None:
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
    """bfloat16 on a GPU and on a CPU with AMX; on others it multiplies slower than float32 (bench/README.md)."""
    if device == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32
