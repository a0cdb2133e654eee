"""Files at URLs in; the same files on this disk, whole and checked, out. What a cut connection left is gone on from.

huggingface_hub would fetch them too, but since 1.18 deletes what it has when a connection is cut or a disk is full, and
begins a file anew (huggingface/huggingface_hub#4228, #4196).
"""

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from tqdm import tqdm

from stages.outputs import refuse_without_room
from stages.refusal import Refusal
from stages.sources.provenance import checksum

T = TypeVar("T")

CONNECTIONS = 4  # files fetched at once
ATTEMPTS = 6  # in a row without a byte gained
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that a later attempt may not meet
FIRST_WAIT_SECONDS = 1  # twice as long each time
LONGEST_WAIT_SECONDS = 300  # the hub's rate limits count windows of five minutes
BLOCK_BYTES = 1 << 20
LINKED_BYTES = 64 << 20  # smaller files are copied, since the stage may write over a configuration or a template


@dataclass(frozen=True)
class Remote:
    """A file to fetch: the name to write it under, its size in bytes, and its sha256, or where only that is known
    (git's own small files) the id of git's blob."""

    name: str
    url: str
    size: int
    sha256: str | None
    blob: str | None = None

    def digest(self):
        """The hash to feed the file's bytes to; its hexdigest should be `sha256 or blob`."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)


class Again(Exception):
    """An attempt failed in a way that the next may not; `seconds` is how long the server asks to wait."""

    def __init__(self, reason: str, seconds: int | None = None):
        super().__init__(reason)
        self.seconds = seconds


class Unanswered(Refusal):
    """No attempt was answered; a later one may be."""


def client(headers: dict[str, str]) -> httpx.Client:
    """A client that sends `headers`. httpx drops Authorization and Cookie where a redirect leads to another host."""
    return httpx.Client(
        headers={"Accept-Encoding": "identity", **headers},  # a compressed body has no byte to go on from
        follow_redirects=True,
        timeout=httpx.Timeout(30, read=60),
    )


def asked_to_wait(response: httpx.Response) -> Again:
    """The passing error that `response` is, with the wait that its headers ask for."""
    asked = response.headers.get("Retry-After", "")
    # RateLimit: "api";r=0;t=55, of draft-ietf-httpapi-ratelimit-headers-09
    found = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", "")) or re.fullmatch(r"(\d+)", asked)
    return Again(f"{response.url.host} answers {response.status_code}", int(found[1]) if found else None)


def patiently(
    what: str,
    attempt: Callable[[], T],
    progress: Callable[[], int] = lambda: 0,
    wait: Callable[[float], object] = lambda seconds: time.sleep(seconds),
) -> T:
    """What `attempt` returns; raises Unanswered when it raises Again too often in a row without any `progress`."""
    failures, before = 0, progress()
    while True:
        try:
            return attempt()
        except Again as error:
            failures = 0 if progress() > before else failures
            before = progress()
            failures += 1
            if failures >= ATTEMPTS:
                times = f", {failures} times in a row" if failures > 1 else ""
                line = f"{what}: {error}{times}; see to the network, and run again"
                raise Unanswered(line) from None
            seconds = min(error.seconds or FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
            tqdm.write(f"{what}: {error}; next attempt in {seconds} s", file=sys.stderr)
            wait(seconds)


def fetch(
    remotes: list[Remote], kept: Path, folder: Path, http: httpx.Client, explain: Callable[[httpx.Response], Refusal]
) -> dict[str, str]:
    """Fill `folder` with `remotes`, going on from what `kept` has of them; return the sha256 of each by its name.

    Large files are hard links to those in `kept`: nothing large is there twice, and a failure later on loses nothing.
    Raises Refusal, with what there is left in `kept`: before anything is fetched when the disk has no room for it, for
    a file that is not what its checksum says, and what `explain` makes of a status that no later attempt will change.
    """
    remotes = sorted(remotes, key=lambda remote: remote.size)  # a repository that may not be read says so at once
    refuse_without_room(kept, _missing_bytes(remotes, kept))
    total = sum(remote.size for remote in remotes)
    stop = threading.Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, mininterval=1.0, disable=None) as bar,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        try:
            found = list(pool.map(lambda remote: _fetch(remote, kept, http, explain, bar, stop), remotes))
        except BaseException:
            stop.set()
            raise
    for remote in remotes:
        _place(remote, kept, folder)
    return dict(sorted(zip((remote.name for remote in remotes), found, strict=True)))


def _place(remote: Remote, kept: Path, folder: Path) -> None:
    if remote.size < LINKED_BYTES:
        shutil.copyfile(kept / remote.name, folder / remote.name)
        return
    try:
        os.link(kept / remote.name, folder / remote.name)
    except OSError:  # not every file system has hard links
        shutil.move(kept / remote.name, folder / remote.name)


def _missing_bytes(remotes: list[Remote], kept: Path) -> int:
    there = {path.name: path.stat().st_size for path in kept.iterdir()}
    return sum(max(remote.size - there.get(remote.name, 0), 0) for remote in remotes)


def _fetch(
    remote: Remote,
    kept: Path,
    http: httpx.Client,
    explain: Callable[[httpx.Response], Refusal],
    bar: tqdm,
    stop: threading.Event,
) -> str:
    """Have the whole of `remote` in `kept`, and return its sha256."""
    path = kept / remote.name
    if stop.is_set():
        return ""
    try:
        with path.open("a+b", buffering=BLOCK_BYTES) as file:
            part = _Part(remote, file, bar, stop)
            if remote.size - part.size > BLOCK_BYTES:
                here = f", of which {part.size / 1e6:,.1f} are here" if part.size else ""
                tqdm.write(f"downloading {remote.name}: {remote.size / 1e6:,.1f} MB{here}", file=sys.stderr)
            patiently(remote.name, lambda: part.complete(http, explain), lambda: part.gained, stop.wait)
    except OSError as error:
        raise Refusal(
            f"{remote.name}: cannot be written: {error.strerror}; make room, and run again to go on from what is here"
        ) from None
    if stop.is_set():
        return ""
    if part.digest.hexdigest() != (remote.sha256 or remote.blob):
        path.unlink()
        raise Refusal(
            f"{remote.name}: came with checksum {part.digest.hexdigest()[:12]}…, and its repository lists "
            f"{(remote.sha256 or remote.blob)[:12]}…: damaged on its way, and deleted; run again to fetch it anew"
        )
    return remote.sha256 or checksum(path)


class _Part:
    """A file as far as it has come, with the hash of that."""

    def __init__(self, remote: Remote, file, bar: tqdm, stop: threading.Event):
        self.remote, self.file, self.bar, self.stop = remote, file, bar, stop
        self.size, self.gained, self.digest = 0, 0, remote.digest()
        file.seek(0)
        while block := file.read(BLOCK_BYTES):
            self._count(block)
        if self.size > remote.size:
            self._restart()

    def complete(self, http: httpx.Client, explain: Callable[[httpx.Response], Refusal]) -> None:
        """Fetch what is missing over one connection; raises Again when that ends early."""
        if self.size == self.remote.size or self.stop.is_set():
            return
        headers = {"Range": f"bytes={self.size}-"} if self.size else {}
        try:
            with http.stream("GET", self.remote.url, headers=headers) as response:
                if response.status_code in PASSING:
                    raise asked_to_wait(response)
                if response.status_code not in (200, 206):
                    response.read()
                    raise explain(response)
                begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                if self.size and (response.status_code == 200 or not begins or int(begins[1]) != self.size):
                    if response.status_code == 206:
                        raise Again(f"{response.url.host} sends another part than asked for")
                    self._restart()  # the server sends the whole, whatever it was asked for
                for block in response.iter_raw():  # given a size, it loses what it has when the connection is cut
                    if self.stop.is_set():
                        return
                    if self.size + len(block) > self.remote.size:
                        raise Refusal(
                            f"{self.remote.name}: is longer than the {self.remote.size} bytes that its repository "
                            "lists; run again later"
                        )
                    self.file.write(block)
                    self.gained += len(block)
                    self._count(block)
                self.file.flush()
        except httpx.RequestError as error:
            raise Again(f"the connection failed ({type(error).__name__})") from None
        if self.size < self.remote.size:
            raise Again("the connection ended early")

    def _count(self, block: bytes) -> None:
        self.size += len(block)
        self.digest.update(block)
        self.bar.update(len(block))

    def _restart(self) -> None:
        self.bar.update(-self.size)
        self.file.truncate(0)
        self.size, self.digest = 0, self.remote.digest()
