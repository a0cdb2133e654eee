"""What a download has got so far: kept outside of every output until the stage has succeeded, then forgotten.

An output is replaced whole, so nothing in it survives a failure; 50 GB on their way should.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.refusal import Refusal

LOCK = ".lock"


def name(source: str, origin: str) -> str:
    """What to keep `origin`, owner/name@commit, of a source under."""
    return f"{source}--{origin.replace('/', '--')}"


def place(name: str) -> Path:
    """The folder kept under `name`. DVC_ROOT is the main repository, in a temporary copy of it too."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".runs/downloads" / name


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder` and have it alone while the block runs; raises Refusal where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"{folder}: another download into it is under way; wait for it, or end it") from None
        yield


def forget(folder: Path) -> None:
    """Delete `folder`, unless another process has it, which will."""
    with contextlib.suppress(Refusal), held(folder):
        shutil.rmtree(folder)
