"""Which rows each optimizer step learns from, decided before training: a function of the rows and the seed alone."""

import math
import random

from stages.models.packs import SHARED_AT_LEAST, beginning, common


def schedule(rows: list[dict], batch_size: int, epochs: float, seed: int, order: str) -> list[list[int]]:
    """Row numbers, step by step; an epoch takes every row once, and its last step may be smaller.

    order: "shuffled"; or "shared", also at random, but rows whose prompts begin alike fall into the same step where
    they can, so that a pack computes their beginning once.
    """
    clusters = _clusters(rows) if order == "shared" else [list(range(len(rows)))]
    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        chance = random.Random(f"{seed}/{epoch}")
        steps += _epoch(clusters, batch_size, chance)
    return steps[: max(1, math.ceil(epochs * math.ceil(len(rows) / batch_size)))]


def _epoch(clusters: list[list[int]], batch_size: int, chance: random.Random) -> list[list[int]]:
    whole, rest = [], []
    for cluster in clusters:
        shuffled = chance.sample(cluster, len(cluster))
        cut = len(shuffled) - len(shuffled) % batch_size
        whole += [shuffled[i : i + batch_size] for i in range(0, cut, batch_size)]
        rest += shuffled[cut:]  # a cluster's remainder keeps together where the next step has room
    whole += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    return chance.sample(whole, len(whole))


def _clusters(rows: list[dict]) -> list[list[int]]:
    """Row numbers, those together of which each begins as the one before it (sorted) for SHARED_AT_LEAST tokens or
    half of its prompt, whichever is more."""
    order = sorted(range(len(rows)), key=lambda i: beginning(rows[i]))
    clusters: list[list[int]] = []
    for number in order:
        row = rows[number]
        enough = max(SHARED_AT_LEAST, row["prompt_tokens"] // 2)
        if clusters and common(rows[clusters[-1][-1]], row) >= enough:
            clusters[-1].append(number)
        else:
            clusters.append([number])
    return clusters
