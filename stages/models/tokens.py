"""A file of encoded rows in; the rows out, their tokens as they lie in Arrow's memory: 8 bytes each with its label."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet


def read_rows(path: Path) -> list[dict]:
    """Every row's id, input_ids and labels (int32 [T] both, not to be written to) and prompt_tokens."""
    own = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # mimalloc keeps as much again for itself
    try:
        table = pyarrow.parquet.read_table(path)
    finally:
        pyarrow.set_memory_pool(own)
    rows = []
    for batch in table.to_batches():
        columns = (_lists(batch.column(name)) for name in ("input_ids", "labels"))
        others = (batch.column(name).to_pylist() for name in ("id", "prompt_tokens"))
        for ids, labels, name, prompt_tokens in zip(*columns, *others, strict=True):
            rows.append({"id": name, "input_ids": ids, "labels": labels, "prompt_tokens": prompt_tokens})
    return rows


def _lists(column: pyarrow.ListArray) -> list[np.ndarray]:
    values, ends = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[start:end] for start, end in itertools.pairwise(ends)]
