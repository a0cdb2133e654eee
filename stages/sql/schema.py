"""A database's schema, from Spider's tables.json or from CREATE TABLE statements, and its two forms in a prompt."""

import re
from functools import cached_property
from typing import Any, Literal, TypeAlias

import sqlglot
from pydantic import BaseModel, ConfigDict
from sqlglot import exp
from sqlglot.errors import SqlglotError

from stages.refusal import Refusal

Kind: TypeAlias = Literal["text", "number", "time", "boolean", "others"]

# NUMERIC affinity for all but text, as in Spider's own databases: a date stays text, a year becomes an integer
# (https://sqlite.org/datatype3.html#determination_of_column_affinity).
_DECLARED = {"text": "TEXT", "number": "NUMERIC", "time": "DATE", "boolean": "BOOLEAN", "others": "OTHERS"}

# The keywords that SQLite does not accept as a name, found by trying all of https://sqlite.org/lang_keywords.html.
_KEYWORDS = """
    ADD ALL ALTER AND AS AUTOINCREMENT BETWEEN CASE CAST CHECK COLLATE COMMIT CONSTRAINT CREATE CROSS DEFAULT
    DEFERRABLE DELETE DISTINCT DROP ELSE ESCAPE EXCEPT EXISTS FOREIGN FROM FULL GROUP HAVING IF IN INDEX INNER INSERT
    INTERSECT INTO IS ISNULL JOIN LEFT LIMIT NATURAL NOT NOTHING NOTNULL NULL ON OR ORDER OUTER PRIMARY RAISE
    REFERENCES RETURNING RIGHT SELECT SET TABLE THEN TO TRANSACTION UNION UNIQUE UPDATE USING VALUES WHEN WHERE
    CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP
"""
_RESERVED = frozenset(_KEYWORDS.split())


class Link(BaseModel):
    """A foreign key of one column: `table.column` holds values of `to_table.to_column`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    column: str
    to_table: str
    to_column: str


class Schema(BaseModel):
    """Tables with their columns and kinds, keys, and the INSERT statements that came with them.

    `model_dump(exclude_defaults=True)` is the compact form for a row's context, `model_validate` the way back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    tables: dict[str, dict[str, Kind]]
    primary_keys: dict[str, list[str]] = {}
    foreign_keys: list[Link] = []
    inserts: list[str] = []

    @cached_property
    def table_names(self) -> dict[str, str]:
        """Lower-case name -> the schema's own."""
        return {table.lower(): table for table in self.tables}

    @cached_property
    def column_names(self) -> dict[str, dict[str, str]]:
        """Table -> lower-case column -> the schema's own."""
        return {table: {column.lower(): column for column in columns} for table, columns in self.tables.items()}

    def ddl(self, keys: bool = True) -> list[str]:
        """One CREATE TABLE statement a table; with `keys`, primary and foreign ones too (SQLite enforces only those
        of which the first sort, so an instance is built without)."""
        return [self._create(table, keys) for table in self.tables]

    def compact(self) -> str:
        """One line a table: `name(column, column, …)`."""
        return "\n".join(f"{table}({', '.join(columns)})" for table, columns in self.tables.items())

    def _create(self, table: str, keys: bool) -> str:
        primary = self.primary_keys.get(table, []) if keys else []
        lines = [self._column(table, column, keys) for column in self.tables[table]]
        if primary:
            lines.append(f"PRIMARY KEY ({', '.join(quoted(column) for column in primary)})")
        return f"CREATE TABLE {quoted(table)} ({', '.join(lines)})"

    def _column(self, table: str, column: str, keys: bool) -> str:
        text = f"{quoted(column)} {_DECLARED[self.tables[table][column]]}"
        if keys:
            for link in self.foreign_keys:
                if (link.table, link.column) == (table, column):
                    return f"{text} REFERENCES {quoted(link.to_table)} ({quoted(link.to_column)})"
        return text


def quoted(name: str) -> str:
    """`name` as SQLite reads it, in double quotes only where it needs them."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.upper() not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def from_spider(entry: dict[str, Any]) -> Schema:
    """The schema of one entry of Spider's tables.json, `sqlite_*` tables left out.

    Raises Refusal, naming the database and the field.
    """
    name = entry.get("db_id")
    if not isinstance(name, str) or not name:
        raise Refusal("tables.json: db_id: an entry names no database; give it one")
    names = _field(entry, "table_names_original")
    pairs = _field(entry, "column_names_original")
    kinds = _field(entry, "column_types")
    if len(kinds) != len(pairs):
        raise Refusal(f"{name}: column_types: {len(kinds)} types for {len(pairs)} columns; give one for each")
    if not all(isinstance(table, str) and table for table in names):
        raise Refusal(f"{name}: table_names_original: holds a name that is not text; name every table")
    tables: dict[str, dict[str, Kind]] = {table: {} for table in names}
    places: list[tuple[str, str] | None] = []
    for index, (pair, kind) in enumerate(zip(pairs, kinds, strict=True)):
        places.append(_place(name, index, pair, names))
        if places[-1] is None:
            continue
        if kind not in _DECLARED:
            raise Refusal(f"{name}: column_types[{index}]: {kind!r} is none of {', '.join(_DECLARED)}")
        table, column = places[-1]
        tables[table][column] = kind
    primary = _primary_keys(name, _field(entry, "primary_keys"), places)
    links = _links(name, _field(entry, "foreign_keys"), places)
    return _checked(name, tables, primary, links, [])


def _field(entry: dict[str, Any], field: str) -> list[Any]:
    value = entry.get(field)
    if not isinstance(value, list):
        raise Refusal(f"{entry['db_id']}: {field}: is {'missing' if value is None else 'not a list'} in tables.json")
    return value


def _place(name: str, index: int, pair: Any, tables: list[str]) -> tuple[str, str] | None:
    """(table, column) of an entry of column_names_original; None for the star, which belongs to no table."""
    match pair:
        case [-1, str()]:
            return None
        case [int(number), str(column)] if 0 <= number < len(tables) and column:
            return tables[number], column
    raise Refusal(f"{name}: column_names_original[{index}]: {pair!r} is not [number of a table, column]")


def _at(name: str, field: str, index: Any, places: list[tuple[str, str] | None]) -> tuple[str, str]:
    if not isinstance(index, int) or not 0 <= index < len(places) or places[index] is None:
        raise Refusal(f"{name}: {field}: {index!r} is not the number of a column")
    return places[index]


def _primary_keys(name: str, keys: list[Any], places: list[tuple[str, str] | None]) -> dict[str, list[str]]:
    primary: dict[str, list[str]] = {}
    for key in keys:
        # a key of several columns is a list in the larger releases of Spider's format
        for index in key if isinstance(key, list) else [key]:
            table, column = _at(name, "primary_keys", index, places)
            primary.setdefault(table, []).append(column)
    return primary


def _links(name: str, keys: list[Any], places: list[tuple[str, str] | None]) -> list[Link]:
    links = []
    for key in keys:
        if not isinstance(key, list) or len(key) != 2:
            raise Refusal(f"{name}: foreign_keys: {key!r} is not [column, column it refers to]")
        (table, column), (to_table, to_column) = (_at(name, "foreign_keys", index, places) for index in key)
        links.append(Link(table=table, column=column, to_table=to_table, to_column=to_column))
    return links


def _checked(
    name: str,
    tables: dict[str, dict[str, Kind]],
    primary: dict[str, list[str]],
    links: list[Link],
    inserts: list[str],
) -> Schema:
    """The schema without its `sqlite_*` tables; raises Refusal for what SQLite would not create."""
    tables = {table: columns for table, columns in tables.items() if not table.lower().startswith("sqlite_")}
    where = name or "the CREATE TABLE statements"
    if not tables:
        raise Refusal(f"{where}: tables: there is none; give at least one table")
    _refuse_twins(where, "tables", list(tables))
    for table, columns in tables.items():
        if not columns:
            raise Refusal(f"{where}: table {table}: has no column; give it one or leave it out")
        _refuse_twins(where, f"columns of {table}", list(columns))
    primary = {table: columns for table, columns in primary.items() if table in tables}
    links = [link for link in links if link.table in tables and link.to_table in tables]
    return Schema(name=name, tables=tables, primary_keys=primary, foreign_keys=links, inserts=inserts)


def _refuse_twins(where: str, what: str, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise Refusal(f"{where}: {what}: {name} and {seen[name.lower()]} are one name to SQLite; rename one")
        seen[name.lower()] = name


def from_ddl(text: str, name: str = "") -> Schema:
    """The schema of CREATE TABLE statements as a data set's own context has them; INSERT statements are kept as text.

    Views are passed over: a query that asks one does not run. A table's schema name ("sales.orders") is left out of
    both. Raises Refusal for text that is not SQL, and for any other statement.
    """
    where = name or "the CREATE TABLE statements"
    tables: dict[str, dict[str, Kind]] = {}
    primary: dict[str, list[str]] = {}
    references: list[tuple[str, str, str, str | None]] = []
    inserts: list[str] = []
    defaults: dict[str, set[str]] = {}
    for statement in _parsed(where, text):
        if isinstance(statement, exp.Insert):
            named = list(statement.find_all(exp.Table))
            for table in named:
                table.set("db", None)
            _refuse_insert(where, statement, named, defaults)
            inserts.append(statement.sql(dialect="sqlite", copy=False))
            continue
        if isinstance(statement, exp.Create) and statement.kind == "VIEW":
            continue
        if not _creates_a_table(statement):
            what = " ".join(statement.sql(dialect="sqlite").split()[:3])
            raise Refusal(f"{where}: {what} …: only CREATE TABLE, CREATE VIEW and INSERT are read; leave the row out")
        table = statement.this.this.name
        _refuse_twins(where, "tables", [*tables, table])
        tables[table] = _columns(where, table, statement.this)
        defaults[table.lower()] = _defaults(statement.this)
        primary[table] = _declared_keys(statement.this)
        references += _declared_links(table, statement.this)
    primary = {table: columns for table, columns in primary.items() if columns}
    return _checked(name, tables, primary, _resolved(tables, primary, references), inserts)


def _defaults(body: exp.Schema) -> set[str]:
    """The columns, in lower case, that get a value where an INSERT leaves them out."""
    columns = body.find_all(exp.ColumnDef)
    return {column.name.lower() for column in columns if column.find(exp.DefaultColumnConstraint)}


def _refuse_insert(where: str, statement: exp.Insert, named: list[exp.Table], defaults: dict[str, set[str]]) -> None:
    """Refuse an INSERT that reads tables, which it then names beside its own, since a few lines of it make rows without
    end, and one that leaves a column to its DEFAULT, which the schema does not keep."""
    target, *others = named
    if others:
        raise Refusal(f"{where}: INSERT INTO {target.name} reads a table; write out its rows or leave the row out")
    if isinstance(statement.this, exp.Schema):
        left_out = defaults.get(target.name.lower(), set()) - {
            column.name.lower() for column in statement.this.expressions
        }
        if left_out:
            names = ", ".join(sorted(left_out))
            raise Refusal(f"{where}: INSERT INTO {target.name} leaves {names} to its DEFAULT; write the value out")


def _parsed(where: str, text: str) -> list[exp.Expression]:
    try:
        statements = sqlglot.parse(text, dialect="sqlite")
        # a comment after a statement is a Semicolon
        return [one for one in statements if one is not None and not isinstance(one, exp.Semicolon)]
    except SqlglotError as error:
        first = str(error).splitlines()[0]
        raise Refusal(f"{where}: is not SQL that can be read: {first}") from None
    except RecursionError:
        raise Refusal(f"{where}: nested too deep to be read; leave the row out") from None


def _creates_a_table(statement: exp.Expression) -> bool:
    return isinstance(statement, exp.Create) and statement.kind == "TABLE" and isinstance(statement.this, exp.Schema)


def _columns(where: str, table: str, body: exp.Schema) -> dict[str, Kind]:
    columns = [part for part in body.expressions if isinstance(part, exp.ColumnDef)]
    _refuse_twins(where, f"columns of {table}", [column.name for column in columns])
    return {column.name: _kind(column.args.get("kind")) for column in columns}


def _kind(declared: exp.Expression | None) -> Kind:
    """Spider's kind for a declared type, by the words in its name as SQLite tells an affinity."""
    # not in the sqlite dialect, which writes BOOLEAN as INTEGER
    name = declared.sql(copy=False).upper() if declared is not None else ""
    words: dict[Kind, str] = {
        "boolean": "BOOL|^BIT",
        "time": "DATE|TIME|YEAR",
        "number": "INT|REAL|FLOA|DOUB|^NUM|DEC|SERIAL|MONEY",
        "text": "CHAR|CLOB|TEXT|STRING|ENUM|UUID|JSON",
    }
    return next((kind for kind, pattern in words.items() if re.search(pattern, name)), "others")


def _parts(body: exp.Schema) -> list[exp.Expression]:
    """The table's constraints, named ones unwrapped."""
    parts = []
    for part in body.expressions:
        parts += part.expressions if isinstance(part, exp.Constraint) else [part]
    return parts


def _declared_keys(body: exp.Schema) -> list[str]:
    keys = []
    for part in _parts(body):
        if isinstance(part, exp.PrimaryKey):
            keys += [found.name for column in part.expressions for found in column.find_all(exp.Identifier)]
        elif isinstance(part, exp.ColumnDef) and part.find(exp.PrimaryKeyColumnConstraint):
            keys.append(part.name)
    return _own(body, list(dict.fromkeys(keys)))


def _own(body: exp.Schema, names: list[str]) -> list[str]:
    """The names as the columns are declared."""
    declared = {part.name.lower(): part.name for part in body.expressions if isinstance(part, exp.ColumnDef)}
    return [declared[name.lower()] for name in names if name.lower() in declared]


def _declared_links(table: str, body: exp.Schema) -> list[tuple[str, str, str, str | None]]:
    """(table, column, table referred to, column referred to or None for its primary key)."""
    links = []
    for part in _parts(body):
        if isinstance(part, exp.ForeignKey):
            columns, reference = [column.name for column in part.expressions], part.args.get("reference")
        elif isinstance(part, exp.ColumnDef):
            columns, reference = [part.name], part.find(exp.Reference)
        else:
            continue
        if reference is None:
            continue
        target = reference.this
        to_table = target.find(exp.Table).name
        to_columns = [column.name for column in target.expressions] if isinstance(target, exp.Schema) else []
        to_columns += [None] * (len(columns) - len(to_columns))
        links += [(table, column, to_table, to) for column, to in zip(columns, to_columns, strict=False)]
    return links


def _resolved(
    tables: dict[str, dict[str, Kind]],
    primary: dict[str, list[str]],
    references: list[tuple[str, str, str, str | None]],
) -> list[Link]:
    """The references whose ends both exist; the others are left out, since SQLite does not mind them either."""
    names = {table.lower(): table for table in tables}
    links = []
    for table, column, target, to_column in references:
        to_table = names.get(target.lower())
        if to_table is None:
            continue
        own = {name.lower(): name for name in tables[table]}
        there = {name.lower(): name for name in tables[to_table]}
        to = there.get(to_column.lower()) if to_column else next(iter(primary.get(to_table, [])), None)
        if to is not None and column.lower() in own:
            links.append(Link(table=table, column=own[column.lower()], to_table=to_table, to_column=to))
    return links
