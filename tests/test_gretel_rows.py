"""Rows as gretelai/synthetic_text_to_sql has them: questions whose context brings the tables and what they hold."""

import json
from pathlib import Path

import pytest
import ruamel.yaml

from stages import prepare
from stages.conversation import Conversation, read
from stages.params import load
from stages.refusal import Refusal
from stages.rows import Record
from stages.sql.execution import Sandbox
from stages.sql.instances import fill, given
from stages.sql.schema import from_ddl
from stages.tasks import text_to_sql

OPTIONS = {
    "name": "text_to_sql",
    "rows": "gretel.jsonl",
    "schemas": None,
    "columns": {"question": "sql_prompt", "query": "sql", "schema": "sql_context"},
    "schema_as": "ddl",
    "instances": 2,
    "seed": 0,
    "unusable": "refuse",
}

# question, context, query, a wrong query, what the right one shows on the context's own rows
ROWS = [
    (
        "What is the total volume of timber sold by each salesperson, sorted by salesperson?",
        "CREATE TABLE salesperson (salesperson_id INT, name TEXT, region TEXT); INSERT INTO salesperson "
        "(salesperson_id, name, region) VALUES (1, 'John Doe', 'North'), (2, 'Jane Smith', 'South'); "
        "CREATE TABLE timber_sales (sales_id INT, salesperson_id INT, volume REAL, sale_date DATE); INSERT INTO "
        "timber_sales (sales_id, salesperson_id, volume, sale_date) VALUES (1, 1, 120, '2021-01-01'), "
        "(2, 1, 150, '2021-02-01'), (3, 2, 180.5, '2021-01-01');",
        "SELECT s.name, SUM(t.volume) FROM timber_sales t JOIN salesperson s ON t.salesperson_id = s.salesperson_id "
        "GROUP BY s.salesperson_id, s.name ORDER BY s.name",
        "SELECT s.name, MAX(t.volume) FROM timber_sales t JOIN salesperson s ON t.salesperson_id = s.salesperson_id "
        "GROUP BY s.salesperson_id, s.name ORDER BY s.name",
        [("Jane Smith", 180.5), ("John Doe", 270)],
    ),
    (
        "Which plots were sown in spring 2021?",
        "CREATE TABLE plots (id INT PRIMARY KEY, sown DATE); "
        "INSERT INTO plots VALUES (1, DATE '2021-03-05'), (2, DATE '2021-07-01'), (3, '2021-05-31');",
        "SELECT id FROM plots WHERE sown BETWEEN '2021-03-01' AND '2021-05-31' ORDER BY id",
        "SELECT id FROM plots WHERE sown >= '2021-03-01' ORDER BY id",
        [(1,), (3,)],
    ),
    (
        "What is the average price of fair trade coffee?",
        "CREATE TABLE coffee (coffee_id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(255) NOT NULL, "
        "price DECIMAL(10, 2), fair_trade BOOLEAN DEFAULT FALSE) ENGINE=InnoDB; "
        "INSERT INTO coffee (name, price, fair_trade) VALUES ('Yirgacheffe', 12.50, TRUE), ('House', 7.25, false), "
        "('Huila', 10.00, TRUE);",
        "SELECT AVG(price) FROM coffee WHERE fair_trade = TRUE",
        "SELECT AVG(price) FROM coffee",
        [(11.25,)],
    ),
    (
        "Who wrote 'Don''t; won''t'?",
        "CREATE TABLE books (id INT, title VARCHAR(80), author VARCHAR(80)); INSERT INTO books (id, title, author) "
        "VALUES (1, 'Don''t; won''t', 'O''Hara'), (2, 'Do; will', 'Zoë');",
        "SELECT author FROM books WHERE title = 'Don''t; won''t'",
        "SELECT author FROM books WHERE title = 'Do; will'",
        [("O'Hara",)],
    ),
    (
        "How many donations came from each country?",
        "CREATE TABLE donors (donor_id SERIAL PRIMARY KEY, country VARCHAR(50)); "
        "CREATE TABLE donations (id SERIAL PRIMARY KEY, donor_id INT REFERENCES donors (donor_id), amount NUMERIC); "
        "INSERT INTO donors (country) VALUES ('Kenya'), ('Peru'); "
        "INSERT INTO donations (donor_id, amount) VALUES (1, 100), (2, 5.5), (2, 7);",
        "SELECT country, COUNT(*) FROM donors JOIN donations ON donors.donor_id = donations.donor_id GROUP BY country",
        "SELECT country, COUNT(*) FROM donors GROUP BY country",
        [("Kenya", 1), ("Peru", 2)],
    ),
    (
        "List the names of all lost artifacts.",
        "CREATE TABLE `artifacts` (`id` INT NOT NULL, `name` VARCHAR(255), `state` ENUM('lost', 'found'), "
        "PRIMARY KEY (`id`)); INSERT INTO `artifacts` (`id`, `name`, `state`) VALUES (1, 'Mask', 'lost'), "
        "(2, 'Bowl', 'found');",
        "SELECT `name` FROM `artifacts` WHERE `state` = 'lost'",
        "SELECT `name` FROM `artifacts` WHERE `state` = 'LOST'",
        [("Mask",)],
    ),
    (
        "How many orders does each region have?",
        "CREATE TABLE IF NOT EXISTS sales.orders (order_id INT, region VARCHAR(20)); "
        "INSERT INTO sales.orders (order_id, region) VALUES (1, 'EU'), (2, 'EU'), (3, 'US');",
        "SELECT region, COUNT(*) FROM orders GROUP BY region",
        "SELECT region, COUNT(DISTINCT region) FROM orders GROUP BY region",
        [("EU", 2), ("US", 1)],
    ),
    (
        "Which wells produced over 900 barrels?",
        "CREATE TABLE wells (well_id INT, name TEXT, barrels INT); INSERT INTO wells VALUES (1, 'A1', 950); "
        "INSERT INTO wells VALUES (2, 'B2', 900); CREATE VIEW big_wells AS SELECT * FROM wells WHERE barrels > 900;",
        "SELECT name FROM wells WHERE barrels > 900",
        "SELECT name FROM wells WHERE barrels >= 900",
        [("A1",)],
    ),
    (
        "What is the latest reading of each sensor?",
        "CREATE TABLE readings (sensor INT, taken TIMESTAMP DEFAULT CURRENT_TIMESTAMP, value DOUBLE PRECISION); "
        "INSERT INTO readings VALUES (1, '2022-01-01 08:00:00', -1.5), (1, TIMESTAMP '2022-01-02 08:00:00', NULL), "
        "(2, '2022-01-01 09:30:00', 4e-1);",
        "SELECT sensor, MAX(taken) FROM readings GROUP BY sensor",
        "SELECT sensor, MIN(taken) FROM readings GROUP BY sensor",
        [(1, "2022-01-02 08:00:00"), (2, "2022-01-01 09:30:00")],
    ),
    (
        "Which customers have no loan?",
        "CREATE TABLE customers (customer_id INT PRIMARY KEY, name VARCHAR(100)); "
        "CREATE TABLE loans (loan_id INT PRIMARY KEY, customer_id INT, amount DECIMAL(12, 2), "
        "CONSTRAINT fk FOREIGN KEY (customer_id) REFERENCES customers (customer_id)); "
        "INSERT INTO customers (customer_id, name) VALUES (1, 'Ann'), (2, 'Bo'), (3, 'Cy'); "
        "INSERT INTO loans (loan_id, customer_id, amount) VALUES (10, 1, 2500.75), (11, 3, 90);",
        "SELECT name FROM customers WHERE customer_id NOT IN (SELECT customer_id FROM loans)",
        "SELECT name FROM customers WHERE customer_id IN (SELECT customer_id FROM loans)",
        [("Bo",)],
    ),
    (
        "What are the three most frequent words?",
        "CREATE TABLE words (word TEXT, n INTEGER); INSERT INTO words SELECT 'a', 3 UNION ALL SELECT 'b', 7; "
        "INSERT INTO words (n, word) VALUES (5, 'c'), (1, 'd');",
        "SELECT word FROM words ORDER BY n DESC LIMIT 3",
        "SELECT word FROM words ORDER BY n LIMIT 3",
        [("b",), ("c",), ("a",)],
    ),
    (
        "Rank the players by points.",
        'CREATE TABLE "players" ("id" INT, "group" CHAR(1), points SMALLINT); -- the season of 2023\n'
        """INSERT INTO "players" ("id", "group", points) VALUES (1, 'A', 10), (2, 'A', 30), (3, 'B', 20);""",
        "SELECT id, RANK() OVER (ORDER BY points DESC) FROM players",
        "SELECT id, RANK() OVER (ORDER BY points) FROM players",
        [(2, 1), (3, 2), (1, 3)],
    ),
    (
        "How many patients did each clinic treat?",
        "CREATE TABLE clinics (id BIGINT PRIMARY KEY, name NVARCHAR(40)); CREATE TABLE treated (clinic BIGINT, "
        "patient UUID); INSERT INTO clinics VALUES (9007199254740993, 'North'); INSERT INTO treated VALUES "
        "(9007199254740993, '0a1b'), (9007199254740993, '007'), (9007199254740992, '7');",
        "SELECT c.name, COUNT(t.patient) FROM clinics AS c LEFT JOIN treated AS t ON c.id = t.clinic GROUP BY c.id",
        "SELECT c.name, COUNT(t.patient) FROM clinics AS c, treated AS t GROUP BY c.id",
        [("North", 2)],
    ),
]
# what is said of it, context, query
UNUSABLE = [
    ('near "FROM"', "CREATE TABLE t (id INT, d DATE)", "SELECT EXTRACT(YEAR FROM d) FROM t"),
    ("no such function: NOW", "CREATE TABLE t (d DATETIME); INSERT INTO t VALUES (NOW())", "SELECT d FROM t"),
    ("not authorized", "CREATE TABLE t (d DATE); INSERT INTO t VALUES (CURRENT_DATE)", "SELECT d FROM t"),
    ("has 2 columns but 1 values", "CREATE TABLE t (a INT, b INT); INSERT INTO t VALUES (1)", "SELECT a FROM t"),
    ("no such table: u", "CREATE TABLE t (a INT); INSERT INTO u VALUES (1)", "SELECT a FROM t"),
    ("no such table: v", "CREATE TABLE t (a INT); CREATE VIEW v AS SELECT a FROM t", "SELECT a FROM v"),
    ("hold bytes", "CREATE TABLE t (a BLOB); INSERT INTO t VALUES (x'00ff')", "SELECT a FROM t"),
    (
        "INSERT INTO t reads a table",
        "CREATE TABLE t (a INT); INSERT INTO t VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9); "
        "INSERT INTO t SELECT a.a FROM t a, t b, t c, t d, t e, t f, t g, t h",
        "SELECT a FROM t",
    ),
    (
        "not authorized",
        "CREATE TABLE t (a TEXT); INSERT INTO t VALUES (printf('%.*c', 900000000, 'x'))",
        "SELECT a FROM t",
    ),
    (
        "leaves state to its DEFAULT",
        "CREATE TABLE t (a INT, state TEXT DEFAULT 'open'); INSERT INTO t (a) VALUES (1)",
        "SELECT a FROM t WHERE state = 'open'",
    ),
    ("only CREATE TABLE", "CREATE TABLE t (a INT); UPDATE t SET a = 1", "SELECT a FROM t"),
    ("not authorized", "CREATE TABLE t (a INT)", "DELETE FROM t WHERE a = 1"),
    ("not authorized", "CREATE TABLE t (a INT)", "INSERT INTO t VALUES (1)"),
    ("not SQL that can be read", "CREATE TABLE t (id INT, tags TEXT[])", "SELECT id FROM t"),
]


def row(question: str, context: str, query: str) -> dict:
    """A row with all the columns that the data set has."""
    kind = {"domain": "forestry", "domain_description": "Timber and its sale.", "sql_complexity": "single join"}
    kind |= {"sql_task_type": "analytics and reporting", "sql_explanation": "It joins."}
    return {"id": 1, **kind, "sql_prompt": question, "sql_context": context, "sql": query}


def options(**changes) -> text_to_sql.Options:
    return text_to_sql.Options(**(OPTIONS | changes))


def conversations(*rows: dict, **changes) -> list[Conversation | Refusal]:
    records = [Record(f"gretel.jsonl line {number}", fields) for number, fields in enumerate(rows, start=1)]
    return list(text_to_sql.conversations({"rows": iter(records)}, options(**changes)))


@pytest.mark.parametrize(("question", "context", "query", "wrong", "shown"), ROWS, ids=[row[0] for row in ROWS])
def test_a_query_shows_on_the_contexts_own_rows_what_it_should(question, context, query, wrong, shown):
    with Sandbox() as sandbox:
        assert sandbox.run(given(from_ddl(context)), query).rows == shown


@pytest.mark.parametrize(("question", "context", "query", "wrong", "shown"), ROWS, ids=[row[0] for row in ROWS])
def test_the_reference_is_right_and_a_near_miss_is_wrong(question, context, query, wrong, shown):
    (found,) = conversations(row(question, context, query))
    assert "INSERT" not in found.prompt[0].content and found.prompt[0].content.endswith(question)
    scored = list(text_to_sql.score([found] * 2, [found.reference, wrong], options()))
    assert [score["execution_accuracy"] for score in scored] == [True, False]
    assert [score["valid_sql"] for score in scored] == [True, True]
    assert not scored[0]["empty_results"]


def test_only_the_inserted_rows_tell_this_wrong_query_from_the_right_one():
    tables = "CREATE TABLE trips (id INT, city VARCHAR(30), km DECIMAL(6, 1));"
    inserted = "INSERT INTO trips VALUES (1, 'Oslo', 4.5), (2, 'Vadsø', 777.7);"
    query, wrong = "SELECT COUNT(*) FROM trips", "SELECT SUM(city <> 'Vadsø' OR city IS NULL) FROM trips"
    for context, right in ((tables, True), (tables + inserted, False)):
        (found,) = conversations(row("How many trips were there?", context, query))
        assert next(text_to_sql.score([found], [wrong], options()))["execution_accuracy"] is right


def test_the_contexts_own_rows_are_one_instance_beside_the_fuzzed_ones():
    _, context, query, _, _ = ROWS[0]
    schema = from_ddl(context)
    bare = schema.model_copy(update={"inserts": []})
    assert fill(schema, [query], seed=0, count=3) == [given(schema), *fill(bare, [query], seed=0, count=3)]


def test_rows_of_one_schema_that_hold_other_values_are_judged_each_on_its_own():
    rows = [
        row(f"How many {name}s?", f"CREATE TABLE t (name TEXT); INSERT INTO t VALUES ('{name}')", "SELECT name FROM t")
        for name in ("Elk", "Owl")
    ]
    found = conversations(*rows)
    assert found[0].groups["database"] == found[1].groups["database"]
    wrong = "SELECT name FROM t WHERE name IS NOT 'Owl'"
    scored = list(text_to_sql.score(found, [wrong, wrong], options()))
    assert [score["execution_accuracy"] for score in scored] == [True, False]


@pytest.mark.parametrize(("said", "context", "query"), UNUSABLE)
def test_a_row_whose_sql_does_not_run_is_refused_by_its_place_or_dropped(said, context, query):
    with pytest.raises(Refusal, match=r"^gretel.jsonl line 1: ") as refused:
        conversations(row("?", context, query))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    dropped, kept = conversations(row("?", context, query), row(*ROWS[0][:3]), unusable="drop")
    assert isinstance(dropped, Refusal) and str(dropped) == str(refused.value)
    assert isinstance(kept, Conversation)


@pytest.mark.parametrize("wrong", [{"sql": 7}, {"sql": " "}, {}])
def test_a_row_of_another_form_is_refused_even_where_unusable_ones_are_dropped(wrong):
    fields = row("?", "CREATE TABLE t (a INT)", "SELECT a FROM t")
    del fields["sql"]
    with pytest.raises(Refusal, match=r"^gretel.jsonl line 1: (sql|query) "):
        conversations(fields | wrong, unusable="drop")


def test_the_recipe_reads_such_rows_and_drops_what_does_not_run():
    recipe = Path(__file__).parent.parent / "recipes/gretel.yaml"
    task = ruamel.yaml.YAML(typ="safe", pure=True).load(recipe.read_text(encoding="utf-8"))["task"]
    good, bad = row(*ROWS[0][:3]), row("?", *UNUSABLE[0][1:])
    assert [type(found) for found in conversations(good, bad, **task)] == [Conversation, Refusal]


@pytest.fixture
def prepared(tmp_path, params_file, monkeypatch):
    """Runs prepare on rows in the data set's form; gives what it counted."""
    monkeypatch.chdir(tmp_path)

    def go(rows: list[dict], **changes) -> dict:
        sides = {"prepare.group_by": "query", "prepare.validation": 0.2, "prepare.test": 0.4, "prepare.seed": 1}
        params_file(tmp_path, task=OPTIONS | changes, **sides)
        Path("data/raw").mkdir(parents=True, exist_ok=True)
        Path("data/raw/gretel.jsonl").write_text("\n".join(map(json.dumps, rows)))
        prepare.main(["data/raw", "data/conversations", "metrics/data.json"])
        return json.loads(Path("metrics/data.json").read_text())

    return go


def test_what_prepare_drops_is_counted_and_told_and_what_it_keeps_can_be_scored(prepared):
    bad = [row("?", context, query) for _, context, query in UNUSABLE]
    good = [row(question, context, query) for question, context, query, _, _ in ROWS]
    metrics = prepared([*bad, *good], unusable="drop")
    assert metrics["unusable"] == len(bad)
    assert metrics["train_rows"] + metrics["validation_rows"] + metrics["test_rows"] == len(good)
    told = Path("data/conversations/unusable.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in told] == [f"gretel.jsonl line {n}" for n in range(1, len(bad) + 1)]
    tested = list(read(Path("data/conversations/test.jsonl")))
    scored = list(text_to_sql.score(tested, [c.reference for c in tested], load().task))
    assert tested and all(score["execution_accuracy"] for score in scored)
    assert prepared(good)["unusable"] == 0
    assert not Path("data/conversations/unusable.txt").exists()


def test_when_every_row_is_unusable_the_first_is_told(prepared):
    with pytest.raises(Refusal, match=r"^no train rows out of 0; .*; 2 are unusable, the first: gretel.jsonl line 1: "):
        prepared([row("?", "CREATE TABLE t (a INT)", f"SELECT b FROM t LIMIT {n}") for n in (1, 2)], unusable="drop")


BIG = "CREATE TABLE t (a BIGINT); INSERT INTO t VALUES (9223372036854775807), (9223372036854775807);"


def test_a_reference_that_fails_only_when_it_runs_is_found_before_anything_is_trained():
    rows = conversations(row("?", BIG, "SELECT a FROM t"), row("??", BIG, "SELECT SUM(a) FROM t"))
    ((unusable, why),) = text_to_sql.unscorable(rows, options(unusable="drop"))
    assert unusable is rows[1]
    assert str(why) == (
        "gretel.jsonl line 2: the reference query does not run: integer overflow; mend it or leave the row out"
    )


def test_test_rows_that_cannot_be_scored_stop_prepare_or_are_dropped_and_counted(prepared):
    bad = [row(f"{n}?", BIG, f"SELECT SUM(a) FROM t LIMIT {n}") for n in range(1, 13)]
    good = [row(question, context, query) for question, context, query, _, _ in ROWS]
    with pytest.raises(Refusal, match=r"^gretel.jsonl line \d+: the reference query does not run: integer overflow"):
        prepared(bad + good)
    metrics = prepared(bad + good, unusable="drop")
    tested = list(read(Path("data/conversations/test.jsonl")))
    assert metrics["unusable"] > 0 and metrics["test_rows"] == len(tested) > 0
    assert not any("SUM(a)" in row.reference for row in tested)
    assert "integer overflow" in Path("data/conversations/unusable.txt").read_text()
