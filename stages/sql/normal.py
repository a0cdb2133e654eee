"""A query's normal form: one text for all the ways to write the same query, for grouping, training and exact match."""

import re
import sqlite3
from functools import lru_cache
from typing import ClassVar

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.generators.sqlite import SQLiteGenerator

from stages.sql import scope, worker
from stages.sql.schema import Schema, quoted

# Past these no question is answered by it, and parsers take their time over it: sqlglot's recurses.
MAX_CHARACTERS = 10_000
MAX_DEPTH = 30

# Something in quotes, which stays, or what may stand between two words.
_BETWEEN = re.compile(
    r"""('(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*\])|(?:--[^\n]*|/\*.*?(?:\*/|\Z)|\s+)+""", re.DOTALL
)


class _Generator(SQLiteGenerator):
    """Spider's usual spelling where sqlglot has another: `x NOT IN …`, `x IS NOT NULL`, `!=`, SUBSTR, `FROM a, b`."""

    # a method below is asked only for what the table of functions does not name
    TRANSFORMS: ClassVar = {kind: how for kind, how in SQLiteGenerator.TRANSFORMS.items() if kind is not exp.Substring}

    def not_sql(self, expression: exp.Not) -> str:
        inner = expression.this
        if isinstance(inner, (exp.In, exp.Between, exp.Is)):
            word = {exp.In: " IN ", exp.Between: " BETWEEN ", exp.Is: " IS "}[type(inner)]
            new = {exp.In: " NOT IN ", exp.Between: " NOT BETWEEN ", exp.Is: " IS NOT "}[type(inner)]
            left, text = self.sql(inner, "this"), self.sql(inner)
            if text.startswith(left + word):
                return left + new + text[len(left + word) :]
        return super().not_sql(expression)

    def neq_sql(self, expression: exp.NEQ) -> str:
        return self.binary(expression, "!=")

    def substring_sql(self, expression: exp.Substring) -> str:
        return self.func("SUBSTR", expression.this, expression.args.get("start"), expression.args.get("length"))

    def ordered_sql(self, expression: exp.Ordered) -> str:
        if expression.args.get("desc") is False:
            expression.set("desc", None)
        return super().ordered_sql(expression)


def complaint(query: str, schema: Schema) -> str | None:
    """What SQLite, or the sandbox in which it will run, says against a query before running it; None where neither
    does."""
    try:
        _empty(tuple(schema.ddl(keys=False))).execute(f"EXPLAIN {collapsed(query)}").close()
    except (sqlite3.Error, sqlite3.Warning) as error:
        return str(error)
    return None


def key(query: str, schema: Schema) -> str:
    """What the paraphrases of one question have in common: the normal form, literals kept, in lower case."""
    return normal(query, schema).lower()


def normal(query: str, schema: Schema) -> str:
    """The query's normal form; where sqlglot cannot read it, the query with its whitespace collapsed.

    A function of the text alone: what the machine's own SQLite makes of it would differ from version to version, and
    with it the split. That it does not change the meaning is the tests' matter.
    """
    plain = collapsed(query)
    if len(plain) > MAX_CHARACTERS or _depth(plain) > MAX_DEPTH:
        return plain
    tree = parsed(plain)
    if not isinstance(tree, exp.Query):
        return plain
    try:
        for column in list(tree.find_all(exp.Column)):
            _resolve(column, schema)
        for table in tree.find_all(exp.Table):
            _name_table(table, schema)
        for identifier in tree.find_all(exp.Identifier):
            identifier.set("quoted", quoted(identifier.name) != identifier.name)
        return _Generator(dialect="sqlite", comments=False).generate(tree, copy=False)
    except (SqlglotError, RecursionError):
        return plain


def parsed(query: str) -> exp.Expression | None:
    """The one statement that the text is, or None where sqlglot reads no one statement in it."""
    try:
        statements = sqlglot.parse(query, dialect="sqlite")
    except (SqlglotError, RecursionError):
        return None
    return statements[0] if len(statements) == 1 else None


def collapsed(query: str) -> str:
    """The query on one line: outside quotes, whitespace and comments are one space; the last semicolons are gone."""
    return _BETWEEN.sub(lambda found: found[1] or " ", query).strip().rstrip("; ")


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _resolve(column: exp.Column, schema: Schema) -> None:
    """Put a column's name and qualifier into the schema's case, or make the string of it that SQLite takes it for."""
    if not isinstance(column.this, exp.Identifier):  # T1.*, or a literal where a name belongs
        return
    where = scope.place(column, schema)
    if where is not None:
        column.this.set("this", where.column)
    else:
        selects = scope.enclosing(column)
        named = next((names[column.name.lower()] for names in map(scope.aliases, selects) if _in(column, names)), None)
        if named is not None:
            column.this.set("this", named)
        elif column.this.quoted and not column.table:
            column.replace(exp.Literal.string(column.name))
            return
    if column.table:
        column.set("table", exp.to_identifier(_qualifier(column, schema)))


def _in(column: exp.Column, names: dict[str, str]) -> bool:
    return not column.table and column.name.lower() in names


def _qualifier(column: exp.Column, schema: Schema) -> str:
    for select in scope.enclosing(column):
        source = scope.sources(select, schema).get(column.table.lower())
        if source is not None:
            named = source.alias.lower() != (source.table or "").lower()
            return _alias(source.alias) if named else source.table or source.alias
    return column.table


def _alias(name: str) -> str:
    """Spider's T1, T2, … in capitals, any other alias as it is."""
    return name.upper() if name[:1] in "tT" and name[1:].isdigit() else name


def _name_table(table: exp.Table, schema: Schema) -> None:
    own = schema.table_names.get(table.name.lower())
    if own is not None and isinstance(table.this, exp.Identifier):
        table.this.set("this", own)
    if table.alias:
        table.args["alias"].this.set("this", _alias(table.alias))


@lru_cache(maxsize=64)
def _empty(ddl: tuple[str, ...]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    for statement in ddl:
        database.execute(statement)
    worker.confine(database)
    return database
