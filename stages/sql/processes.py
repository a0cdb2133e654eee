"""Work over many rows, whose SQL is to be parsed and run, on all cores: rows in, what became of them out, in order."""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from stages.refusal import Refusal
from stages.sql import worker

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mapped(work: Callable[[list[T]], list[R]], items: Iterable[T], size: int) -> Iterator[R]:
    """Yield what `work` makes of the items, given `size` of them at a time: here where they are fewer, else in a
    process for each core. Few batches are held at once.

    A Refusal that `items` or `work` raises comes after the results of the items before it, as it would without
    processes.
    """
    items = iter(items)
    batch, refusal = _taken(items, size)
    if len(batch) < size:
        yield from work(batch)
    else:
        # spawn: a reader of Parquet has threads, which do not live through a fork
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(cores(), context, worker.die_with_parent, (os.getpid(),))
        try:
            pending = deque([pool.submit(work, batch)])
            while pending:
                while batch and refusal is None and len(pending) <= cores():
                    batch, refusal = _taken(items, size)
                    pending.append(pool.submit(work, batch))
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if refusal is not None:
        raise refusal


def _taken(items: Iterator[T], size: int) -> tuple[list[T], Refusal | None]:
    """The next items, and the Refusal that came after them where one did."""
    batch: list[T] = []  # filled one by one: what was read before a refusal counts
    try:
        for item in itertools.islice(items, size):
            batch.append(item)
    except Refusal as refusal:
        return batch, refusal
    return batch, None
