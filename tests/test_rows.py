"""Rows of every form, and for each way that a file can be broken the one line that says where."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from stages import rows
from stages.refusal import Refusal
from stages.rows import Record, Text


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, table: pa.Table | None = None) -> bytes:
    pq.write_table(table or pa.Table.from_pylist([{"quote": "a\nb", "likes": n} for n in range(2500)]), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.jsonl", '{"q": 1}\n\n{"q": "ü\u2028x"}', [("line 1", {"q": 1}), ("line 3", {"q": "ü\u2028x"})]),
        ("a.jsonl", b'\xef\xbb\xbf{"q": 1}\r\n{"q": 2}\r\n', [("line 1", {"q": 1}), ("line 2", {"q": 2})]),
        ("A.JSONL", '{"q": "\\ud83d\\ude00"}\n', [("line 1", {"q": "😀"})]),
        ("a.json", '[{"q": 1},\n {"q": [2, {"z": null}]}]', [("row 1", {"q": 1}), ("row 2", {"q": [2, {"z": None}]})]),
        ("a.json", b'\xef\xbb\xbf[{"q": 1}]', [("row 1", {"q": 1})]),
        (
            "a.csv",
            'q,r\n1,"x, ""y""\nz"\n\n2,w',
            [("line 2", {"q": "1", "r": 'x, "y"\nz'}), ("line 5", {"q": "2", "r": "w"})],
        ),
        ("a.csv", b"\xef\xbb\xbfq,r\r\n1,\r\n", [("line 2", {"q": "1", "r": ""})]),
        ("art", "a\nb\n  -- C\n%\nd\n", [("line 1", {"text": "a\nb\n  -- C\n"}), ("line 5", {"text": "d\n"})]),
        ("art", "a\r\n%\r\nb\r\n%\r\n", [("line 1", {"text": "a\n"}), ("line 3", {"text": "b\n"})]),
    ],
)
def test_rows_are_read_with_the_place_they_came_from(name, content, found, tmp_path):
    path = write(tmp_path, name, content)
    assert list(rows.read(path)) == [Record(f"{name} {where}", fields) for where, fields in found]


def test_parquet_is_read_batch_by_batch_and_rows_are_counted_through(tmp_path):
    parquet(tmp_path / "a.parquet")
    found = list(rows.read(tmp_path / "a.parquet"))
    assert found[0] == Record("a.parquet row 1", {"quote": "a\nb", "likes": 0})
    assert found[-1] == Record("a.parquet row 2500", {"quote": "a\nb", "likes": 2499})


def test_a_long_field_of_a_csv_file_is_read_whole(tmp_path):
    path = write(tmp_path, "a.csv", "q\n" + "x" * 500_000 + "\n")
    assert len(next(rows.read(path)).fields["q"]) == 500_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"q": 1}\n{q: 1}\n', "a.jsonl line 2: column 2 is not JSON: "),
        ("a.jsonl", '{"q": 1}\n{"q": ', "a.jsonl line 2: column 7 is not JSON: "),
        ("a.jsonl", '{"q": 1}{"q": 2}\n', "a.jsonl line 1: column 9 is not JSON: Extra data"),
        ("a.jsonl", '{"q": NaN}', "a.jsonl line 1: NaN is not JSON; write null or leave the row out"),
        ("a.jsonl", '{"q": -Infinity}', "a.jsonl line 1: -Infinity is not JSON; write null or leave the row out"),
        ("a.jsonl", '{"q": 1}\n["q"]\n', "a.jsonl line 2: holds a list where fields belong; write it as {…}"),
        ("a.jsonl", "null", "a.jsonl line 1: holds null where fields belong; write it as {…}"),
        ("a.jsonl", '"text"', "a.jsonl line 1: holds text where fields belong; write it as {…}"),
        ("a.jsonl", '{"q": 1, "q": 2}', "a.jsonl line 1: the field q is there twice; take one out"),
        ("a.jsonl", '{"q": ' + "[" * 99_999 + "]" * 99_999 + "}", "a.jsonl line 1: nested too deep to be a row"),
        ("a.jsonl", '{"q": "\\ud800"}', "a.jsonl line 1: holds half of a surrogate pair, which is no character; "),
        ("a.jsonl", b'{"q": 1}\n' * 9000 + b'{"q": "\xe9"}\n', "a.jsonl line 9001: is not UTF-8; save the file as"),
        ("a.jsonl", '{"q": 1}'.encode("utf-16"), "a.jsonl line 1: is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", "", "a.jsonl: holds no rows; see task and data in params.yaml"),
        ("a.jsonl", "\n \n", "a.jsonl: holds no rows"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.json", "", "a.json line 1: column 1 is not JSON: "),
        ("a.json", '{"q": 1}', "a.json: a .json file must hold a list of rows; one row a line is .jsonl"),
        ("a.json", '{"q": 1}\n{"q": 2}\n', "a.json line 2: column 1 is not JSON: Extra data; one row a line is .jsonl"),
        ("a.json", '[{"q": 1},\n{"q": }]', "a.json row 2 line 2: column 7 is not JSON: "),
        ("a.json", '[{"q": 1}, 3]', "a.json row 2: holds a number where fields belong; write it as {…}"),
        ("a.csv", "", "a.csv: holds no rows"),
        ("a.csv", "q,r\n", "a.csv: holds no rows"),
        ("a.csv", "q,r\n1,2\n1,2,3\n", "a.csv line 3: has 3 fields and the header has 2; quote the commas inside"),
        ("a.csv", 'q,r\n"1\n1",2\n1\n', "a.csv line 4: has 1 fields and the header has 2; mend it"),
        ("a.csv", "q,r,q\n1,2,3\n", "a.csv line 1: the column q is there twice; rename one"),
        ("a.csv", 'q,r\n1,2\n1,"2\n3,4\n', "a.csv line 3: is not CSV: unexpected end of data; mend it or leave"),
        ("a.csv", 'q,r\n1,"2"x\n', "a.csv line 2: is not CSV: "),
        ("a.csv", "q,r\n1,\0\n", "a.csv line 2: "),
        ("a.csv", b"q,r\n1,\xe9\n", "a.csv line 2: is not UTF-8"),
        ("a.parquet", b"", "a.parquet: cannot be read as Parquet after row 0: "),
        ("a.parquet", b"PAR1 and then nothing of the kind", "a.parquet: cannot be read as Parquet after row 0: "),
        ("art", "", "art: holds no rows"),
        ("art", b"a\n%\n\xe9\n", "art line 3: is not UTF-8"),
        ("a.tsv", "q\tr\n", ".tsv files cannot be read; use .jsonl, .json, .csv or .parquet"),
        ("a.jsonl.gz", "", ".gz files cannot be read; use .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_its_place(name, content, said, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(Refusal) as refused:
        list(rows.read(path))
    assert str(refused.value).removeprefix(f"{path}: ").startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_a_truncated_parquet_file_is_refused(kept, tmp_path):
    whole = parquet(tmp_path / "whole.parquet")
    path = write(tmp_path, "cut.parquet", whole[: int(len(whole) * kept)])
    with pytest.raises(Refusal, match=r"^cut.parquet: cannot be read as Parquet after row 0: .*; write it anew$"):
        list(rows.read(path))


def test_a_parquet_file_with_damaged_pages_is_refused(tmp_path):
    damaged = bytearray(parquet(tmp_path / "whole.parquet"))
    damaged[8:60] = b"\xff" * 52
    path = write(tmp_path, "damaged.parquet", bytes(damaged))
    with pytest.raises(Refusal, match=r"^damaged.parquet: cannot be read as Parquet after row"):
        list(rows.read(path))


def test_two_columns_of_one_name_in_a_parquet_file_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", pa.table([pa.array([1]), pa.array([2])], names=["q", "q"]))
    with pytest.raises(Refusal, match=r"^a.parquet: the column q is there twice; rename one$"):
        list(rows.read(tmp_path / "a.parquet"))


def test_a_missing_file_is_refused_with_those_there_are(tmp_path):
    write(tmp_path, "mine.jsonl", "{}")
    with pytest.raises(Refusal, match=r"nine.jsonl: there is no such file; .* holds: mine.jsonl; see task and data in"):
        list(rows.read(tmp_path / "nine.jsonl"))
    with pytest.raises(Refusal, match=r"there is no such file; .* holds: nothing; "):
        list(rows.read(tmp_path / "none" / "nine.jsonl"))
    with pytest.raises(Refusal, match=r"there is no such file"):
        list(rows.read(tmp_path))


class Row(BaseModel):
    quote: Text
    likes: int = 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"qoute": "x", "likes": 1}, "a.jsonl line 7: quote is missing; the row has: likes, qoute"),
        ({"quote": None}, "a.jsonl line 7: quote should be a valid string, it is None; mend it or leave the row out"),
        ({"quote": " \n"}, "a.jsonl line 7: quote should not be blank, it is ' \\n'; mend it or leave the row out"),
        ({"quote": "x", "likes": "many"}, "a.jsonl line 7: likes should be a valid integer, "),
        ({"quote": ["x" * 999]}, f"a.jsonl line 7: quote should be a valid string, it is ['{'x' * 38}…; mend it"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_line_and_field(fields, said):
    with pytest.raises(Refusal) as refused:
        Record("a.jsonl line 7", fields).as_row(Row)
    assert str(refused.value).startswith(said)


def test_a_row_that_fits_comes_back_typed():
    assert Record("a.jsonl line 7", json.loads('{"quote": " x ", "other": 1}')).as_row(Row) == Row(quote=" x ", likes=0)
