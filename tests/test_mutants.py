"""The mutants that bench/evaluation.py measures the instances with."""

import pytest

from bench.mutants import mutants
from stages.sql.normal import parsed


@pytest.mark.parametrize(
    ("query", "kind", "mutant"),
    [
        ("SELECT name FROM singer WHERE age > 20", "predicate", "SELECT name FROM singer"),
        ("SELECT name FROM singer WHERE age > 20", "comparison", "SELECT name FROM singer WHERE age >= 20"),
        ("SELECT name FROM singer WHERE age > 20", "literal", "SELECT name FROM singer WHERE age > 21"),
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "predicate", "SELECT a FROM t WHERE c = 2"),
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "connective", "SELECT a FROM t WHERE b = 1 OR c = 2"),
        ("SELECT MAX(age) FROM singer", "aggregate", "SELECT MIN(age) FROM singer"),
        ("SELECT a.x FROM a JOIN b ON a.y = b.y", "join", "SELECT a.x FROM a LEFT JOIN b ON a.y = b.y"),
        ("SELECT DISTINCT name FROM singer", "distinct", "SELECT name FROM singer"),
        ("SELECT name FROM singer", "distinct", "SELECT DISTINCT name FROM singer"),
        ("SELECT name FROM singer ORDER BY age LIMIT 1", "limit", "SELECT name FROM singer ORDER BY age LIMIT 2"),
        ("SELECT name FROM singer ORDER BY age", "order", "SELECT name FROM singer ORDER BY age DESC"),
        ("SELECT name FROM singer ORDER BY age", "order", "SELECT name FROM singer"),
        ("SELECT a FROM t UNION SELECT b FROM t", "set", "SELECT a FROM t INTERSECT SELECT b FROM t"),
    ],
)
def test_a_query_has_its_mutant(query, kind, mutant):
    assert (kind, mutant) in list(mutants(query))


def test_no_mutant_is_the_query_and_each_can_be_read():
    query = "SELECT T1.a, COUNT(*) FROM t AS T1 JOIN u AS T2 ON T1.x = T2.x WHERE T1.b > 3 OR T2.c = 'd' GROUP BY T1.a"
    texts = [text for _, text in mutants(query)]
    assert len(texts) == len(set(texts)) > 8
    assert query not in texts and all(parsed(text) for text in texts)


def test_what_is_no_query_has_none():
    assert list(mutants("DROP TABLE singer")) == []
