"""Whether two results are equal, and the verdict over all instances."""

import pytest

from stages.refusal import Refusal
from stages.sql.comparison import equal, is_ordered, is_telling, verdict
from stages.sql.execution import Failure, Rows, Timeout


def test_rows_are_compared_as_a_multiset():
    assert equal([(1,), (2,), (2,)], [(2,), (1,), (2,)], ordered=False)
    assert not equal([(1,), (2,), (2,)], [(1,), (1,), (2,)], ordered=False)
    assert not equal([(1,)], [(1,), (1,)], ordered=False)


def test_order_counts_where_the_gold_query_orders():
    assert not equal([(1,), (2,)], [(2,), (1,)], ordered=True)
    assert equal([(1,), (2,)], [(1,), (2,)], ordered=True)


def test_columns_may_stand_in_another_order_but_rows_stay_together():
    assert equal([("a", 1), ("b", 2)], [(1, "a"), (2, "b")], ordered=True)
    assert not equal([("a", 1), ("b", 2)], [(2, "a"), (1, "b")], ordered=False)
    assert equal([(1, 2, 1), (2, 1, 1)], [(2, 1, 1), (1, 2, 1)], ordered=True)


def test_one_more_column_is_another_result():
    assert not equal([(1,)], [(1, 1)], ordered=False)


def test_numbers_are_equal_within_a_millionth_and_text_exactly():
    assert equal([(0.1 + 0.2, 3)], [(0.3, 3.0)], ordered=False)
    assert not equal([(1.0,)], [(1.00001,)], ordered=False)
    assert not equal([(1,)], [("1",)], ordered=False)
    assert not equal([("a",)], [("A",)], ordered=False)
    assert not equal([(b"a",)], [("a",)], ordered=False)
    assert equal([(float("inf"),)], [(float("inf"),)], ordered=False)
    assert not equal([(2**53,)], [(2**53 + 1,)], ordered=False)


def test_null_equals_null_and_nothing_else():
    assert equal([(None,)], [(None,)], ordered=False)
    assert not equal([(None,)], [(0,)], ordered=False)
    assert not equal([(None,)], [("",)], ordered=False)


def test_floats_that_round_apart_still_find_their_row():
    low, high = 0.123456785 - 1e-12, 0.123456785 + 1e-12
    assert equal([(low, "b"), (high, "a")], [(high, "b"), (low, "a")], ordered=False)


def test_many_equal_columns_end_soon():
    row = tuple([1] * 40)
    assert equal([row], [row], ordered=False)
    assert not equal([(1,) * 12 + (2, 3), (1,) * 12 + (3, 2)], [(1,) * 12 + (2, 2), (1,) * 12 + (3, 3)], ordered=False)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t INTERSECT SELECT b FROM u ORDER BY 1 LIMIT 2", True),
        ("SELECT a FROM t WHERE b = (SELECT b FROM u ORDER BY c LIMIT 1)", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT RANK() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = ' order by '", False),
    ],
)
def test_only_an_order_by_of_the_whole_query_orders(query: str, ordered: bool):
    assert is_ordered(query) is ordered


ONE, TWO = Rows([(1,)]), Rows([(2,)])


def test_a_prediction_is_right_when_equal_on_every_instance():
    assert verdict([ONE, TWO], [ONE, TWO], ordered=False).right
    wrong = verdict([ONE, TWO], [ONE, ONE], ordered=False)
    assert (wrong.right, wrong.valid) == (False, True)
    assert "instance 1" in wrong.why and wrong.instance == 1


@pytest.mark.parametrize("outcome", [Failure("no such column: x"), Timeout(2)])
def test_a_prediction_that_does_not_run_is_neither_right_nor_valid(outcome: Failure | Timeout):
    judged = verdict([ONE, TWO], [ONE, outcome], ordered=False)
    assert (judged.right, judged.valid, judged.instance) == (False, False, 1)
    assert judged.why


def test_a_truncated_result_equals_nothing():
    judged = verdict([ONE], [Rows([(1,)], truncated=True)], ordered=False)
    assert (judged.right, judged.valid) == (False, True)


@pytest.mark.parametrize("outcome", [Failure("no"), Timeout(2), Rows([(1,)], truncated=True)])
def test_a_gold_query_that_does_not_run_is_no_wrong_answer(outcome: Failure | Timeout | Rows):
    with pytest.raises(Refusal, match="gold query"):
        verdict([outcome], [ONE], ordered=False)
    with pytest.raises(Refusal, match="gold query"):
        verdict([], [], ordered=False)


def test_outcomes_that_are_missing_are_a_bug_and_no_verdict():
    with pytest.raises(ValueError, match="1 outcomes for 2"):
        verdict([ONE, TWO], [ONE], ordered=False)


def test_empty_and_null_results_tell_nothing():
    assert not is_telling([Rows([]), Rows([(None,)])])
    assert is_telling([Rows([]), Rows([(0,)])])
