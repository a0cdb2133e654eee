"""Questions about a database, answered in SQL; an answer is right when it gives what the reference gives, executed.

Rows bring a question, a query and the name of a database whose tables stand in a file of Spider's form, or the
database's own CREATE TABLE statements, perhaps with INSERT statements: queries are compared on those rows too.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, Field

from stages.conversation import Conversation, Message, conversation
from stages.params import Section
from stages.refusal import Refusal
from stages.rows import Record, Text, listed
from stages.sql.comparison import is_ordered, is_telling, verdict
from stages.sql.difficulty import CLASSES, difficulty
from stages.sql.excerpt import excerpt
from stages.sql.execution import Outcome, Rows, Sandbox
from stages.sql.instances import Instance, fill, given
from stages.sql.normal import complaint, key, normal
from stages.sql.processes import cores, mapped
from stages.sql.schema import Schema, from_ddl, from_spider

HEADLINE = "execution_accuracy"
FACETS = {"difficulty": CLASSES}
SECONDS_A_QUERY = 2.0
ROWS_AT_ONCE = 1000  # a second's work or more where each row brings its own tables


class Columns(Section):
    question: str
    query: str
    schema_: str = Field(alias="schema")


class Options(Section):
    name: Literal["text_to_sql"]
    rows: str
    schemas: str | None
    columns: Columns
    schema_as: Literal["columns", "ddl"]
    instances: int = Field(ge=1, le=100)
    seed: int
    unusable: Literal["refuse", "drop"]

    def files(self) -> dict[str, str]:
        return {"rows": self.rows} | ({"schemas": self.schemas} if self.schemas else {})


class Row(BaseModel):
    question: Text
    query: Text
    schema_: Text = Field(alias="schema")


def conversations(files: dict[str, Iterator[Record]], options: Options) -> Iterator[Conversation | Refusal]:
    """Yield a conversation for each row: the schema and the question, answered by the query in its normal form.

    A row whose SQL SQLite cannot read or run is refused, or where `options.unusable` is drop, its Refusal yielded.
    """
    schemas = {}
    for record in files.get("schemas", ()):
        schema = _placed(record, from_spider, record.fields)
        if schema.name in schemas:
            raise Refusal(f"{record.where}: db_id: {schema.name} is there twice; take one out")
        schemas[schema.name] = schema
    yield from mapped(partial(_found, schemas, options), files["rows"], ROWS_AT_ONCE)


def _found(schemas: dict[str, Schema], options: Options, records: list[Record]) -> list[Conversation | Refusal]:
    return [_kept(record, schemas, options) for record in records]


def _kept(record: Record, schemas: dict[str, Schema], options: Options) -> Conversation | Refusal:
    row = _renamed(record, options.columns).as_row(Row)
    if options.schemas is not None and row.schema_ not in schemas:
        raise Refusal(f"{record.where}: {options.columns.schema_}: {row.schema_} is no database of {options.schemas}")
    try:
        schema = schemas[row.schema_] if options.schemas else _placed(record, _own_schema, row.schema_)
        return _conversation(record.where, row, schema, options)
    except Refusal as refusal:
        if options.unusable == "refuse":
            raise
        return refusal


def _own_schema(text: str) -> Schema:
    """The schema of a row's own statements, whose rows can be inserted."""
    schema = from_ddl(text)
    given(schema)
    return schema


def _conversation(where: str, row: Row, schema: Schema, options: Options) -> Conversation:
    wrong = complaint(row.query, schema)
    if wrong:
        raise Refusal(f"{where}: {options.columns.query}: SQLite says: {wrong}; mend it or leave the row out")
    described = schema.compact() if options.schema_as == "columns" else ";\n".join(schema.ddl())
    prompt = [Message(role="user", content=f"{described}\n\n{row.question.strip()}")]
    identity = schema.name or described
    answer = normal(row.query, schema)
    groups = {"query": f"{identity}: {answer.lower()}", "database": identity}
    context = {"gold": row.query, "schema": schema.model_dump(exclude_defaults=True)}
    return conversation(where, prompt, answer, groups, **context)


def _placed(record: Record, read: Callable[[Any], Schema], source: Any) -> Schema:
    """The schema that `read` makes of `source`, a Refusal of it with the record's place."""
    try:
        return read(source)
    except Refusal as refusal:
        raise Refusal(f"{record.where}: {refusal}") from None


def _renamed(record: Record, columns: Columns) -> Record:
    """The record with the names that Row has for its columns; a missing one is reported under its own name."""
    names = {"question": columns.question, "query": columns.query, "schema": columns.schema_}
    for own in names.values():
        if own not in record.fields:
            there = listed(record.fields)
            raise Refusal(f"{record.where}: {own} is missing; the row has: {there}; see task.columns in params.yaml")
    return Record(record.where, {name: record.fields[own] for name, own in names.items()}, names)


def query(answer: str) -> str:
    """What of an answer is its query: the inside of its ``` fence, else its first line, as every reference is one.

    A model that was not tuned writes on after its query, and would otherwise never have written one.
    """
    text = answer.strip()
    if text.startswith("```"):
        inside = text.split("\n", 1)[1] if "\n" in text else ""
        return inside.split("```", 1)[0].strip()
    return text.split("\n", 1)[0].strip()


def complete(text: str) -> bool:
    """Whether whatever comes after `text` cannot change the query that it holds."""
    text = text.lstrip()
    return text.count("```") > 1 if text.startswith("`") else "\n" in text


def score(conversations: list[Conversation], answers: list[str], options: Options) -> Iterator[dict[str, Any]]:
    """Yield, for each answer: execution_accuracy, whether its result equals the reference's on every instance of the
    schema; valid_sql, whether it ran on all of them; exact_match, whether its normal form is the reference's;
    empty_results, whether the reference shows no value on any instance, so that a wrong answer can equal it.

    Raises Refusal where a reference itself does not run.
    """
    return (scores for scores, _ in score_and_show(conversations, answers, options))


def score_and_show(
    conversations: list[Conversation], answers: list[str], options: Options
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield, for each answer, its scores, and beside them what reference and answer show on one instance: the first on
    which they differ, else the first on which there is something to see."""
    databases = _Databases(conversations, options)
    with Sandbox(SECONDS_A_QUERY) as sandbox:
        for row, answer in zip(conversations, map(query, answers), strict=True):
            schema, instances = databases.of(row)
            gold = _gold(sandbox, instances, row)
            outcomes = sandbox.run_all(instances, answer)
            found = verdict(gold, outcomes, is_ordered(row.context["gold"]))
            scores = {
                "execution_accuracy": found.right,
                "valid_sql": found.valid,
                "exact_match": key(answer, schema) == row.reference.lower(),
                "empty_results": not is_telling(gold),
            }
            place = found.instance
            if place is None:
                place = next((number for number, outcome in enumerate(gold) if is_telling([outcome])), 0)
            yield (
                scores,
                {"instance": place, "reference": excerpt(gold[place]), "answer": excerpt(outcomes[place])},
            )


def unscorable(conversations: Iterable[Conversation], options: Options) -> Iterator[tuple[Conversation, Refusal]]:
    """Yield those rows whose reference does not run on every instance of its schema, with the reason.

    The conversations are gone through several times.
    """
    shares = max(1, min(cores(), sum(1 for _ in conversations) // ROWS_AT_ONCE))
    work = partial(_unscorable, conversations, options, shares)
    found = mapped(work, range(shares), 1) if shares > 1 else work([0])
    for _, row, refusal in sorted(found, key=lambda one: one[0]):
        if options.unusable == "refuse":
            raise refusal
        yield row, refusal


def _unscorable(
    conversations: Iterable[Conversation], options: Options, shares: int, of: list[int]
) -> list[tuple[int, Conversation, Refusal]]:
    """The unscorable rows of these shares of the schemas, each with its place among all rows."""

    def own() -> Iterator[tuple[int, Conversation]]:
        return ((n, row) for n, row in enumerate(conversations) if int(_identity(row), 16) % shares in of)

    found = []
    databases = _Databases((row for _, row in own()), options)
    with Sandbox(SECONDS_A_QUERY) as sandbox:
        for place, row in own():
            _, instances = databases.of(row)
            try:
                _gold(sandbox, instances, row)
            except Refusal as refusal:
                found.append((place, row, refusal))
    return found


def _gold(sandbox: Sandbox, instances: list[Instance], row: Conversation) -> list[Outcome]:
    """What the row's reference shows on each instance; raises Refusal where it does not run on one."""
    gold = sandbox.run_all(instances, row.context["gold"])
    if all(isinstance(outcome, Rows) and not outcome.truncated for outcome in gold):
        return gold
    why = "it returns more rows than are compared"
    if not isinstance(gold[-1], Rows):
        why = getattr(gold[-1], "message", f"it takes over {SECONDS_A_QUERY:g} seconds")
    raise Refusal(f"{row.where}: the reference query does not run: {why}; mend it or leave the row out")


def facets(row: Conversation) -> dict[str, str]:
    """The row's class of each of FACETS, by which scores are broken down."""
    return {"difficulty": difficulty(row.context["gold"])}


class _Databases:
    """Each schema's instances, filled with what all the rows that ask it look for: made when a row first asks for them,
    let go when the last one has."""

    def __init__(self, rows: Iterable[Conversation], options: Options):
        self.options = options
        self.queries: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            self.queries[_identity(row)].append(row.context["gold"])
        self.asked: Counter[str] = Counter()
        self.made: dict[str, tuple[Schema, list[Instance]]] = {}

    def of(self, row: Conversation) -> tuple[Schema, list[Instance]]:
        """The row's schema and its instances; to be asked for once a row."""
        identity = _identity(row)
        if identity not in self.made:
            schema = Schema.model_validate(row.context["schema"])
            instances = fill(schema, self.queries[identity], self.options.seed, self.options.instances)
            self.made[identity] = schema, instances
        self.asked[identity] += 1
        last = self.asked[identity] == len(self.queries[identity])
        return self.made.pop(identity) if last else self.made[identity]


def _identity(row: Conversation) -> str:
    """A digest of the row's schema with what it holds."""
    return hashlib.sha256(json.dumps(row.context["schema"], ensure_ascii=False).encode()).hexdigest()[:32]
