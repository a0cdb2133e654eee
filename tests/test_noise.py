"""Intervals and tests against what is known of them: closed forms, enumeration, simulated coverage."""

import itertools

import numpy as np
import pytest

from stages import noise
from stages.noise import Score


def share(values, groups=None) -> Score:
    values = np.array(values, dtype=float)
    return Score(values, np.ones(len(values)), np.arange(len(values)) if groups is None else np.array(groups))


def test_the_interval_of_a_share_is_near_the_normal_one_for_many_rows():
    low, high = noise.interval(share([1] * 300 + [0] * 700))
    assert (low, high) == (pytest.approx(0.3 - 1.96 * 0.0145, abs=0.002), pytest.approx(0.3 + 1.96 * 0.0145, abs=0.002))


def test_rows_of_one_group_count_as_one():
    values = [1] * 150 + [0] * 350
    alone = noise.interval(share(values))
    together = noise.interval(share(values, [i // 10 for i in range(500)]))
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])  # √10, were the groups' sizes endless


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    chance = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = noise.interval(share(chance.random(100) < 0.3), seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("value", "expected"), [(0.0, (0.0, 0.0362)), (1.0, (0.9638, 1.0))])
def test_a_share_of_none_or_all_has_the_exact_binomial_bound(value, expected):
    assert noise.interval(share([value] * 100)) == pytest.approx(expected, abs=1e-4)


def test_the_mean_and_interval_of_a_loss_are_by_token():
    score = Score(np.array([1.0, 3.0]), np.array([30.0, 10.0]), np.array(["a", "b"]))
    assert score.mean == 1.5
    assert noise.interval(score) == (1.0, 3.0)


@pytest.mark.parametrize("differences", [[1, 1, 1, -1, 0, 2], [3, -2, 1], [0, 0], [], [1, 1, 1, 1, 1, 1, 1]])
def test_the_exact_test_is_that_of_trying_every_sign(differences):
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    expected = sum(total >= abs(sum(differences)) for total in sums) / len(signs)
    assert noise.sign_flip(np.array(differences, dtype=float)) == pytest.approx(expected)


def test_the_exact_test_takes_differences_that_are_not_whole():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 12)
    sums = np.array(list(itertools.product((1, -1), repeat=12))) @ differences
    expected = (np.abs(sums) >= abs(differences.sum())).mean()
    assert noise.sign_flip(differences) == pytest.approx(expected, abs=0.003)


def test_thousands_of_groups_take_no_time_and_no_memory():
    chance = np.random.default_rng(0)
    before, after = share(chance.random(5000) < 0.3), share(chance.random(5000) < 0.5)
    found = noise.difference(before, after)
    assert not found.is_noise and found.p < 1e-9 and found.low < found.mean < found.high


def test_a_difference_of_nothing_is_noise():
    score = share([0, 1, 1, 0])
    assert noise.difference(score, score) == noise.Difference(0.0, 0.0, 0.0, 1.0)
    assert noise.difference(score, score).is_noise


def test_a_difference_is_paired():
    """Two models that each hold 50% but differ on few rows differ by less than two that were drawn apart."""
    before = share([0, 1] * 100)
    after = share([0, 1] * 95 + [1, 1] * 5)
    found = noise.difference(before, after)
    assert found.mean == pytest.approx(0.025)
    assert found.high - found.low < 0.06  # unpaired: 0.2
    assert found.p == pytest.approx(2 / 2**5)


def test_the_same_answers_give_the_same_numbers_twice():
    score = share([0, 1, 1, 0, 1, 0, 0, 1])
    assert noise.interval(score) == noise.interval(score)


def test_scores_are_read_from_the_answers_that_evaluate_writes():
    rows = [
        {"scores": {"exact_match": True}, "stopped": True, "nats": 4.0, "tokens": 2, "group": "a"},
        {"scores": {"exact_match": False}, "stopped": True, "nats": 2.0, "tokens": 4, "group": "b"},
    ]
    found = noise.read(rows)
    assert {name: score.mean for name, score in found.items()} == {"exact_match": 0.5, "stop_rate": 1.0, "loss": 1.0}


def test_runs_grouped_otherwise_or_counted_in_other_tokens_are_compared_row_by_row():
    before = Score(np.array([2.0, 3.0, 4.0]), np.array([10.0, 10.0, 10.0]), np.array(["a", "a", "b"]))
    after = Score(np.array([1.0, 2.0, 3.0]), np.array([20.0, 5.0, 5.0]), np.array(["x", "y", "z"]))
    found = noise.difference(before, after)
    assert found.mean == pytest.approx(1.5 - 3.0)
    assert found.low <= found.mean <= found.high < 0
    assert found.p == pytest.approx(0.5)  # two groups, both lower: two of four ways to give the signs


@pytest.mark.parametrize("name", ["loss", "memorised"])
def test_less_of_a_loss_and_less_copied_is_better(name):
    down = noise.Difference(-0.2, -0.3, -0.1, 0.01)
    up = noise.Difference(0.2, 0.1, 0.3, 0.01)
    assert [noise.verdict(name, found) for found in (down, up)] == ["better", "worse"]
    assert [noise.verdict("chrf", found) for found in (down, up)] == ["worse", "better"]
