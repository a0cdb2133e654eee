"""Values that a column may hold: the literals it is compared to, near misses of them, and a few of its kind."""

import datetime
import random
import re
from dataclasses import dataclass, field
from typing import TypeAlias

from sqlglot import exp

from stages.sql import scope
from stages.sql.schema import Kind, Schema

Value: TypeAlias = int | float | str | None

_WORDS = ("Alpha", "Beta", "beta", "Gamma", "Delta One", "Delta Two", "Zoë", "O'Neil", "A", "")
_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2.5, -1, 10, 100, 1000)
_TIMES = (2000, 2008, 2013, 2014, 2015, 2016)


@dataclass
class Pool:
    """What one column draws from; columns that are compared to one another share it."""

    kind: Kind
    literals: list[Value] = field(default_factory=list)
    reserve: list[Value] = field(default_factory=list)

    def value(self, rng: random.Random) -> Value:
        """A literal, a near miss of one, or a value of the kind, each about as often."""
        choice = rng.random()
        if self.literals and choice < 0.35:
            return rng.choice(self.literals)
        if self.literals and choice < 0.55:
            return rng.choice(near(rng.choice(self.literals), rng))
        return rng.choice(self.reserve)

    def key(self, rng: random.Random, span: int) -> Value:
        """A value for a primary key, out of about `span`."""
        number = rng.randint(1, max(span, 8))
        return number if self.kind in ("number", "boolean", "others") else f"k{number}"

    def candidates(self, rng: random.Random) -> list[Value]:
        """Values to try where conditions have to be met, the plainest first."""
        every = list(self.reserve)
        rng.shuffle(every)
        return every + [value for literal in self.literals for value in [literal, *near(literal, rng)]]


def pools(schema: Schema, trees: list[exp.Expression]) -> dict[tuple[str, str], Pool]:
    """A pool for every (table, column), from the literals in the gold queries."""
    found = {
        (table, column): Pool(kind, reserve=_reserve(kind))
        for table, columns in schema.tables.items()
        for column, kind in columns.items()
    }
    for tree in trees:
        for at, literal in _compared(tree, schema):
            if literal not in found[at].literals:
                found[at].literals.append(literal)
    for at, pool in found.items():
        _suit(schema.tables[at[0]][at[1]], pool)
    return found


def parents(schema: Schema, trees: list[exp.Expression]) -> dict[tuple[str, str], tuple[str, str]]:
    """(table, column) -> the one that it refers to: the foreign keys, and those that the gold queries join on.

    Spider leaves foreign keys out, and names one column of a key of several; a key that refers is not held unique.
    """
    found = {(link.table, link.column): (link.to_table, link.to_column) for link in schema.foreign_keys}
    children = {link.table for link in schema.foreign_keys}
    for tree in trees:
        for join in tree.find_all(exp.EQ):
            if not isinstance(join.this, exp.Column) or not isinstance(join.expression, exp.Column):
                continue
            sides = [scope.place(side, schema) for side in (join.this, join.expression)]
            pairs = [(side.table, side.column) for side in sides if side is not None and side.table is not None]
            if len(pairs) == 2 and pairs[0][0] != pairs[1][0]:
                _infer(schema, pairs[0], pairs[1], children, found)
    return found


def _infer(
    schema: Schema,
    one: tuple[str, str],
    other: tuple[str, str],
    children: set[str],
    found: dict[tuple[str, str], tuple[str, str]],
) -> None:
    """Add what a join of two columns says: the one that is a key is referred to; of two keys, that of the table which
    has no foreign key itself."""
    keys = [schema.primary_keys.get(table) == [column] for table, column in (one, other)]
    refers = [table in children for table, _ in (one, other)]
    if one in found or other in found or keys == [False, False]:
        return
    if keys == [True, True]:
        if refers[0] == refers[1]:
            return
        keys = [not refers[0], not refers[1]]
    child, parent = (other, one) if keys[0] else (one, other)
    found[child] = parent


def _suit(kind: Kind, pool: Pool) -> None:
    """A column of times that is compared to numbers holds years or numbers, one compared to text holds dates."""
    texts = [value for value in pool.literals if isinstance(value, str)]
    if kind == "time":
        pool.reserve = _dates() if texts and all(map(_is_date, texts)) else list(_TIMES)
    if kind == "text" and pool.literals and not texts:
        pool.reserve = [str(number) for number in _NUMBERS]
    numbers = [value for value in pool.literals if isinstance(value, (int, float))]
    # a comparison to 72.5 or to 50,000 is to go either way
    pool.reserve += [value for number in numbers for value in (number * 2, number // 2)]


def _reserve(kind: Kind) -> list[Value]:
    if kind == "boolean":
        return [0, 1]
    return list(_NUMBERS) if kind in ("number", "others") else list(_WORDS)


def _dates() -> list[Value]:
    return [f"{year}-0{month}-1{day}" for year in (2008, 2013, 2016) for month, day in ((1, 0), (3, 5), (6, 9))]


def _is_date(text: str) -> bool:
    return re.match(r"\d{4}-\d\d-\d\d", text) is not None


def _compared(tree: exp.Expression, schema: Schema) -> list[tuple[tuple[str, str], Value]]:
    """((table, column), literal) for every literal that stands beside a column of the schema in a condition."""
    found = []
    for column in tree.find_all(exp.Column):
        at = scope.place(column, schema)
        condition = column.find_ancestor(exp.Predicate)
        if at is None or at.table is None or condition is None:
            continue
        if condition.find_ancestor(exp.Select) is not at.select:
            continue
        for other in condition.find_all(exp.Literal, exp.Column, exp.Neg):
            literal = constant(other, schema)
            if literal is not None and other.find_ancestor(exp.Select) is at.select:
                found.append(((at.table, at.column), sample(literal) if isinstance(condition, exp.Like) else literal))
    return found


def constant(node: exp.Expression, schema: Schema) -> Value:
    """The value of a literal, of a negative one, or of a double-quoted word that is no column; None for the rest."""
    if isinstance(node, exp.Paren):
        return constant(node.this, schema)
    if isinstance(node, exp.Neg):
        value = constant(node.this, schema)
        return -value if isinstance(value, (int, float)) else None
    if isinstance(node, exp.Literal):
        return node.this if node.is_string else number(node.this)
    if isinstance(node, exp.Column) and node.this.args.get("quoted") and scope.place(node, schema) is None:
        return node.name
    return None


def number(text: str) -> Value:
    """The number that a text is, as SQLite reads it, or the text; integers past 64 bits are floats."""
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        return int(text)
    if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*", text):
        return float(text)
    return text


def sample(pattern: Value) -> Value:
    """A text that a LIKE pattern matches."""
    return str(pattern).replace("%", "").replace("_", "a")


def near(value: Value, rng: random.Random) -> list[Value]:
    """Near misses: ±1 for a number, a day for a date, another case and a prefix or suffix for a text."""
    if value is None:
        return [0, ""]
    if isinstance(value, (int, float)):
        return [value - 1, value + 1, value + rng.choice((-2, 2, 5, -5)), value + 0.5]
    if _is_date(value):
        return _near_date(value)
    if isinstance(number(value), (int, float)):
        return [str(number(value) - 1), str(number(value) + 1), value + "0"]
    wild = [value.swapcase(), value.lower(), value + "s", "a" + value, value[:-1], value + " " + rng.choice("xyz")]
    return [text for text in wild if text != value] or ["x"]


def _near_date(value: str) -> list[Value]:
    try:
        day = datetime.date.fromisoformat(value[:10])
        shifted = [day - datetime.timedelta(1), day + datetime.timedelta(1), day + datetime.timedelta(400)]
    except (ValueError, OverflowError):  # 2013-02-31 is a literal too, and so is 0001-01-01
        return [value + "0"]
    return [str(other) + value[10:] for other in shifted]


def identity(value: Value) -> str:
    """What two values have in common that SQLite would call equal whatever the column: 1, 1.0 and '1'."""
    plain = number(value) if isinstance(value, str) else value
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    return f"{type(plain).__name__}:{plain}"


def _affine(value: Value, kind: Kind) -> Value:
    """A value as a column of the kind stores it (https://sqlite.org/datatype3.html#type_affinity)."""
    if kind == "text":
        return None if value is None else str(value)
    return number(value) if isinstance(value, str) else value


def holds(value: Value, operator: str, operand: Value | tuple[Value, ...], kind: Kind) -> bool:
    """Whether a column of the kind that holds `value` meets the condition, by SQLite's rules of comparison."""
    value = _affine(value, kind)
    if operator == "null":
        return value is None
    if value is None:
        return False
    if operator == "not null":
        return True
    if operator in ("in", "not in"):
        return (operator == "in") == any(value == _affine(other, kind) for other in operand)
    if operator in ("like", "not like"):
        return (operator == "like") == _like(str(value), str(operand))
    other = _affine(operand, kind)
    left, right = (isinstance(value, str), value), (isinstance(other, str), other)  # numbers sort before text
    comparisons = {
        "=": left == right,
        "!=": left != right,
        "<": left < right,
        "<=": left <= right,
        ">": left > right,
        ">=": left >= right,
    }
    return comparisons[operator]


def _like(text: str, pattern: str) -> bool:
    """SQLite's LIKE: case does not count."""
    parts = {"%": ".*", "_": "."}
    expression = "".join(parts.get(character, re.escape(character)) for character in pattern)
    return re.fullmatch(expression, text, re.IGNORECASE | re.DOTALL) is not None
