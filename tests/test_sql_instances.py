"""Filled instances: the same for the same seed, with results for the gold queries, and with wrong queries found out."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stages.sql import values
from stages.sql.instances import MOST_ROWS, Instance, fill, given
from stages.sql.schema import Schema, from_ddl, quoted

DDL = """
CREATE TABLE stadium (id INTEGER PRIMARY KEY, name TEXT, capacity INTEGER, opened DATE);
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
CREATE TABLE concert (id INTEGER PRIMARY KEY, theme TEXT, stadium_id TEXT REFERENCES stadium (id), year YEAR);
CREATE TABLE plays (concert_id INTEGER REFERENCES concert (id), singer_id INTEGER REFERENCES singer (id));
"""

QUERIES = [
    "SELECT COUNT(*) FROM singer",
    "SELECT name FROM singer WHERE country = 'France' AND age > 41",
    'SELECT name FROM singer WHERE country = "Zürich\'s"',
    "SELECT name FROM stadium WHERE capacity BETWEEN 5000 AND 10000",
    "SELECT name FROM stadium WHERE opened > '1999-12-31' AND opened < '2000-02-01'",
    "SELECT name FROM singer WHERE name LIKE '%Hey%' AND name NOT LIKE 'Hey%'",
    "SELECT theme FROM concert WHERE year = '2014' INTERSECT SELECT theme FROM concert WHERE year = 2015",
    "SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM plays)",
    "SELECT name FROM singer EXCEPT SELECT T1.name FROM singer AS T1 JOIN plays AS T2 ON T1.id = T2.singer_id",
    "SELECT T1.name FROM stadium AS T1 JOIN concert AS T2 ON T1.id = T2.stadium_id GROUP BY T1.id HAVING COUNT(*) > 12",
    "SELECT T1.name FROM singer AS T1 JOIN plays AS T2 ON T1.id = T2.singer_id JOIN concert AS T3 "
    "ON T2.concert_id = T3.id WHERE T3.theme = 'Free choice' AND T1.age < 20",
    "SELECT name FROM singer WHERE age > (SELECT MAX(age) FROM singer WHERE country = 'France')",
    "SELECT country FROM singer WHERE age IS NULL AND country IN ('Peru', 'Chad')",
    "SELECT country FROM singer GROUP BY country HAVING AVG(age) < -3",
]


@pytest.fixture(scope="module")
def schema() -> Schema:
    return from_ddl(DDL, name="concerts")


@pytest.fixture(scope="module")
def instances(schema: Schema) -> list[Instance]:
    return fill(schema, QUERIES, seed=7, count=6)


def opened(instance: Instance) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    for statement in instance.ddl:
        database.execute(statement)
    for table, rows in instance.rows.items():
        places = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT INTO {quoted(table)} VALUES ({places})", rows)
    return database


@pytest.mark.parametrize("query", QUERIES)
def test_every_gold_query_shows_something_on_some_instance(instances: list[Instance], query: str):
    shown = [opened(instance).execute(query).fetchall() for instance in instances]
    assert any(value is not None for rows in shown for row in rows for value in row)


@pytest.mark.parametrize(
    ("gold", "wrong"),
    [
        (QUERIES[1], "SELECT name FROM singer WHERE country = 'France' AND age >= 41"),
        (QUERIES[1], "SELECT name FROM singer WHERE country = 'France' OR age > 41"),
        (QUERIES[1], "SELECT name FROM singer WHERE country LIKE 'france' AND age > 41"),
        (QUERIES[3], "SELECT name FROM stadium WHERE capacity > 5000 AND capacity < 10000"),
        (QUERIES[5], "SELECT name FROM singer WHERE name LIKE '%Hey%'"),
        (QUERIES[6], "SELECT theme FROM concert WHERE year = 2014 OR year = 2015"),
        (QUERIES[7], "SELECT name FROM singer"),
        (QUERIES[9], QUERIES[9].replace("> 12", ">= 12")),
        (QUERIES[10], QUERIES[10].replace("< 20", "<= 20")),
        (QUERIES[11], QUERIES[11].replace("MAX", "MIN")),
        ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer"),
        ("SELECT COUNT(*) FROM singer", "SELECT COUNT(age) FROM singer"),
        ("SELECT COUNT(*) FROM singer", "SELECT COUNT(DISTINCT name) FROM singer"),
    ],
)
def test_a_near_miss_of_a_query_shows_another_result_on_some_instance(instances: list[Instance], gold: str, wrong: str):
    databases = [opened(instance) for instance in instances]
    assert any(sorted(one.execute(gold), key=repr) != sorted(one.execute(wrong), key=repr) for one in databases)


def test_instances_differ_in_size_and_stay_small(instances: list[Instance]):
    sizes = [len(instance.rows["singer"]) for instance in instances]
    assert len(set(sizes)) > 2
    assert all(0 < len(rows) <= MOST_ROWS for instance in instances for rows in instance.rows.values())


def test_primary_keys_are_unique_and_most_foreign_keys_point_at_a_row(instances: list[Instance]):
    hits = total = 0
    for instance in instances:
        keys = [row[0] for row in instance.rows["singer"]]
        assert None not in keys and len(set(keys)) == len(keys)
        total += sum(row[1] is not None for row in instance.rows["plays"])
        hits += sum(row[1] in keys for row in instance.rows["plays"])
    assert hits > 0.7 * total


def test_there_are_nulls_and_instances_without(instances: list[Instance]):
    nulls = [sum(row.count(None) for row in instance.rows["plays"]) for instance in instances]
    assert 0 in nulls and any(nulls)


def test_the_order_and_number_of_the_queries_do_not_matter(schema: Schema, instances: list[Instance]):
    assert fill(schema, [*reversed(QUERIES), QUERIES[0]], seed=7, count=6) == instances
    assert fill(schema, QUERIES, seed=8, count=6) != instances


def test_the_same_seed_gives_the_same_rows_whatever_the_hash_seed(instances: list[Instance]):
    program = (
        "from tests.test_sql_instances import *\n"
        "print(*(one.id for one in fill(from_ddl(DDL, name='concerts'), QUERIES, seed=7, count=6)))"
    )
    root = Path(__file__).parent.parent
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [instance.id for instance in instances]


def test_a_query_that_cannot_be_read_plants_nothing_and_breaks_nothing(schema: Schema):
    assert len(fill(schema, ["SELEC x", "SELECT nope FROM nowhere", "((((", ""], seed=0, count=2)) == 2


def test_a_key_of_one_number_that_the_inserts_leave_out_is_counted_on():
    rows = "INSERT INTO t VALUES (7, 'a'); INSERT INTO t (name) VALUES ('b'), ('c')"
    counted = given(from_ddl(f"CREATE TABLE t (id INT PRIMARY KEY, name TEXT); {rows}"))
    assert counted.rows == {"t": [[7, "a"], [8, "b"], [9, "c"]]}
    for key in ("", ", PRIMARY KEY (id, name)", ", PRIMARY KEY (name)"):
        as_they_are = given(from_ddl(f"CREATE TABLE t (id INT, name TEXT{key}); {rows}"))
        assert as_they_are.rows == {"t": [[7, "a"], [None, "b"], [None, "c"]]}


@pytest.mark.parametrize(
    ("value", "operator", "operand", "kind"),
    [
        (5, "=", "5", "number"),
        ("10", "<", 9, "text"),
        ("abc", ">", 999, "number"),
        ("HEY you", "like", "%hey%", "text"),
        (None, "null", None, "text"),
        (2014, "in", ("2013", "2014"), "time"),
    ],
)
def test_conditions_hold_by_sqlites_rules(value: object, operator: str, operand: object, kind: str):
    assert values.holds(value, operator, operand, kind)
    if operator in ("=", "<", ">"):
        declared = {"number": "NUMERIC", "text": "TEXT"}[kind]
        database = sqlite3.connect(":memory:")
        database.execute(f"CREATE TABLE t (c {declared})")
        database.execute("INSERT INTO t VALUES (?)", (value,))
        literal = f"'{operand}'" if isinstance(operand, str) else operand
        assert database.execute(f"SELECT c {operator} {literal} FROM t").fetchone() == (1,)
