"""How a stage ends: well, or with one line and an exit status that is not 0; never long after DVC itself has ended."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PDEATHSIG = 1  # PR_SET_PDEATHSIG, sys/prctl.h
LAST_SECONDS = 10  # from a signal to the end of what does not end by itself
SPARE_BYTES = 32 << 20
GO_ON = "; go on with: dvc repro" if "DVC_STAGE" in os.environ else ""
DISK_FULL = f"free some room: python -m tools.prune shows what can go{GO_ON.replace(';', ', then')}"
# Libraries written in Rust, C or C++ have errors of their own for it.
NO_ROOM = re.compile("No space left on device|Disk quota exceeded|os error 28|StorageFull|disk is full")
NO_MEMORY = re.compile("can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE)


class Refusal(Exception):
    """What is wrong, where (file, row, field), and what to do about it, in one line that a terminal can show: what
    libraries quote of a file may hold anything."""

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line's arguments; what is no fault of the code becomes one line on stderr.

    Exit status: 2 for what is wrong with input or machine, 128 and the signal's number for SIGINT and SIGTERM.
    """
    die_with_dvc()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        refuse_full_disk()
        main(sys.argv[1:])
        refuse_full_disk()
    except Refusal as refusal:
        end(str(refusal))
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        end(line)


def end(line: str, status: int = 2) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def explained(error: Exception) -> str | None:
    """A full disk, memory that ran out or an input that is not there, in one line; None for any other error."""
    text = " ".join(str(error).split())
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or NO_ROOM.search(text):
        return f"the disk is full ({text[:200]}); {DISK_FULL}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(text)):
        return (
            f"memory ran out ({text[:200]}); in params.yaml lower machine.tokens_per_pack while training, "
            f"machine.rows_per_batch while answering, or take a machine with more{GO_ON}"
        )
    if isinstance(error, FileNotFoundError) and Path(error.filename or "").parts[:1] in (("data",), ("models",)):
        return f"{error.filename}: is not there; dvc repro makes it"
    return None


def refuse_full_disk() -> None:
    """Raise Refusal where DVC, which writes dvc.lock in place, might find no room for it and leave it cut short."""
    if "DVC_STAGE" in os.environ and shutil.disk_usage(".").free < SPARE_BYTES:
        raise Refusal(f"the disk is full (under {SPARE_BYTES >> 20} MB are left); {DISK_FULL}")


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave what was begun, deleting it; at the second signal, or where that takes long, at once."""
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(LAST_SECONDS)
    end(f"stopped by {signal.Signals(number).name}{GO_ON}", 128 + number)


def die_with_dvc() -> None:
    """Where DVC started this process, on Linux: be killed when DVC is, and not begin where it is gone already."""
    if sys.platform != "linux" or "DVC_STAGE" not in os.environ:
        return
    parent = os.getppid()
    die_with_parent(parent)
    dvc = _dvc(parent)
    try:
        gone = os.getsid(dvc) != os.getsid(0) or _takes_orphans(dvc)
    except ProcessLookupError:
        gone = True
    if gone:
        end(f"DVC has ended, and this stage with it{GO_ON}", 128 + signal.SIGKILL)
    if dvc != parent:  # a shell stands between, which would wait for this process
        threading.Thread(target=_watch, args=(parent, dvc), daemon=True).start()


def die_with_parent(parent: int) -> None:
    """Linux: be killed when the thread that started this process ends; end now if the process has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGKILL)


def _dvc(process: int) -> int:
    """The nearest of `process` and those above it without the DVC_STAGE that DVC gives to what it starts."""
    mark = f"DVC_STAGE={os.environ['DVC_STAGE']}".encode()
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        while process and mark in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


def _takes_orphans(process: int) -> bool:
    """Whether it is the first process of a container, to which orphans are given: it can share their session. DVC can
    be it too, and then is Python."""
    if process != 1:
        return False
    program, *arguments = Path("/proc/1/cmdline").read_bytes().split(b"\0")
    return b"python" not in program.rpartition(b"/")[2] or not any(b"dvc" in argument for argument in arguments)


def _watch(parent: int, dvc: int) -> None:
    """End when `parent`, a shell, is no longer DVC's."""
    while _dvc(parent) == dvc:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
