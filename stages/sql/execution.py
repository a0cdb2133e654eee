"""Run queries that a model wrote: in a child process with nothing to reach, and against a deadline that kills it.

An authorizer, limits and a progress handler in the child (worker.py) stop nearly all; `printf('%.*c', 900000000, 'x')`
is one that no interrupt reaches, and only killing the process does.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

from stages.sql import worker
from stages.sql.instances import Instance

Cell: TypeAlias = int | float | str | bytes | None

# What the child gets beyond a query's deadline to say so itself, before it is killed.
GRACE_SECONDS = 0.2
# Instances open in a worker at once; one takes about 0.2 MB.
MOST_OPEN = 256
# Past any reply that the worker's own caps allow.
MAX_REPLY_BYTES = 64 << 20
START_SECONDS = 30.0


@dataclass(frozen=True)
class Rows:
    """What a query showed; `truncated` where it was over a cap, so that it equals nothing."""

    rows: list[tuple[Cell, ...]]
    truncated: bool = False


@dataclass(frozen=True)
class Failure:
    """The query did not run: SQLite's message, or what the worker denied it, in 200 characters at most."""

    message: str


@dataclass(frozen=True)
class Timeout:
    """The query ran past its deadline."""

    seconds: float


Outcome: TypeAlias = Rows | Failure | Timeout


class WorkerError(RuntimeError):
    """The worker failed for a reason that is not the query's: a bug of ours, never an outcome."""


class _Died(Exception):
    """The worker's process ended, with this status (negative: the signal)."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class _Overran(Exception):
    """No reply by the deadline."""


class Sandbox:
    """One long-lived worker; each instance is sent to it once. Use it from the thread that opened it.

    A Sandbox in each of several threads runs queries side by side. On Linux a worker dies with its thread.
    """

    def __init__(self, seconds: float = 2.0):
        """`seconds` is the wall time that one query may take on one instance."""
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._open: OrderedDict[str, None] = OrderedDict()
        self._buffer = b""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        """End the worker; a later `run` starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()
        self._process = None
        self._open.clear()
        self._buffer = b""

    def run(self, instance: Instance, sql: str) -> Outcome:
        """Run one statement on one instance; raises WorkerError for what is not the query's doing."""
        self._ensure(instance)
        try:
            reply = self._ask({"run": instance.id, "sql": sql, "seconds": self.seconds}, self.seconds + GRACE_SECONDS)
        except _Overran:
            self.close()
            return Timeout(self.seconds)
        except _Died as death:
            if death.status >= 0:
                raise self._broken(death.status) from None
            self.close()
            return Failure(f"the worker was ended by {signal.Signals(-death.status).name}")
        if "timeout" in reply:
            return Timeout(self.seconds)
        if "error" in reply:
            return Failure(reply["error"])
        return Rows([tuple(map(_cell, row)) for row in reply["rows"]], reply["truncated"])

    def run_all(self, instances: Iterable[Instance], sql: str) -> list[Outcome]:
        """Outcomes on the instances in turn, up to the first that is not rows: one deadline is enough to pay."""
        outcomes: list[Outcome] = []
        for instance in instances:
            outcomes.append(self.run(instance, sql))
            if not isinstance(outcomes[-1], Rows):
                break
        return outcomes

    def _ensure(self, instance: Instance) -> None:
        """Have a worker that holds the instance; one that died in between is replaced once."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if instance.id in self._open:
            self._open.move_to_end(instance.id)
            return
        if self._process is None:
            self._start()
        try:
            if len(self._open) >= MOST_OPEN:
                oldest, _ = self._open.popitem(last=False)
                self._ask({"close": oldest}, START_SECONDS)
            self._ask({"open": instance.id, "ddl": instance.ddl, "rows": instance.rows}, START_SECONDS)
        except _Died as death:
            raise self._broken(death.status) from None
        except _Overran:
            self.close()
            raise WorkerError(f"the worker took over {START_SECONDS:g} seconds to open an instance") from None
        self._open[instance.id] = None

    def _start(self) -> None:
        command = [sys.executable, "-I", "-S", "-B", worker.__file__, str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={},
            bufsize=0,
            close_fds=True,
            start_new_session=True,  # a Ctrl-C is the parent's to answer
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        os.set_blocking(self._process.stdin.fileno(), False)

    def _broken(self, status: int) -> WorkerError:
        """The worker's traceback as an exception of the parent's."""
        words = self._process.stderr.read().decode("utf-8", "replace").strip()
        self.close()
        return WorkerError(f"the SQL worker ended with status {status}: {words or 'it said nothing'}")

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and return the reply; raises _Died or _Overran."""
        deadline = time.monotonic() + seconds
        self._send(json.dumps(request).encode() + b"\n", deadline)
        while b"\n" not in self._buffer:
            self._wait([self._process.stdout.fileno()], [], deadline)
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise _Died(self._process.wait())
            self._buffer += piece
            if len(self._buffer) > MAX_REPLY_BYTES:
                self.close()
                raise WorkerError("the SQL worker's reply is larger than its caps allow")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _send(self, data: bytes, deadline: float) -> None:
        place = self._process.stdin.fileno()
        while data:
            self._wait([], [place], deadline)
            try:
                data = data[os.write(place, data) :]
            except BrokenPipeError:
                raise _Died(self._process.wait()) from None

    def _wait(self, reading: list[int], writing: list[int], deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not any(select.select(reading, writing, [], left)):
            raise _Overran


def _cell(value: Any) -> Cell:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
