"""Which table and column a name in a query means: the sources of a SELECT, looked up innermost first as SQLite does."""

from dataclasses import dataclass

from sqlglot import exp

from stages.sql.schema import Schema


@dataclass(frozen=True)
class Source:
    """One entry of a FROM: its alias, and the table it is, or None with the columns of the subquery it is."""

    alias: str
    table: str | None
    columns: dict[str, str]  # lower-case -> as written


@dataclass(frozen=True)
class Place:
    """What a column reference means; `table` is None for a subquery's column."""

    select: exp.Select
    alias: str
    table: str | None
    column: str


def sources(select: exp.Select, schema: Schema) -> dict[str, Source]:
    """Lower-case alias -> source, in the FROM's order."""
    start = select.args.get("from_")
    parts = [start.this] if start is not None else []
    parts += [join.this for join in select.args.get("joins") or []]
    found = {}
    for part in parts:
        source = _source(part, schema)
        if source is not None:
            found[source.alias.lower()] = source
    return found


def _source(part: exp.Expression, schema: Schema) -> Source | None:
    if isinstance(part, exp.Table):
        table = schema.table_names.get(part.name.lower())
        if table is not None:
            return Source(part.alias_or_name, table, schema.column_names[table])
        return Source(part.alias_or_name, None, _of_cte(part, schema))
    if isinstance(part, exp.Subquery):
        return Source(part.alias, None, _named(part.unnest(), schema))
    return None


def _of_cte(table: exp.Table, schema: Schema) -> dict[str, str]:
    node = table.parent
    while node is not None:
        for cte in node.ctes if isinstance(node, exp.Query) else []:
            if cte.alias.lower() == table.name.lower() and table.find_ancestor(exp.CTE) is not cte:
                return _named(cte.this, schema)
        node = node.parent
    return {}


def _named(query: exp.Expression, schema: Schema) -> dict[str, str]:
    """The columns that a subquery shows; a star shows those of its sources."""
    if not isinstance(query, exp.Query):
        return {}
    names = {}
    for shown in query.selects:
        if shown.is_star and isinstance(query, exp.Select):
            for source in sources(query, schema).values():
                names.update(source.columns)
        else:
            names[shown.alias_or_name.lower()] = shown.alias_or_name
    return names


def aliases(select: exp.Select) -> dict[str, str]:
    """Lower-case -> as written, of the expressions that the SELECT names with AS."""
    return {shown.alias.lower(): shown.alias for shown in select.selects if isinstance(shown, exp.Alias)}


def enclosing(node: exp.Expression) -> list[exp.Select]:
    """The SELECTs around a node, innermost first; above a set operation's ORDER BY, its first SELECT."""
    found = []
    current = node.parent
    while current is not None:
        if isinstance(current, exp.Select):
            found.append(current)
        elif isinstance(current, exp.SetOperation) and node.find_ancestor(exp.Ordered):
            first = current.find(exp.Select)
            if first is not None and first not in found and not found:
                found.append(first)
        current = current.parent
    return found


def place(column: exp.Column, schema: Schema) -> Place | None:
    """Where a column reference points, or None where it points nowhere in the schema."""
    name, qualifier = column.name.lower(), column.table.lower()
    for select in enclosing(column):
        for alias, source in sources(select, schema).items():
            if qualifier in ("", alias) and name in source.columns:
                return Place(select, alias, source.table, source.columns[name])
    return None
