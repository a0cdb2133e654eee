"""Rows of different lengths laid end to end, nothing padded, what they share computed once: a forward pass's input.

Rows whose prompts begin alike (the same schema, the same system text) form a tree: their common beginning is laid
once, then what is each row's own. Attention lets each own part see the beginning and itself, so that loss and
gradients are those of the rows one by one.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORED = -100
# A beginning shorter than this is not worth a cut: each cut costs a call of attention in every layer.
SHARED_AT_LEAST = 32


class Segment(NamedTuple):
    """Tokens start..end of a pack, that see those before them in the segment, and shared_start..shared_end before."""

    start: int
    end: int
    shared_start: int = 0
    shared_end: int = 0


@dataclass
class Pack:
    """Rows end to end, T tokens to compute.

    input_ids, position_ids: [1, T], positions counting from each row's beginning; targets: [T], the token that should
    follow each token, IGNORED where that is not supervised; rows: each row's id with the start and end of what is its
    own; row_tokens: the rows' tokens, shared ones counted for each.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    segments: tuple[Segment, ...]
    rows: tuple[tuple[str, int, int], ...]
    row_tokens: int

    @property
    def supervised(self) -> int:
        """How many tokens the loss counts."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Pack":
        input_ids, position_ids, targets = (x.to(device) for x in (self.input_ids, self.position_ids, self.targets))
        return dataclasses.replace(self, input_ids=input_ids, position_ids=position_ids, targets=targets)


@dataclass
class Tree:
    """Rows ({input_ids, labels}) whose first `shared` tokens are the same and not supervised."""

    rows: list[dict]
    shared: int

    def __len__(self) -> int:
        return self.shared + sum(len(row["input_ids"]) - self.shared for row in self.rows)


def pack(rows: Iterable[dict], tokens_per_pack: int) -> list[Pack]:
    """Lay rows ({id, input_ids, labels}) in as few packs of at most `tokens_per_pack` tokens as first-fit decreasing
    finds (Johnson 1973); a longer row has a pack of its own. `prompt_tokens` of a row, where there, is not read."""
    bins: list[list[Tree]] = []
    sizes: list[int] = []
    for tree in sorted(trees(rows, tokens_per_pack), key=len, reverse=True):
        place = next((i for i, size in enumerate(sizes) if size + len(tree) <= tokens_per_pack), None)
        if place is None:
            bins.append([tree])
            sizes.append(len(tree))
        else:
            bins[place].append(tree)
            sizes[place] += len(tree)
    return [_lay(members) for members in bins]


def trees(rows: Iterable[dict], tokens_per_pack: int) -> list[Tree]:
    """Rows with the beginnings they share. Sorted, rows that begin alike stand together; each joins the tree before
    it where that lets fewer tokens be computed than leaving it out would."""
    found: list[Tree] = []
    for row in sorted(rows, key=lambda row: row["input_ids"]):
        alone = Tree([row], 0)
        if found:
            last = found[-1]
            shared = common(last.rows[0], row) if len(last.rows) == 1 else min(last.shared, common(last.rows[0], row))
            joined = Tree([*last.rows, row], shared)
            if shared >= SHARED_AT_LEAST and len(joined) < len(last) + len(alone) and len(joined) <= tokens_per_pack:
                found[-1] = joined
                continue
        found.append(alone)
    return found


def common(one: dict, other: dict) -> int:
    """How many tokens two rows begin with alike, none of them supervised nor followed by one that is."""
    length = 0
    for a, b, label_a, label_b in zip(
        one["input_ids"], other["input_ids"], one["labels"], other["labels"], strict=False
    ):
        if label_a != IGNORED or label_b != IGNORED:
            return max(0, length - 1)  # the token before a supervised one predicts it, in each row its own
        if a != b:
            return length
        length += 1
    return max(0, length - 1)


def _lay(members: list[Tree]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    segments: list[Segment] = []
    rows: list[tuple[str, int, int]] = []
    for tree in members:
        shared = (len(ids), len(ids) + tree.shared)
        if tree.shared:
            ids += tree.rows[0]["input_ids"][: tree.shared]
            positions += range(tree.shared)
            targets += [IGNORED] * tree.shared
            segments.append(Segment(*shared))
        for row in tree.rows:
            start = len(ids)
            ids += row["input_ids"][tree.shared :]
            positions += range(tree.shared, len(row["input_ids"]))
            targets += [*row["labels"][tree.shared + 1 :], IGNORED]
            segments.append(Segment(start, len(ids), *shared))
            rows.append((row["id"], start, len(ids)))
    row_tokens = sum(len(row["input_ids"]) for tree in members for row in tree.rows)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        targets=torch.tensor(targets),
        segments=tuple(segments),
        rows=tuple(rows),
        row_tokens=row_tokens,
    )
