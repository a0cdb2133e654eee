"""Encoded rows as arrays: the file's own numbers, and the packs that lists give."""

import dataclasses
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from stages.encode import SCHEMA
from stages.models.packs import beginning, deal, pack
from stages.models.schedule import schedule
from stages.models.tokens import read_rows
from tests.test_train import write_tokens


def test_rows_are_read_as_they_were_written_whatever_groups_the_file_has(tmp_path):
    rows = write_tokens(tmp_path / "rows.parquet", 23, 0)
    table = pyarrow.Table.from_pylist(rows, SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "groups.parquet", row_group_size=5)
    for name in ("rows", "groups"):
        found = read_rows(tmp_path / f"{name}.parquet")
        assert all(isinstance(row["labels"], np.ndarray) and row["input_ids"].dtype == np.int32 for row in found)
        assert [{**row, "input_ids": [*row["input_ids"]], "labels": [*row["labels"]]} for row in found] == rows


def test_arrays_give_the_packs_the_shares_and_the_schedule_of_lists(tmp_path):
    lists = write_tokens(tmp_path / "rows.parquet", 60, 3)
    arrays = read_rows(tmp_path / "rows.parquet")
    for size in (60, 200, 5000):
        packs = [pack(rows, size) for rows in (lists, arrays)]
        for one, other in zip(*packs, strict=True):
            for field in dataclasses.fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        shares = [[[row["id"] for row in share] for share in deal(rows, 3, size)] for rows in (lists, arrays)]
        assert shares[0] == shares[1]
    assert schedule(lists, 4, 2.0, 0, "shared") == schedule(arrays, 4, 2.0, 0, "shared")


def test_rows_are_sorted_as_their_tokens_are_large_ones_too(tmp_path):
    chance = random.Random(0)
    ids = [[chance.choice((3, 255, 256, 70_000, 262_143)) for _ in range(chance.randint(1, 4))] for _ in range(200)]
    rows = [{"id": str(one), "input_ids": one, "labels": one, "prompt_tokens": 0} for one in ids]
    assert [row["input_ids"] for row in sorted(rows, key=beginning)] == sorted(ids)
