"""Rows of a JSONL, JSON, CSV, Parquet or fortune file, each with the place it came from."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from stages.refusal import Refusal

R = TypeVar("R", bound=BaseModel)


def _written(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "should not be blank")
    return text


Text = Annotated[str, AfterValidator(_written)]  # for a row's field that may not be left empty


@dataclass(frozen=True)
class Record:
    """One row as the file has it, and where: "dev.json row 17", "mine.jsonl line 3"."""

    where: str
    fields: dict[str, Any]

    def as_row(self, model: type[R]) -> R:
        """The row checked against `model`; raises Refusal, naming file, row and field."""
        try:
            return model.model_validate(self.fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the row"
            if first["type"] == "missing":
                there = ", ".join(sorted(map(str, self.fields))[:12])
                raise Refusal(f"{self.where}: {field} is missing; the row has: {there}") from None
            wanted = first["msg"].removeprefix("Input ").removeprefix("String ")
            found = repr(first["input"])
            found = found if len(found) <= 40 else f"{found[:40]}…"
            raise Refusal(f"{self.where}: {field} {wanted}, it is {found}; mend it or leave the row out") from None


def read(path: Path) -> Iterator[Record]:
    """Yield the rows of `path`, whose ending tells the form; memory is flat for JSONL, CSV and Parquet.

    Raises Refusal, naming the file and the line or row, for what cannot be read, and for a file without rows.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, "": _fortune}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Refusal(f"{path}: {path.suffix} files cannot be read; use .jsonl, .json, .csv or .parquet")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:12]) if path.parent.is_dir() else "nothing"
        raise Refusal(f"{path}: there is no such file; {path.parent} holds: {there}; see task and data in params.yaml")
    empty = True
    try:
        for record in reader(path):
            empty = False
            yield record
    except UnicodeDecodeError:
        raise Refusal(f"{path.name} line {_undecodable(path)}: is not UTF-8; save the file as UTF-8") from None
    if empty:
        raise Refusal(f"{path.name}: holds no rows; see task and data in params.yaml")


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8; the exception only knows its place in a buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8")


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield Record(where, _mapping(where, _parse(where, line)))


def _json(path: Path) -> Iterator[Record]:
    rows = _parse(path.name, path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise Refusal(f"{path.name}: a .json file must hold a list of rows; one row a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        where = f"{path.name} row {number}"
        yield Record(where, _mapping(where, row))


def _parse(where: str, text: str) -> Any:
    def refuse(constant: str) -> None:
        raise Refusal(f"{where}: {constant} is not JSON; write null or leave the row out")

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = next(name for name in row if [key for key, _ in pairs].count(name) > 1)
            raise Refusal(f"{where}: the field {twice} is there twice; take one out")
        return row

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=fields)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = "" if " line " in where else f" line {error.lineno}"
        hint = "; one row a line is .jsonl" if line and error.msg == "Extra data" else "; mend it or leave the row out"
        raise Refusal(f"{where}{line}: column {error.colno} is not JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise Refusal(f"{where}: nested too deep to be a row; leave it out") from None
    except UnicodeEncodeError:
        raise Refusal(f"{where}: holds half of a surrogate pair, which is no character; mend it") from None
    except ValueError:
        raise Refusal(f"{where}: holds a number of thousands of digits; mend it or leave the row out") from None
    return value


def _mapping(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "a list", str: "text", type(None): "null", bool: "a truth value"}.get(type(row), "a number")
        raise Refusal(f"{where}: holds {kind} where fields belong; write it as {{…}}")
    return row


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        where = f"{path.name} line 1"
        try:
            header = next(reader, [])
            _refuse_twins(where, header)
            while True:
                where = f"{path.name} line {reader.line_num + 1}"  # where the row begins, that may have several
                row = next(reader, None)
                if row is None:
                    return
                if any("\0" in field for field in row):
                    raise Refusal(f"{where}: holds a NUL byte; mend it or leave the row out")
                if row and len(row) != len(header):
                    remedy = "quote the commas inside fields" if len(row) > len(header) else "mend it"
                    raise Refusal(f"{where}: has {len(row)} fields and the header has {len(header)}; {remedy}")
                if row:
                    yield Record(where, dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise Refusal(f"{where}: is not CSV: {error}; mend it or leave the row out") from None


def _refuse_twins(where: str, names: list[str]) -> None:
    twins = [name for number, name in enumerate(names) if name in names[:number]]
    if twins:
        raise Refusal(f"{where}: the column {twins[0]} is there twice; rename one")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _refuse_twins(path.name, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path.name} row {number}", row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Refusal(f"{path.name}: cannot be read as Parquet after row {number}: {error}; write it anew") from None


def _fortune(path: Path) -> Iterator[Record]:
    """The form of fortune(6): texts of several lines, a line with % alone between them."""
    lines: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.rstrip("\n") != "%":
                lines.append(line)
                continue
            yield Record(f"{path.name} line {start}", {"text": "".join(lines)})
            lines, start = [], number + 1
    if lines:
        yield Record(f"{path.name} line {start}", {"text": "".join(lines)})
