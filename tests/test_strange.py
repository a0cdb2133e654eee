"""Files that nobody meant are read or refused in one line; what is written and read again is the same.

Seconds of it, always the same inputs; `python -m bench.fuzz` goes on for as long as it is told to.
"""

import csv
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import rows
from stages.models import shards
from stages.outputs import write_jsonl
from stages.rows import NUL
from stages.sql.schema import Link, Schema, from_ddl
from tests.strange import PARSERS, VALUES, _encodes

HERE = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


@pytest.mark.parametrize("name", PARSERS)
def test_a_file_that_nobody_meant_is_read_or_refused_in_one_line_that_names_it(name, tmp_path):
    parser = PARSERS[name]
    HERE(hypothesis.given(parser.contents)(lambda content: parser.try_on(content, tmp_path)))()


# Text that a file of its encoding can hold, and a reader gives back.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=NUL), max_size=10)
LINES = TEXT.map(lambda text: text.replace("\r", ""))


def written(folder: Path, suffix: str, of: list[dict]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, iter(of))
    elif suffix == ".json":
        path.write_text(json.dumps(of), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(of[0]))
            writer.writeheader()
            writer.writerows(of)
    else:
        pq.write_table(pa.Table.from_pylist(of), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_written_and_read_again_are_the_same(suffix, tmp_path):
    @HERE
    @hypothesis.given(st.lists(st.fixed_dictionaries({"q": TEXT, "r ": LINES}), min_size=1, max_size=5))
    def same(of):
        assert [record.fields for record in rows.read(written(tmp_path, suffix, of))] == of

    same()


def test_nested_values_written_as_json_lines_and_read_again_are_the_same(tmp_path):
    def sound(value) -> bool:
        text = json.dumps(value, ensure_ascii=False)
        return "NaN" not in text and "Infinity" not in text and _encodes(text) and len(text) < 4000

    @HERE
    @hypothesis.given(st.dictionaries(TEXT, VALUES, max_size=3).filter(sound))
    def same(row):
        assert next(rows.read(written(tmp_path, ".jsonl", [row]))).fields == row

    same()


NAMES = st.from_regex(r"[A-Za-z_ \"'é-]{1,6}", fullmatch=True).filter(
    lambda name: name.strip() and not name.lower().startswith("sqlite_")
)
COLUMNS = st.dictionaries(NAMES, st.sampled_from(["text", "number", "time", "boolean"]), min_size=1, max_size=3)


def test_a_schema_written_as_sql_and_read_again_is_the_same():
    def distinct(names) -> bool:
        return len({name.lower() for name in names}) == len(names)

    @HERE
    @hypothesis.given(st.dictionaries(NAMES, COLUMNS.filter(distinct), min_size=1, max_size=3).filter(distinct))
    def same(tables):
        keys = {table: [next(iter(columns))] for table, columns in tables.items()}
        first, last = next(iter(tables)), list(tables)[-1]
        link = Link(table=last, column=list(tables[last])[-1], to_table=first, to_column=keys[first][0])
        schema = Schema(tables=tables, primary_keys=keys, foreign_keys=[link])
        assert from_ddl(";\n".join(schema.ddl())) == schema

    same()


def test_tensors_written_and_read_again_are_the_same(tmp_path):
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)

    @HERE
    @hypothesis.given(
        st.dictionaries(TEXT.filter(bool), shapes, min_size=1, max_size=3), st.sampled_from(["F32", "BF16"])
    )
    def same(of, dtype):
        tensors = {name: torch.rand(shape).to(shards.DTYPES[dtype]) for name, shape in of.items()}
        path = tmp_path / "x.safetensors"
        places = {name: shards.Stored(path, dtype, shape, 0) for name, shape in of.items()}
        shards.write_shard(path, places, lambda name: [tensors[name]])
        found = shards.stored(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name].tensor(), tensors[name]) for name in tensors)

    same()
