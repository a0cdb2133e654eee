"""Outputs that are there whole or not at all: written under another name beside their place, then renamed into it."""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.refusal import SPARE_BYTES, Refusal


def refuse_without_room(path: Path, needed_bytes: int) -> None:
    """Raise Refusal, before the work, where the disk that `path` will be on has no room for so much more."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes + SPARE_BYTES:
        raise Refusal(
            f"{path}: {size(needed_bytes)} are to be written, and its disk has {size(free)} left; "
            "free some room: python -m tools.prune shows what can go"
        )


def size(count: int) -> str:
    """Bytes for people: 1.2 GB, 340 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends, and is deleted when the block fails."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where to write what becomes `path`; what processes that are gone had begun of it is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for begun in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            os.kill(int(begun.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(begun) if begun.is_dir() else begun.unlink()
        except (ValueError, PermissionError):
            continue  # no process's; or another user's, which lives
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, deleted when the block ends; where a kill leaves it, by the next one."""
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `path` when the block ends, and is deleted when the block fails."""
    with scratch_folder(path) as partial:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused, since no other tool could read them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with new_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: Path, values: Iterator[Any]) -> int:
    """Write one JSON document a line and return how many there were."""
    count = 0
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
