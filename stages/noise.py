"""Scores of test rows in; how far each could be off by chance out: intervals, paired differences, an exact test.

Rows of one group (paraphrases of one question, one author's quotations) are right or wrong together, so groups are
what is drawn and what is exchanged, never single rows.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

LOWER_IS_BETTER = ("loss", "memorised")
RESAMPLES = 10_000
AT_ONCE = 2_000_000  # counts held at a time
CONFIDENCE = 0.95
STEPS = 20_000  # what the exact test resolves where differences are not whole


@dataclass(frozen=True)
class Score:
    """One metric of R rows in G groups, each the mean of `values` weighted by `weights`: 1 for a share of rows, the
    number of tokens for a loss in nats a token. values, weights: [R]; groups: [R], each row's group."""

    values: np.ndarray
    weights: np.ndarray
    groups: np.ndarray

    @property
    def mean(self) -> float:
        return float((self.values * self.weights).sum() / self.weights.sum())

    def by_group(self) -> tuple[np.ndarray, np.ndarray]:
        """[G], [G]: each group's weighted sum and its weight, groups in sorted order."""
        names, index = np.unique(self.groups, return_inverse=True)
        sums = np.bincount(index, self.values * self.weights, len(names))
        return sums, np.bincount(index, self.weights, len(names))


@dataclass(frozen=True)
class Difference:
    """What `after` has over `before`; `p`: how likely a difference at least this large is when there is none."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_noise(self) -> bool:
        """Whether chance explains it: zero lies in the interval, or the test finds it likely."""
        return self.low <= 0 <= self.high or self.p > 1 - CONFIDENCE


def interval(score: Score, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of a mean (Efron 1979), groups drawn with replacement.

    Where every row of a share is right, or every row wrong, resampling shows nothing; then the exact binomial bound
    (Clopper and Pearson 1934) stands in, as if each group were one row.
    """
    if (score.weights == 1).all() and score.mean in (0.0, 1.0):
        bound = ((1 - CONFIDENCE) / 2) ** (1 / len(np.unique(score.groups)))
        return (0.0, 1 - bound) if score.mean == 0 else (bound, 1.0)
    sums, weights = score.by_group()
    (means,) = _resampled([(sums, weights)], seed)
    return _percentiles(means)


def difference(before: Score, after: Score, seed: int = 0) -> Difference:
    """The paired difference of two scores of the same rows, in the same order; the groups are those of `before`.

    The weights may differ, as the numbers of tokens do of two tokenizers: the exact test then exchanges what each
    group adds to the mean.
    """
    sums, weights = before.by_group()
    later, later_weights = dataclasses.replace(after, groups=before.groups).by_group()
    first, second = _resampled([(sums, weights), (later, later_weights)], seed)
    low, high = _percentiles(second - first)
    if np.array_equal(weights, later_weights):
        changes = later - sums
    else:
        changes = later / later_weights.sum() - sums / weights.sum()
    return Difference(after.mean - before.mean, low, high, sign_flip(changes))


def firsts(scores: list[Score], seed: int = 0) -> list[float]:
    """For each of several scores of the same rows, in the same order: the share of the bootstrap's draws of groups in
    which it is the highest. One that several have is shared among them."""
    means = np.stack(_resampled([score.by_group() for score in scores], seed))
    highest = means == means.max(axis=0)
    return (highest / highest.sum(axis=0)).mean(axis=1).tolist()


def verdict(name: str, found: Difference) -> str:
    """`noise`, or whether the score of that name got `better` or `worse`."""
    if found.is_noise:
        return "noise"
    return "better" if (found.mean < 0) == (name in LOWER_IS_BETTER) else "worse"


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p of the paired permutation test (Fisher 1935) over groups, exact: every way to give each group's
    difference the other sign, counted by convolution. Groups of one 0/1 row make it McNemar's exact test.

    differences: [G], each group's sum after less its sum before. Whole ones, as of 0/1 scores, are taken as they are,
    others rounded to the STEPS-th part of their total.
    """
    total = np.abs(differences).sum()
    whole = np.array_equal(differences, np.rint(differences))
    steps = np.rint(differences if whole or not total else differences * (STEPS / total)).astype(int)
    chances = np.ones(1)  # of each sum, the smallest first
    for step in np.abs(steps[steps != 0]):
        nothing = np.zeros(2 * step)
        chances = (np.concatenate([chances, nothing]) + np.concatenate([nothing, chances])) / 2
    sums = np.abs(np.arange(len(chances)) - len(chances) // 2)
    return min(1.0, float(chances[sums >= abs(steps.sum())].sum()))


def _resampled(scores: list[tuple[np.ndarray, np.ndarray]], seed: int) -> list[np.ndarray]:
    """For each pair of sums and weights, [G] both, the mean in each of RESAMPLES draws of G groups, the same draws
    for all: [N]."""
    chance = np.random.default_rng(seed)
    groups = len(scores[0][0])
    found: list[list[np.ndarray]] = [[] for _ in scores]
    left = RESAMPLES
    while left:
        draws = min(left, max(1, AT_ONCE // groups))
        counts = chance.multinomial(groups, np.full(groups, 1 / groups), size=draws)
        for kept, (sums, weights) in zip(found, scores, strict=True):
            kept.append(counts @ sums / (counts @ weights))
        left -= draws
    return [np.concatenate(kept) for kept in found]


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def read(rows: list[dict]) -> dict[str, Score]:
    """The scores of the answers that evaluate wrote, in the rows' order: each of the task's, stop_rate, and loss."""
    groups = np.array([row["group"] for row in rows])
    ones = np.ones(len(rows))
    found = {
        name: Score(np.array([float(row["scores"][name]) for row in rows]), ones, groups) for name in rows[0]["scores"]
    }
    found["stop_rate"] = Score(np.array([float(row["stopped"]) for row in rows]), ones, groups)
    tokens = np.array([float(row["tokens"]) for row in rows])
    nats = np.array([float(row["nats"]) for row in rows])
    found["loss"] = Score(nats / tokens, tokens, groups)
    return found
