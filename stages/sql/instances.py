"""Filled instances of a schema: small, seeded databases on which a wrong query shows another result than the gold one.

The idea is that of test-suite accuracy (Zhong et al., 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test
Suites"). Rows hold the literals of the gold queries and near misses of them; and for each gold query a *witness* is
planted, rows that satisfy its conditions jointly, so that few results are empty, and beside it rows that satisfy all
but one and miss that one by little. Rows that come with a schema, as INSERT statements, are one more instance.
"""

import hashlib
import json
import random
import sqlite3
from dataclasses import dataclass
from functools import cached_property

from stages.refusal import Refusal
from stages.sql import values, worker
from stages.sql.normal import parsed
from stages.sql.schema import Schema, quoted
from stages.sql.values import Value
from stages.sql.witness import Witness

# Rows a table may be filled up to, by instance: small tables find an off-by-one, large ones a wrong group.
SIZES = (16, 8, 24, 4, 32, 12)
# Rows a table may come to through witnesses; a HAVING COUNT(*) > 50 alone needs 51.
MOST_ROWS = 70
# Chance that a value is NULL, by instance: one NULL empties every NOT IN, so every other instance has none.
NULL_RATES = (0.0, 0.1, 0.0, 0.2)
# Chance that a row is there twice but for its key, by instance: with none, a group is as large as it was planted.
DUPLICATE_RATES = (0.15, 0.3, 0.0)
# How often an instance is also given rows which just miss a query's conditions, room allowing.
MISSES = 2
DANGLING_RATE = 0.05
# SQLite's instructions that an INSERT may take: ten thousand rows' worth, no endless SELECT.
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Instance:
    """A database to be: the statements that create its tables, and each table's rows."""

    ddl: list[str]
    rows: dict[str, list[list[Value]]]

    @cached_property
    def id(self) -> str:
        """A digest of the contents: equal databases have equal ids."""
        text = json.dumps([self.ddl, self.rows], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def fill(schema: Schema, queries: list[str], seed: int, count: int) -> list[Instance]:
    """`count` instances of a schema for the gold queries that are judged on them; the order of `queries` is no matter.
    Before them, where the schema brings rows of its own, the one that they are.

    The same arguments give the same instances in every process. A query that sqlglot cannot read plants nothing.
    """
    trees = [tree for tree in map(parsed, sorted(set(queries))) if tree is not None]
    pools = values.pools(schema, trees)
    parents = values.parents(schema, trees)
    planted, missed = [0] * len(trees), [0] * len(trees)
    instances = [given(schema)] if schema.inserts else []
    for number in range(count):
        rng = random.Random(f"{seed}/{schema.name}/{number}")
        filling = _Filling(schema, pools, parents, rng, number)
        order = sorted(range(len(trees)), key=lambda index: (planted[index], rng.random()))
        for index in order:
            planted[index] += filling.plant(Witness(schema, parents, trees[index], rng))
        for index in sorted(order * MISSES, key=lambda index: missed[index]):
            missed[index] += filling.plant(Witness(schema, parents, trees[index], rng, near_miss=True))
        instances.append(filling.finish())
    return instances


def given(schema: Schema) -> Instance:
    """The instance that the schema's own INSERT statements make; raises Refusal where SQLite will not run one."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    ddl = schema.ddl(keys=False)
    what = "the CREATE TABLE statements"
    try:
        for statement in ddl:
            database.execute(statement)
        worker.confine(database, writable=True)
        database.set_progress_handler(lambda: True, MOST_STEPS)
        what = "the INSERT statements" if schema.inserts else what
        for statement in schema.inserts:
            database.execute(statement)
        rows = {table: list(map(list, database.execute(f"SELECT * FROM {quoted(table)}"))) for table in schema.tables}
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise Refusal(f"{what}: SQLite says: {error}; mend them or leave the row out") from None
    finally:
        database.close()
    if any(isinstance(value, bytes) for of in rows.values() for row in of for value in row):
        raise Refusal("the INSERT statements: hold bytes, which are not compared; leave the row out")
    for table in schema.tables:
        _number(schema, table, rows[table])
    return Instance(ddl, rows)


def _number(schema: Schema, table: str, rows: list[list[Value]]) -> None:
    """Give the rows that leave out a key of one number (SERIAL, AUTO_INCREMENT) the next ones."""
    key = schema.primary_keys.get(table, [])
    if len(key) != 1 or schema.tables[table][key[0]] != "number":
        return
    place = list(schema.tables[table]).index(key[0])
    for row in rows:
        if row[place] is None:
            numbers = [other[place] for other in rows if isinstance(other[place], int)]
            row[place] = max(numbers, default=0) + 1


class _Filling:
    """The rows of one instance while they come together: witnesses first, then rows at random up to the size."""

    def __init__(
        self,
        schema: Schema,
        pools: dict[tuple[str, str], values.Pool],
        parents: dict[tuple[str, str], tuple[str, str]],
        rng: random.Random,
        number: int,
    ):
        self.schema, self.pools, self.parents, self.rng = schema, pools, parents, rng
        self.size = SIZES[number % len(SIZES)]
        self.null_rate = NULL_RATES[number % len(NULL_RATES)]
        self.duplicate_rate = DUPLICATE_RATES[number % len(DUPLICATE_RATES)]
        self.rows: dict[str, list[dict[str, Value]]] = {table: [] for table in schema.tables}
        # Spider names one column of a linking table's key; a key that refers elsewhere is not held unique.
        self.unique = {
            table: columns
            for table, columns in schema.primary_keys.items()
            if columns and not (len(columns) == 1 and (table, columns[0]) in self.parents)
        }

    def plant(self, witness: Witness) -> bool:
        """Add a witness's rows; False where the tables would grow too large, or its conditions cannot be met."""
        if not witness.solve(self.pools):
            return False
        needed: dict[str, int] = {}
        for row in witness.rows:
            needed[row.table] = needed.get(row.table, 0) + 1
        # A witness that finds room half-way in is cheaper than a second instance for it.
        if any(self.rows[table] and len(self.rows[table]) + more > MOST_ROWS for table, more in needed.items()):
            return False
        for row in witness.rows:
            self.rows[row.table].append(row.known())
        return True

    def finish(self) -> Instance:
        order = self._parents_first()
        for table in order:
            room = self.size - len(self.rows[table])
            self.rows[table] += [{} for _ in range(max(0, room))]
        for table in order:
            self._keys(table)
        for table in order:
            for row in self.rows[table]:
                self._complete(table, row)
            self._duplicate(table)
        rows = {}
        for table in self.schema.tables:
            self.rng.shuffle(self.rows[table])
            rows[table] = [[row[column] for column in self.schema.tables[table]] for row in self.rows[table]]
        return Instance(self.schema.ddl(keys=False), rows)

    def _parents_first(self) -> list[str]:
        order: list[str] = []
        waiting = list(self.schema.tables)
        while waiting:
            ready = [table for table in waiting if not self._waits(table, waiting)]
            for table in ready or waiting[:1]:  # a cycle of references is entered anywhere
                order.append(table)
                waiting.remove(table)
        return order

    def _waits(self, table: str, waiting: list[str]) -> bool:
        parents = (to for (child, _), (to, _) in self.parents.items() if child == table)
        return any(parent in waiting and parent != table for parent in parents)

    def _keys(self, table: str) -> None:
        """Give every row its primary key; a row whose key is taken is dropped."""
        columns = self.unique.get(table, [])
        if not columns:
            return
        taken: set[tuple[str, ...]] = set()
        kept = []
        # planted keys first, so that a key made up for another row cannot take their place
        for row in sorted(self.rows[table], key=lambda row: sum(column not in row for column in columns)):
            for _ in range(50):
                made = {column: row[column] if column in row else self._key(table, column) for column in columns}
                identity = tuple(values.identity(made[column]) for column in columns)
                if identity not in taken:
                    taken.add(identity)
                    row.update(made)
                    kept.append(row)
                    break
        self.rows[table] = kept

    def _key(self, table: str, column: str) -> Value:
        if (table, column) in self.parents:
            return self._reference(table, column)
        return self.pools[table, column].key(self.rng, 2 * len(self.rows[table]))

    def _complete(self, table: str, row: dict[str, Value]) -> None:
        key = self.unique.get(table, [])
        for column in self.schema.tables[table]:
            if column in row:
                continue
            if column not in key and self.rng.random() < self.null_rate:
                row[column] = None
            elif (table, column) in self.parents:
                row[column] = self._reference(table, column)
            else:
                row[column] = self.pools[table, column].value(self.rng)

    def _reference(self, table: str, column: str) -> Value:
        """A value that the column referred to holds, mostly."""
        parent, to = self.parents[table, column]
        there = [row[to] for row in self.rows[parent] if row.get(to) is not None]
        if there and self.rng.random() >= DANGLING_RATE:
            return self.rng.choice(there)
        return self.pools[table, column].value(self.rng)

    def _duplicate(self, table: str) -> None:
        """Copy some rows whole but for their key, since a missing DISTINCT shows on nothing else."""
        columns = self.unique.get(table, [])
        if any((table, column) in self.parents for column in columns):
            return
        taken = {tuple(values.identity(row[column]) for column in columns) for row in self.rows[table]}
        for row in list(self.rows[table]):
            if len(self.rows[table]) >= MOST_ROWS or self.rng.random() >= self.duplicate_rate:
                continue
            copy = {**row, **{column: self._key(table, column) for column in columns}}
            identity = tuple(values.identity(copy[column]) for column in columns)
            if not columns or identity not in taken:
                taken.add(identity)
                self.rows[table].append(copy)
