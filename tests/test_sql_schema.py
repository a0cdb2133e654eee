"""Schemas and the normal form of queries on them."""

import json
import sqlite3

import pytest

from stages.refusal import Refusal
from stages.sql import scope
from stages.sql.normal import collapsed, key, normal, parsed
from stages.sql.schema import Schema, from_ddl, from_spider, quoted


def entry() -> dict:
    """A database in the form of Spider's tables.json."""
    columns = [
        (0, "Singer_ID", "number"),
        (0, "Name", "text"),
        (0, "group", "text"),
        (1, "Concert ID", "number"),
        (1, "Year", "time"),
        (1, "Singer", "number"),
        (2, "seq", "number"),
    ]
    return {
        "db_id": "concerts",
        "table_names_original": ["singer", "Concert", "sqlite_sequence"],
        "column_names_original": [[-1, "*"], *([table, name] for table, name, _ in columns)],
        "column_types": ["text", *(kind for _, _, kind in columns)],
        "primary_keys": [1, 4],
        "foreign_keys": [[6, 1]],
    }


@pytest.fixture
def schema() -> Schema:
    return from_spider(entry())


def test_a_spider_entry_becomes_tables_keys_and_links_without_sqlite_tables(schema: Schema):
    assert list(schema.tables) == ["singer", "Concert"]
    assert schema.tables["Concert"] == {"Concert ID": "number", "Year": "time", "Singer": "number"}
    assert schema.primary_keys == {"singer": ["Singer_ID"], "Concert": ["Concert ID"]}
    link = schema.foreign_keys[0]
    assert (link.table, link.column, link.to_table, link.to_column) == ("Concert", "Singer", "singer", "Singer_ID")


def test_the_ddl_is_accepted_by_sqlite_with_odd_names_quoted(schema: Schema):
    database = sqlite3.connect(":memory:")
    for statement in schema.ddl():
        database.execute(statement)
    assert '"group" TEXT' in schema.ddl()[0]
    assert "Singer NUMERIC REFERENCES singer (Singer_ID)" in schema.ddl()[1]
    assert [row[1] for row in database.execute("PRAGMA table_info(Concert)")] == list(schema.tables["Concert"])


def test_the_compact_form_is_one_line_a_table(schema: Schema):
    assert schema.compact() == "singer(Singer_ID, Name, group)\nConcert(Concert ID, Year, Singer)"


def test_a_schema_survives_json(schema: Schema):
    text = json.dumps(schema.model_dump(exclude_defaults=True))
    assert Schema.model_validate(json.loads(text)) == schema


def test_every_keyword_is_quoted_where_sqlite_needs_it():
    database = sqlite3.connect(":memory:")
    for word in ["select", "Order", "group", "values", "current_date", "full", "a b", 'a"b', "1st", "key", "é"]:
        name = quoted(word)
        database.execute(f"CREATE TABLE {name} ({name} TEXT)")
        assert database.execute(f"SELECT {name} FROM {name} AS t WHERE t.{name} IS NULL").fetchall() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("db_id", None),
        ("table_names_original", "singer"),
        ("column_names_original", [[9, "x"]] * 8),
        ("column_types", ["text"]),
        ("column_types", ["text", "decimal", "text", "text", "text", "text", "text", "text"]),
        ("primary_keys", [99]),
        ("primary_keys", None),
        ("foreign_keys", [[1]]),
        ("foreign_keys", [[0, 1]]),
    ],
)
def test_a_malformed_entry_is_refused_in_one_line_that_names_database_and_field(field: str, value: object):
    broken = {**entry(), field: value}
    with pytest.raises(Refusal) as refusal:
        from_spider(broken)
    assert field in str(refusal.value)
    assert field == "db_id" or "concerts" in str(refusal.value)


def test_two_columns_of_one_name_are_refused():
    broken = entry()
    broken["column_names_original"][2] = [0, "SINGER_id"]
    broken["column_names_original"][1] = [0, "singer_ID"]
    with pytest.raises(Refusal, match="columns of singer"):
        from_spider(broken)


def test_create_table_statements_become_a_schema_and_inserts_are_kept():
    schema = from_ddl(
        """CREATE TABLE dept (id INTEGER PRIMARY KEY, "full name" VARCHAR(20), since DATE);
        CREATE TABLE emp (id INT, dept_id INT REFERENCES dept, paid DECIMAL(10, 2), on_leave BOOLEAN, photo BLOB,
            PRIMARY KEY (id), FOREIGN KEY (DEPT_ID) REFERENCES dept (ID));
        INSERT INTO dept (id, "full name") VALUES (1, 'R;D');"""
    )
    assert schema.tables["dept"] == {"id": "number", "full name": "text", "since": "time"}
    assert schema.tables["emp"] == {
        "id": "number",
        "dept_id": "number",
        "paid": "number",
        "on_leave": "boolean",
        "photo": "others",
    }
    assert schema.primary_keys == {"dept": ["id"], "emp": ["id"]}
    assert {(link.column, link.to_table, link.to_column) for link in schema.foreign_keys} == {("dept_id", "dept", "id")}
    assert len(schema.inserts) == 1 and "R;D" in schema.inserts[0]


def test_an_enum_is_text_and_a_view_a_comment_or_a_tables_schema_name_is_passed_over():
    schema = from_ddl(
        """CREATE TABLE shop.item (state ENUM('new', 'old'), size NUMBER); -- all there is
        CREATE VIEW v AS SELECT 1; INSERT INTO shop.item VALUES ('new', 1)"""
    )
    assert schema.tables == {"item": {"state": "text", "size": "number"}}
    assert schema.inserts == ["INSERT INTO item VALUES ('new', 1)"]


@pytest.mark.parametrize("text", ["", "not sql at all (", "DROP TABLE x", "CREATE VIEW v AS SELECT 1", "SELECT 1"])
def test_other_text_than_create_table_is_refused(text: str):
    with pytest.raises(Refusal):
        from_ddl(text)


@pytest.mark.parametrize(
    ("query", "form"),
    [
        ("select  count( * )\n from SINGER ;", "SELECT COUNT(*) FROM singer"),
        ('select name from singer where name = "O\'Neil"', "SELECT Name FROM singer WHERE Name = 'O''Neil'"),
        ('select "name" from singer', "SELECT Name FROM singer"),
        (
            "select t1.NAME from singer t1 join concert as t2 on t2.singer=t1.singer_id",
            "SELECT T1.Name FROM singer AS T1 JOIN Concert AS T2 ON T2.Singer = T1.Singer_ID",
        ),
        ("select name from singer where name <> 'a'", "SELECT Name FROM singer WHERE Name != 'a'"),
        (
            "select name from singer where singer_id not in (select singer from concert)",
            "SELECT Name FROM singer WHERE Singer_ID NOT IN (SELECT Singer FROM Concert)",
        ),
        ("select name from singer where name is not null", "SELECT Name FROM singer WHERE Name IS NOT NULL"),
        ("select [concert id] from concert order by year asc", 'SELECT "Concert ID" FROM Concert ORDER BY Year'),
        (
            'select count(*) as "how many" from singer group by "group" order by "how many"',
            'SELECT COUNT(*) AS "how many" FROM singer GROUP BY "group" ORDER BY "how many"',
        ),
        (
            'select name from singer -- the names\n where name like "%A%"',
            "SELECT Name FROM singer WHERE Name LIKE '%A%'",
        ),
        # `year` is a column, yet of no table in this FROM: SQLite takes it for a text
        ('select name from singer where name = "year"', "SELECT Name FROM singer WHERE Name = 'year'"),
        # a subquery sees the columns of the query around it
        (
            'select name from singer where exists (select 1 from concert where singer = "singer_id")',
            "SELECT Name FROM singer WHERE EXISTS(SELECT 1 FROM Concert WHERE Singer = Singer_ID)",
        ),
    ],
)
def test_a_query_has_one_normal_form(schema: Schema, query: str, form: str):
    assert normal(query, schema) == form
    assert normal(form, schema) == form


@pytest.mark.parametrize("query", ["SELEC name  FROM singer", "SELECT name; SELECT 2"])
def test_what_cannot_be_read_keeps_its_words(schema: Schema, query: str):
    assert normal(query, schema) == collapsed(query)


@pytest.mark.parametrize("query", ["SELECT T1.* FROM singer AS T1", "SELECT t . 'x'", "SELECT 1 ON END LIKE IS . NULL"])
def test_names_that_are_no_names_do_not_stop_it(schema: Schema, query: str):
    assert "SELECT" in normal(query, schema)
    assert key(query, schema) == normal(query, schema).lower()


def test_whitespace_in_quotes_is_kept():
    assert collapsed(" SELECT  'a  b;' /* c */ FROM\n t ; ") == "SELECT 'a  b;' FROM t"


def test_a_query_nested_too_deep_is_not_parsed(schema: Schema):
    deep = "SELECT " + "(" * 500 + "1" + ")" * 500
    assert normal(deep, schema) == deep


def test_paraphrases_share_a_key_and_another_literal_has_another(schema: Schema):
    one = key("SELECT name FROM singer WHERE name = 'A'", schema)
    assert one == key('select NAME from Singer where Name="A" ;', schema)
    assert one != key("SELECT name FROM singer WHERE name = 'B'", schema)


def test_a_name_is_looked_up_in_the_innermost_from_first(schema: Schema):
    tree = parsed("SELECT name FROM singer AS T1 WHERE singer_id IN (SELECT T1.singer FROM concert AS T1)")
    places = {column.sql(): scope.place(column, schema) for column in tree.find_all(scope.exp.Column)}
    assert places["T1.singer"].table == "Concert"
    assert places["singer_id"].table == "singer"
