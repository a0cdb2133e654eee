"""Rows of a JSONL, JSON, CSV, Parquet or fortune file, each with the place it came from."""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from stages.refusal import Refusal

R = TypeVar("R", bound=BaseModel)

# Characters a row may have. No model reads as much at once; a file without line ends would fill the memory.
LONGEST = 1 << 24
NUL = "\0"  # what is left of UTF-16 read as something else, or of a file that was never written to its end
JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _sound(text: str) -> str:
    if NUL in text:
        raise PydanticCustomError("nul", "should hold no NUL character")
    return text


def _written(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "should not be blank")
    return text


Words = Annotated[str, AfterValidator(_sound)]  # for a row's field that may be left empty
Text = Annotated[Words, AfterValidator(_written)]  # for one that may not


@dataclass(frozen=True)
class Record:
    """One row as the file has it, and where: "dev.json row 17", "mine.jsonl line 3".

    `names` holds what the file calls a field that has another name in `fields`.
    """

    where: str
    fields: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)

    def as_row(self, model: type[R]) -> R:
        """The row checked against `model`; raises Refusal, naming file, row and field."""
        try:
            return model.model_validate(self.fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = [self.names.get(str(part), str(part)) for part in first["loc"]]
            name = shown(".".join(place)) or "the row"
            if first["type"] == "missing":
                owner = ".".join(place[:-1]) or "the row"
                raise Refusal(f"{self.where}: {name} is missing; {owner} has: {listed(first['input'])}") from None
            if first["type"] == "extra_forbidden":
                raise Refusal(f"{self.where}: {name} is not known here; take it out") from None
            wanted = re.sub(r"^(Input|String|List) | after validation.*", "", first["msg"])
            wanted = wanted.replace("dictionary or instance of Message", "{role, content}")
            raise Refusal(
                f"{self.where}: {name} {wanted}, it is {_quoted(first['input'])}; mend it or leave the row out"
            ) from None


def listed(names: Iterable[Any]) -> str:
    """Names out of a file, for people: a dozen at most, each on one line."""
    return ", ".join(sorted(map(shown, names))[:12])


def shown(name: Any) -> str:
    """A name out of a file as a terminal can show it: what is long is cut, what it would act on is escaped."""
    text = str(name)
    return text[:60] + "…" * (len(text) > 60) if text.isprintable() and text == text.strip() != "" else _quoted(text)


def _quoted(value: Any) -> str:
    # neither the whole of a text of megabytes, nor what lies thousands of lists deep
    try:
        text = repr(value[:50] if isinstance(value, (str, bytes, list)) else value)
    except RecursionError:
        return "nested too deep to be shown"
    return text if len(text) <= 40 else f"{text[:40]}…"


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


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The file's lines; raises Refusal at one that is longer than a row can be, without reading it whole."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise Refusal(f"{path.name} line {number}: {_TOO_LONG}")
        yield line


_TOO_LONG = f"is longer than {LONGEST >> 20} million characters; cut it or leave the row out"


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if number == 1 and line.lstrip().startswith("["):
                raise Refusal(f"{path.name} line 1: begins a list; rows in a list are a .json file: rename it")
            if line.strip():
                where = f"{path.name} line {number}"
                row, end = _parse(where, line, JSON_SPACE.match(line).end())
                end = JSON_SPACE.match(line, end).end()
                if end < len(line):
                    raise _not_json(where, line, end, "Extra data")
                yield Record(where, _mapping(where, row))


def _json(path: Path) -> Iterator[Record]:
    """The rows of a list one by one, so that each is named by its number, and no more than one is unpacked."""
    text = path.read_text(encoding="utf-8-sig")
    place, number = JSON_SPACE.match(text).end(), 0
    if text[place : place + 1] != "[":
        _, end = _parse(path.name, text, place)
        if text[end:].strip():
            raise _not_json(path.name, text, JSON_SPACE.match(text, end).end(), "Extra data")
        raise Refusal(f"{path.name}: a .json file must hold a list of rows; one row a line is .jsonl")
    place = JSON_SPACE.match(text, place + 1).end()
    while number or text[place : place + 1] != "]":
        number += 1
        where = f"{path.name} row {number}"
        row, end = _parse(where, text, place)
        yield Record(where, _mapping(where, row))
        end = JSON_SPACE.match(text, end).end()
        if text[end : end + 1] == "]":
            place = end
            break
        if text[end : end + 1] != ",":
            raise _not_json(where, text, end, "Expecting ',' or ']'")
        place = JSON_SPACE.match(text, end + 1).end()
    if text[place + 1 :].strip():
        raise _not_json(path.name, text, JSON_SPACE.match(text, place + 1).end(), "Extra data")


class _NotARow(ValueError):
    """JSON as Python reads it, or as it is written, that is no row."""


def _refuse_constant(constant: str) -> None:
    raise _NotARow(f"{constant} is not JSON; write null or leave the row out")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name in row if [key for key, _ in pairs].count(name) > 1)
        raise _NotARow(f"the field {shown(twice)} is there twice; take one out")
    return row


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_fields)


def _parse(where: str, text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at `place`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, place)
        if end - place > LONGEST:
            raise _NotARow(_TOO_LONG)
        if text.find("\\ud", place, end) >= 0 or text.find("\\uD", place, end) >= 0:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _not_json(where, text, error.pos, error.msg) from None
    except RecursionError:
        raise Refusal(f"{where}: nested too deep to be a row; leave it out") from None
    except UnicodeEncodeError:
        raise Refusal(f"{where}: holds half of a surrogate pair, which is no character; mend it") from None
    except _NotARow as error:
        raise Refusal(f"{where}: {error}") from None
    except ValueError:
        raise Refusal(f"{where}: holds a number of thousands of digits; mend it or leave the row out") from None
    return value, end


def _not_json(where: str, text: str, place: int, problem: str) -> Refusal:
    line = "" if " line " in where else f" line {text.count(chr(10), 0, place) + 1}"
    column = place - text.rfind("\n", 0, place)
    hint = "; one row a line is .jsonl" if line and problem == "Extra data" else "; mend it or leave the row out"
    return Refusal(f"{where}{line}: column {column} is not JSON: {problem.removesuffix(' at')}{hint}")


def _mapping(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "a list", str: "text", type(None): "null", bool: "a truth value"}.get(type(row), "a number")
        raise Refusal(f"{where}: holds {kind} where fields belong; write it as {{…}}")
    return row


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), strict=True)
        where = f"{path.name} line 1"
        try:
            header = next(reader, [])
            _refuse_twins(where, header)
            while True:
                where = f"{path.name} line {reader.line_num + 1}"  # where the row begins, that may have several
                row = next(reader, None)
                if row is None:
                    return
                if any(NUL in text for text in row):
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
        raise Refusal(f"{where}: the column {shown(twins[0])} is there twice; rename one")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _refuse_twins(path.name, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1000):
            for row in _cells(path.name, number, batch):
                number += 1
                yield Record(f"{path.name} row {number}", row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Refusal(f"{path.name}: cannot be read as Parquet after row {number}: {error}; write it anew") from None


def _cells(name: str, above: int, batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch, `above` rows into the file, in Python's types."""
    # OverflowError: a date that Python has no room for; LookupError: a time zone that this machine does not know
    wrong = (ValueError, OverflowError, LookupError)
    try:
        rows = batch.to_pylist()
    except wrong:
        for place, column in itertools.product(range(batch.num_rows), batch.schema.names):
            try:
                batch.column(column)[place].as_py()
            except wrong as error:
                where = f"{name} row {above + place + 1}: {shown(column)}"
                raise Refusal(f"{where} cannot be read: {error}; mend it or leave the column out") from None
        raise
    if batch.nbytes > LONGEST:
        for place, row in enumerate(rows, start=above + 1):
            if sum(len(cell) for cell in row.values() if isinstance(cell, (str, bytes))) > LONGEST:
                raise Refusal(f"{name} row {place}: {_TOO_LONG}")
    return rows


def _fortune(path: Path) -> Iterator[Record]:
    """The form of fortune(6): texts of several lines, a line with % alone between them."""
    lines: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if line.rstrip("\n") != "%":
                lines.append(line)
                continue
            yield Record(f"{path.name} line {start}", {"text": "".join(lines)})
            lines, start = [], number + 1
    if lines:
        yield Record(f"{path.name} line {start}", {"text": "".join(lines)})
