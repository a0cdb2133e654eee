"""Outputs that are there whole or not at all: written under another name beside their place, then renamed into it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends, and is deleted when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `path` when the block ends, and is deleted when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
