"""Spider's own examples of its classes, and what sqlglot cannot read."""

import pytest

from stages.sql.difficulty import difficulty


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT COUNT(*) FROM singer", "easy"),
        ("SELECT name FROM singer WHERE age > 20", "easy"),
        ("SELECT name, country FROM singer ORDER BY age DESC", "medium"),
        ("SELECT AVG(age), MIN(age), MAX(age) FROM singer WHERE country = 'France'", "medium"),
        ("SELECT T2.name, COUNT(*) FROM c AS T1 JOIN s AS T2 ON T1.id = T2.id GROUP BY T1.id", "medium"),
        ("SELECT name FROM stadium WHERE id NOT IN (SELECT stadium_id FROM concert)", "hard"),
        ("SELECT country FROM singer WHERE age > 40 INTERSECT SELECT country FROM singer WHERE age < 30", "hard"),
        ("SELECT a FROM t JOIN u ON t.x = u.x WHERE b LIKE '%c%' ORDER BY a", "extra"),
        ("SELECT T2.name FROM c AS T1 JOIN s AS T2 ON T1.i = T2.i WHERE T1.y = 2014 GROUP BY T2.i", "hard"),
        ("SELECT a FROM t WHERE b = (SELECT MAX(b) FROM t) AND c IN (SELECT c FROM u) ORDER BY d LIMIT 1", "extra"),
        ("SELECT FROM WHERE", "extra"),
    ],
)
def test_a_query_has_its_class(query, expected):
    assert difficulty(query) == expected
