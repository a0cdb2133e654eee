"""A witness of a query: rows which meet its joins and conditions together, so that its result is not empty."""

import random
from dataclasses import dataclass, field

from sqlglot import exp

from stages.sql import values
from stages.sql.schema import Schema
from stages.sql.values import Pool, Value

# Copies of a group that a HAVING COUNT(*) may ask for.
MOST_COPIES = 60
# Chance that a value stands right on the boundary that a <= or >= allows.
LITERAL_RATE = 0.35

_OPERATORS = {exp.EQ: "=", exp.NEQ: "!=", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="}
_MIRRORED = {"=": "=", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NEGATED = {"=": "!=", "!=": "=", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


class Cell:
    """One unknown value; cells that a join makes equal are one class, found through `root`."""

    def __init__(self, table: str, column: str):
        self.parent: Cell | None = None
        self.places = [(table, column)]
        self.conditions: list[tuple[str, Value | tuple[Value, ...]]] = []
        self.leaning = 0  # +1: as large as can be, -1: as small
        self.fresh = False  # a value that no other row has
        self.value: Value = None
        self.solved = False

    def root(self) -> "Cell":
        return self if self.parent is None else self.parent.root()

    def unite(self, other: "Cell") -> None:
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return
        theirs.parent = mine
        mine.places += theirs.places
        mine.conditions += theirs.conditions
        mine.leaning = mine.leaning or theirs.leaning
        mine.fresh = mine.fresh or theirs.fresh

    @property
    def bound(self) -> bool:
        """Whether something was asked of the value: a condition, a join, an extreme."""
        root = self.root()
        return bool(root.conditions or root.leaning or root.fresh or len(root.places) > 1)


@dataclass
class Row:
    """A row to plant; cells that nothing is asked of are filled in later."""

    table: str
    cells: dict[str, Cell] = field(default_factory=dict)

    def cell(self, column: str) -> Cell:
        return self.cells.setdefault(column, Cell(self.table, column))

    def known(self) -> dict[str, Value]:
        return {column: cell.root().value for column, cell in self.cells.items() if cell.root().solved}


class Witness:
    """The rows for one query; `solve` gives them their values."""

    def __init__(
        self,
        schema: Schema,
        parents: dict[tuple[str, str], tuple[str, str]],
        tree: exp.Expression,
        rng: random.Random,
        near_miss: bool = False,
    ):
        """With `near_miss`, one condition is just not met, or a group is one row short of its HAVING COUNT(*)."""
        self.schema, self.parents, self.rng = schema, parents, rng
        self.rows: list[Row] = []
        self.missing = 0  # rows by which a counted group is to be short
        self.spoilt = not near_miss
        if near_miss and tree.find(exp.Having) is not None and rng.random() < 0.5:
            self.missing, self.spoilt = 1, True
        self._query(tree)
        self._merge_by_key()
        if not self.spoilt:
            self._spoil()

    def solve(self, pools: dict[tuple[str, str], Pool]) -> bool:
        """Find a value for every cell that something is asked of; False where a class of cells has none, or where a
        near miss has no condition to miss."""
        if not self.spoilt:
            return False
        for row in self.rows:
            for cell in row.cells.values():
                root = cell.root()
                if cell.bound and not root.solved and not self._solve(root, pools):
                    return False
        return True

    def _spoil(self) -> None:
        """Turn one condition into one for a value next to its literal that does not meet it."""
        roots = list({id(cell.root()): cell.root() for row in self.rows for cell in row.cells.values()}.values())
        choices = []
        for root in roots:
            table, column = root.places[0]
            kind = self.schema.tables[table][column]
            for place, (how, what) in enumerate(root.conditions):
                close = [value for value in self._suggested(what) if not values.holds(value, how, what, kind)]
                choices += [(root, place, value) for value in close]
        if choices:
            root, place, value = self.rng.choice(choices)
            root.conditions[place] = ("=", value)
            self.spoilt = True

    def _solve(self, root: Cell, pools: dict[tuple[str, str], Pool]) -> bool:
        kinds = [self.schema.tables[table][column] for table, column in root.places]
        tried = [value for place in dict.fromkeys(root.places) for value in pools[place].candidates(self.rng)]
        tried += [value for _, operand in root.conditions for value in self._suggested(operand)]
        if "number" in kinds:  # a number suits a TEXT column that is joined to one, and not the other way round
            tried = [value for value in tried if not isinstance(value, str)] + [
                value for value in tried if isinstance(value, str)
            ]
        meeting = [
            value
            for value in tried
            if all(values.holds(value, how, what, kind) for how, what in root.conditions for kind in kinds)
        ]
        if root.fresh and not any(how in ("=", "in", "null") for how, _ in root.conditions):
            new = self.rng.randint(10_000, 99_999)
            fresh = new if set(kinds) - {"text"} else f"new {new}"
            if all(values.holds(fresh, how, what, kind) for how, what in root.conditions for kind in kinds):
                meeting = [fresh]
        if not meeting:
            if any(how == "null" for how, _ in root.conditions):
                root.solved = True
                return True
            return False
        literals = [what for how, what in root.conditions if how in ("<=", ">=") and what in meeting]
        if literals and not root.leaning and self.rng.random() < LITERAL_RATE:
            meeting = literals
        root.value = self._chosen(meeting, root.leaning)
        root.solved = True
        return True

    def _chosen(self, meeting: list[Value], leaning: int) -> Value:
        if not leaning:
            # by type first: a text in a column of numbers is a rare thing to test with
            same = [value for value in meeting if isinstance(value, str) == isinstance(meeting[0], str)]
            return self.rng.choice(same)
        order = sorted((value for value in meeting if value is not None), key=lambda value: (str(type(value)), value))
        numbers = [value for value in order if not isinstance(value, str)]
        ends = numbers or order
        if numbers:
            return ends[-1] + 1 if leaning > 0 else ends[0] - 1
        return ends[-1] if leaning > 0 else ends[0]

    def _suggested(self, operand: Value | tuple[Value, ...]) -> list[Value]:
        if isinstance(operand, tuple):
            return [value for one in operand for value in self._suggested(one)]
        if operand is None:
            return []
        text = values.sample(operand) if isinstance(operand, str) else operand
        return [operand, *values.near(operand, self.rng), text]

    def _query(self, query: exp.Expression) -> list[Cell | None]:
        """Plant for a query; returns the cells that its result shows, None where it shows no column."""
        query = query.unnest()
        if isinstance(query, exp.SetOperation):
            left, right = self._query(query.this), self._query(query.expression)
            if isinstance(query, exp.Intersect):
                for mine, theirs in zip(left, right, strict=False):
                    if mine is not None and theirs is not None:
                        mine.unite(theirs)
            elif isinstance(query, exp.Except) and left and left[0] is not None:
                left[0].root().fresh = True
            return left
        return self._select(query) if isinstance(query, exp.Select) else []

    def _select(self, select: exp.Select) -> list[Cell | None]:
        copies = self._copies(select)
        group = select.args.get("group")
        grouped = group.expressions if group is not None else []
        shown, first = [], []
        for number in range(copies):
            rows = self._sources(select)
            cells = [self._cell(column, rows) for column in grouped]
            for one, other in zip(first, cells, strict=False):
                if one is not None and other is not None:
                    one.unite(other)
            if number == 0:
                first = cells
                shown = [self._cell(each.unalias(), rows) for each in select.expressions]
        return shown

    def _copies(self, select: exp.Select) -> int:
        """Rows that a group needs for its HAVING COUNT(*), and 1 or 2 where nothing asks for more."""
        having = select.args.get("having")
        for comparison in having.find_all(*_OPERATORS) if having is not None else []:
            limit = values.constant(comparison.expression, self.schema)
            if isinstance(comparison.this, exp.Count) and isinstance(limit, int):
                wanted = {"=": limit, "!=": limit + 1, "<": limit - 1, "<=": limit, ">": limit + 1, ">=": limit}
                # an upper limit is met by one row as well as by all that it allows
                upper = isinstance(comparison, (exp.LT, exp.LTE))
                copies = min(wanted[_OPERATORS[type(comparison)]], 3 if upper else MOST_COPIES)
                return max(1, copies - self.missing)
        return self.rng.choice((1, 1, 2)) if select.args.get("group") is not None else 1

    def _sources(self, select: exp.Select) -> dict[str, Row | dict[str, Cell]]:
        """New rows for the FROM, held to its joins and conditions: alias -> row, or the cells of a subquery."""
        rows: dict[str, Row | dict[str, Cell]] = {}
        start = select.args.get("from_")
        joins = select.args.get("joins") or []
        for part in ([start.this] if start is not None else []) + [join.this for join in joins]:
            if isinstance(part, exp.Table) and part.name.lower() in self.schema.table_names:
                row = Row(self.schema.table_names[part.name.lower()])
                self.rows.append(row)
                rows[part.alias_or_name.lower()] = row
            elif isinstance(part, exp.Subquery):
                names = [each.alias_or_name.lower() for each in part.unnest().selects]
                cells = self._query(part.unnest())
                named = zip(names, cells, strict=False)
                rows[part.alias.lower()] = {name: cell for name, cell in named if cell is not None}
        for join in joins:
            if join.args.get("on") is not None:
                self._condition(join.args["on"], rows)
        for clause in ("where", "having"):
            if select.args.get(clause) is not None:
                self._condition(select.args[clause].this, rows)
        return rows

    def _cell(self, column: exp.Expression, rows: dict[str, Row | dict[str, Cell]]) -> Cell | None:
        """The cell of a column, or of the column inside MAX, MIN, AVG, SUM or DISTINCT."""
        while isinstance(column, (exp.Max, exp.Min, exp.Avg, exp.Sum, exp.Paren)):
            column = column.this
        if not isinstance(column, exp.Column):
            return None
        for alias, row in rows.items():
            if column.table.lower() not in ("", alias):
                continue
            if isinstance(row, Row):
                own = self.schema.column_names[row.table].get(column.name.lower())
                if own is not None:
                    return row.cell(own)
            elif column.name.lower() in row:
                return row[column.name.lower()]
        return None

    def _condition(
        self, condition: exp.Expression, rows: dict[str, Row | dict[str, Cell]], wanted: bool = True
    ) -> None:
        condition = condition.unnest()
        both = isinstance(condition, exp.And) if wanted else isinstance(condition, exp.Or)
        if both:
            self._condition(condition.this, rows, wanted)
            self._condition(condition.expression, rows, wanted)
        elif isinstance(condition, (exp.And, exp.Or)):
            self._condition(self.rng.choice((condition.this, condition.expression)), rows, wanted)
        elif isinstance(condition, exp.Not):
            self._condition(condition.this, rows, not wanted)
        elif type(condition) in _OPERATORS:
            self._comparison(condition, rows, wanted)
        elif isinstance(condition, exp.In):
            self._membership(condition, rows, wanted)
        elif isinstance(condition, exp.Exists):
            self._query(condition.this)
        else:
            self._simple(condition, rows, wanted)

    def _comparison(self, condition: exp.Expression, rows: dict[str, Row | dict[str, Cell]], wanted: bool) -> None:
        left, right = condition.this.unnest(), condition.expression.unnest()
        operator = _OPERATORS[type(condition)]
        if self._cell(left, rows) is None:
            left, right, operator = right, left, _MIRRORED[operator]
        operator = operator if wanted else _NEGATED[operator]
        cell = self._cell(left, rows)
        if cell is None:
            return
        other, literal = self._cell(right, rows), values.constant(right, self.schema)
        if other is not None and operator == "=":
            cell.unite(other)
        elif literal is not None:
            cell.root().conditions.append((operator, literal))
        elif isinstance(right, (exp.Select, exp.SetOperation)):
            shown = self._query(right)
            if operator == "=" and shown and shown[0] is not None:
                cell.unite(shown[0])
            elif operator != "=":
                cell.root().leaning = {">": 1, ">=": 1, "<": -1, "<=": -1}.get(operator, 1)

    def _membership(self, condition: exp.In, rows: dict[str, Row | dict[str, Cell]], wanted: bool) -> None:
        cell = self._cell(condition.this, rows)
        query = condition.args.get("query")
        shown = self._query(query.unnest()) if query is not None else []
        if cell is None:
            return
        if query is None:
            listed = tuple(values.constant(each, self.schema) for each in condition.expressions)
            if None not in listed:
                cell.root().conditions.append(("in" if wanted else "not in", listed))
        elif not wanted:
            cell.root().fresh = True
        elif shown and shown[0] is not None:
            cell.unite(shown[0])

    def _simple(self, condition: exp.Expression, rows: dict[str, Row | dict[str, Cell]], wanted: bool) -> None:
        """LIKE, BETWEEN and IS NULL."""
        cell = self._cell(condition.this, rows) if isinstance(condition.this, exp.Expression) else None
        if cell is None:
            return
        conditions = cell.root().conditions
        if isinstance(condition, exp.Like):
            pattern = values.constant(condition.expression, self.schema)
            wanted = wanted != bool(condition.args.get("negate"))
            if pattern is not None:
                conditions.append(("like" if wanted else "not like", pattern))
        elif isinstance(condition, exp.Between):
            low, high = (values.constant(condition.args[end], self.schema) for end in ("low", "high"))
            if low is not None and high is not None:
                conditions += [(">=", low), ("<=", high)] if wanted else [("<", low)]
        elif isinstance(condition, exp.Is) and isinstance(condition.expression, exp.Null):
            wanted = wanted != bool(condition.args.get("negate"))
            conditions.append(("null" if wanted else "not null", None))

    def _merge_by_key(self) -> None:
        """Make one row of the rows of a table that a join gives one primary key."""
        merged = True
        while merged:
            merged = False
            seen: dict[tuple[str, int], Row] = {}
            for row in list(self.rows):
                keys = self.schema.primary_keys.get(row.table, [])
                if len(keys) != 1 or keys[0] not in row.cells or (row.table, keys[0]) in self.parents:
                    continue
                at = (row.table, id(row.cells[keys[0]].root()))
                if at in seen:
                    for column, cell in row.cells.items():
                        seen[at].cell(column).unite(cell)
                    self.rows.remove(row)
                    merged = True
                else:
                    seen[at] = row
