"""A function in; several processes that run it, a device each, and train one model together.

Every process holds the whole model, or of its frozen layers a share (sharded.py), and computes its share of each step's
rows. Before the optimizer's step they add up their gradients, which are those of the adapters alone: one tensor, sent
when a step's last pack is done, since the hooks of DistributedDataParallel would look for gradients that a CUDA graph
writes without them.
"""

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from stages.models.machine import keep_freed_memory
from stages.models.packs import deal
from stages.refusal import GO_ON, Refusal, die_with_parent, explained

COME_MINUTES = 10  # for all machines to come together
END_SECONDS = (
    5.0  # from the end of one process, or the asking for it, to that of the others; under refusal.LAST_SECONDS
)
LONGEST = 10_000  # characters of a trace: a pipe takes 64 KiB before it is read
# What those say whose peer has ended: its own message is the one that tells why.
PEER_GONE = re.compile(r"gloo|NCCL|Connection (closed|reset)|TCPStore|recvValue", re.IGNORECASE)


@dataclass(frozen=True)
class Machines:
    """How many machines train together, which of them this is, and where (host:port) they meet."""

    count: int = 1
    number: int = 0
    rendezvous: str | None = None

    @classmethod
    def found(cls, rendezvous: str | None) -> "Machines":
        """Those that the environment names, as torchrun's options do; raises Refusal where it does not."""
        if rendezvous is None:
            return cls()
        found = [os.environ.get(name, "") for name in ("NNODES", "NODE_RANK")]
        if not all(value.isascii() and value.isdecimal() for value in found) or not int(found[1]) < int(found[0]):
            raise Refusal(
                f"params.yaml: machine.rendezvous is {rendezvous}, but the environment does not say how many machines "
                "there are and which of them this is; on the first of two: NNODES=2 NODE_RANK=0 dvc repro"
            )
        if int(found[1]) and "DVC_STAGE" in os.environ:  # which would wait for outputs
            raise Refusal(
                "the adapter is written on the machine with NODE_RANK=0 alone; here, with NODE_RANK="
                f"{found[1]}, run the command that dvc.yaml has for train by itself"
            )
        return cls(int(found[0]), int(found[1]), rendezvous)


class Ranks:
    """What one of `count` processes, the `number`th, knows of the others. Alone there are none and nothing is sent."""

    def __init__(self, number: int = 0, count: int = 1, store: dist.Store | None = None, here: int = 1):
        """here: how many of them are on one machine."""
        self.number, self.count, self.store = number, count, store
        self.first_here = number % here == 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def share(self, rows: list[dict], tokens_per_pack: int) -> list[dict]:
        """This process's part of rows that all have."""
        return rows if self.count == 1 else deal(rows, self.count, tokens_per_pack)[self.number]

    def seed_step(self, seed: int, step: int) -> None:
        """Let dropout draw from numbers that are this step's and this process's own, so that a checkpoint of the
        first process serves all. Alone, it draws from where the step before left off."""
        if self.count > 1:
            digest = hashlib.sha256(f"{seed}/{step}/{self.number}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))

    @torch.no_grad()
    def begin_alike(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give all processes the first one's values."""
        if self.count == 1:
            return
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        dist.broadcast(flat, 0)
        for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))

    @torch.no_grad()
    def add_up(self, parameters: list[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Give each parameter the sum of all processes' gradients, and return that of their losses ([]). A process
        without a share of the step adds nothing."""
        if self.count == 1:
            return loss
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), loss.view(1)])
        dist.all_reduce(flat)
        *sums, loss = flat.split([*(parameter.numel() for parameter in parameters), 1])
        for parameter, values in zip(parameters, sums, strict=True):
            parameter.grad.copy_(values.view_as(parameter))  # the same memory: a CUDA graph may know it
        return loss[0]

    def of_first(self, value: Any) -> Any:
        """What the first process has there."""
        if self.count == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0, device=torch.device("cpu"))
        return held[0]

    def of_all(self, value: Any) -> list[Any]:
        """What each process has there; all must ask."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def refuse_differences(self, decides: dict[str, Any] | None) -> None:
        """Raise Refusal where machines do not train the same; `decides`: what decides the result, of each machine's
        first process, None of the others."""
        digests = decides and {
            name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
            for name, value in decides.items()
            if name in ("params", "base", "tokens", "code", "packages", "python")
        }
        one, *others = [each for each in self.of_all(digests) if each]
        for number, other in enumerate(others, start=1):
            differ = ", ".join(name for name in one if one[name] != other[name])
            if differ:
                raise Refusal(
                    f"machine {number} does not train what machine 0 trains: {differ} differ; bring params.yaml, code, "
                    "models/base, data/tokens, data/validation and installed packages of the first to the others"
                )


ALONE = Ranks()


def launch(
    work: Callable[..., None], arguments: tuple, devices: tuple[str, ...], machines: Machines = Machines()
) -> None:
    """Run `work(*arguments, ranks)` in a process for each of this machine's devices, and wait for all.

    Where one fails the others are ended; raises Refusal with what it refused, or prints its trace and exits.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for local, device in enumerate(devices):
                heard, told = context.Pipe(duplex=False)
                place = _Place(local, len(devices), device, machines, Path(scratch) / "store")
                process = context.Process(target=_work, args=(os.getpid(), told, place, work, arguments))
                with _environment_of(local, device), _deaf():
                    process.start()
                told.close()
                workers.append((process, heard))
            while True:
                running = [process.sentinel for process, _ in workers if process.exitcode is None]
                if any(process.exitcode for process, _ in workers):
                    _refuse(workers, devices)
                if not running:
                    return
                multiprocessing.connection.wait(running)  # a sentinel may be ready before there is an exit code
        finally:
            _end([process for process, _ in workers])


@contextlib.contextmanager
def _environment_of(local: int, device: str):
    """Let a process that starts meanwhile see its own GPU alone: the Trainer takes the first that it sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[local].strip() if before else str(local)
    try:
        yield
    finally:
        if device != "cpu":
            del os.environ["CUDA_VISIBLE_DEVICES"]
            os.environ |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}


@contextlib.contextmanager
def _deaf():
    """Let a process that starts meanwhile never hear Ctrl-C, which a terminal sends to all: the launcher ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _refuse(workers: list, devices: tuple[str, ...]) -> NoReturn:
    """Say of all that failed the one whose failure is no other's echo."""
    _wait([process for process, _ in workers], 0.5)  # for who failed first and is slower to end
    said: dict[str, str] = {}
    for (process, heard), device in zip(workers, devices, strict=True):
        with contextlib.suppress(EOFError):
            if heard.poll():
                kind, text = heard.recv()
                said.setdefault(kind, text)
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            line = f"the process that trains on {device} was ended by {name}"
            if process.exitcode == -signal.SIGKILL:
                line += ", perhaps since memory ran out: then lower machine.tokens_per_pack or machine.devices"
            said.setdefault("killed", line + GO_ON)
    print(file=sys.stderr)  # after the progress bar, which whoever drew it may not have ended
    for kind in ("refused", "killed", "fault", "echo"):
        if kind in said and kind == "fault":
            print(said[kind], file=sys.stderr)
            sys.exit(1)
        if kind in said:
            raise Refusal(said[kind])
    raise Refusal(f"a process that trains ended without a word{GO_ON}")


def _wait(processes: list, seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _end(processes: list) -> None:
    """End what still runs: asked first, so that it deletes what it had begun, then at once."""
    for process in processes:
        process.terminate()
    _wait(processes, END_SECONDS)
    for process in processes:
        process.kill()
        process.join()


@dataclass(frozen=True)
class _Place:
    """Which process one is: the `local`th of `here` on its machine, with a device and a place to meet the others."""

    local: int
    here: int
    device: str
    machines: Machines
    file: Path


def _work(launcher: int, told: Any, place: _Place, work: Callable[..., None], arguments: tuple) -> None:
    """What a process does: meet the others, work, tell the launcher what went wrong."""
    die_with_parent(launcher)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    number = place.machines.number * place.here + place.local
    if number:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for good: what all would say, the first says
    try:
        if place.device == "cpu":
            keep_freed_memory()
            torch.set_num_threads(max(1, torch.get_num_threads() // place.here))
        count = place.machines.count * place.here
        store = _meet(place, number, count)
        backend = "gloo" if place.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=count)
        ranks = Ranks(number, count, store, place.here)
        work(*arguments, ranks)
        ranks.of_all(None)  # none leaves while another might still ask the store
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - the launcher says it, once
        told.send(_told(error, place.machines.count))
        sys.exit(2)


def _meet(place: _Place, number: int, count: int) -> dist.Store:
    """The store through which the processes find each other; raises Refusal where a machine does not come, or comes
    with another number of devices."""
    machines = place.machines
    if machines.rendezvous is None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it listens where a hostname may point
        return dist.FileStore(str(place.file), count)
    host, _, port = machines.rendezvous.rpartition(":")
    try:
        store = dist.TCPStore(
            host, int(port), is_master=number == 0, timeout=timedelta(minutes=COME_MINUTES), wait_for_workers=False
        )
        store.set(f"devices/{machines.number}", str(place.here))
        found = [int(store.get(f"devices/{each}")) for each in range(machines.count)]
    except (dist.DistError, RuntimeError) as error:
        raise Refusal(
            f"machine.rendezvous: {machines.count} machines did not all come to {machines.rendezvous} within "
            f"{COME_MINUTES} minutes ({str(error)[:200]}); it must be an address of the machine with NODE_RANK=0 that "
            "the others reach"
        ) from None
    if len(set(found)) > 1:
        counts = ", ".join(map(str, found))
        raise Refusal(f"machine.devices: the machines come with {counts} devices; set one number for all of them")
    return store


def _told(error: Exception, machines: int) -> tuple[str, str]:
    """What to tell the launcher of an error, and of which kind it is."""
    if isinstance(error, Refusal):
        return "refused", str(error)
    line = explained(error)
    if line is not None:
        return "refused", line
    if isinstance(error, (dist.DistError, RuntimeError)) and PEER_GONE.search(str(error)):
        # NCCL puts its reason last
        reason = " ".join(str(error).split())[-300:]
        if machines == 1:
            return "echo", f"the processes that train can no longer talk to each other{GO_ON} ({reason})"
        return "echo", f"a device of another machine has ended, and its own message says why{GO_ON} ({reason})"
    return "fault", "".join(traceback.format_exception(error))[-LONGEST:]
