"""Safetensors files read and written a block of rows at a time, so that memory holds a block and no tensor.

The format (https://huggingface.co/docs/safetensors, "Format"): the length of the header in 8 bytes, little endian; the
header, JSON padded with spaces to a multiple of 8; the tensors' bytes. The library writes a file from tensors that are
all in memory; and for a slice it reads the whole tensor, or maps the file, which counts as memory until it is closed.
"""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ELEMENTS_PER_BLOCK = 1 << 20  # its sums in float32 stay in the processor's cache, and the disk does not ask for more
# Blocks begin where the tiles of a matrix product do, so that a product of a block is the block of the product, to the
# last bit; 64 is also a block of nf4.
ROWS = 64


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as the header calls it, its shape, its first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor from its first row to its last, in blocks of at most ELEMENTS_PER_BLOCK elements or ROWS rows."""
        rows, row = (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)
        step = max(ROWS, ELEMENTS_PER_BLOCK // max(1, row) // ROWS * ROWS)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, max(1, rows), step):  # a tensor of no rows is one block
                block = torch.empty((min(step, rows - first), *self.shape[1:]), dtype=DTYPES[self.dtype])
                _fill(file, block)
                yield block if self.shape else block[0]

    def mapped(self) -> torch.Tensor:
        """The whole of it, in the file: the kernel reads what is looked at, and can let go of it again."""
        size = math.prod(self.shape)
        if not size:
            return self.tensor()
        with self.path.open("rb") as file:  # a private map may be written to, and torch asks for one that may
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(view, dtype=DTYPES[self.dtype], count=size, offset=self.start).reshape(self.shape)

    def tensor(self) -> torch.Tensor:
        """The whole of it."""
        blocks = list(self.blocks())
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _fill(file, block: torch.Tensor) -> None:
    view = memoryview(block.reshape(-1).view(torch.uint8).numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError(f"{file.name} ends before its tensors do")
        view = view[count:]


def stored(path: Path) -> dict[str, Stored]:
    """What a file holds, by name; raises SafetensorError where it is not whole."""
    with safe_open(path, "pt"):  # the library looks at every number of the header
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def stored_model(folder: Path) -> dict[str, Stored]:
    """What a model's folder holds, by name, in one file or in the shards of an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return stored(single)
    files = {name: stored(folder / name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))}
    return {name: place for file in files.values() for name, place in file.items()}


def write_shard(path: Path, tensors: dict[str, Stored], blocks: Callable[[str], Iterable[torch.Tensor]]) -> None:
    """Write tensors of one type to a file, the same bytes as safetensors' own `save_file` of them: each with the
    shape of `tensors` and what `blocks` gives for its name."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(tensors)
    for name in names:
        place = tensors[name]
        start, end = end, end + math.prod(place.shape) * DTYPES[place.dtype].itemsize
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for block in blocks(name):
                file.write(block.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
        assert file.tell() == 8 + len(text) + end, f"{path} is not as long as its header says"
