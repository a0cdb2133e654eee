"""Rows of different lengths laid end to end, nothing padded, what they share computed once: a forward pass's input.

Rows whose prompts begin alike (the same schema, the same system text) form a tree: their common beginning is laid
once, then what is each row's own. Attention lets each own part see the beginning and itself, so that loss and
gradients are those of the rows one by one.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

IGNORED = -100
# A beginning shorter than this is not worth a cut: each cut costs a call of attention in every layer.
SHARED_AT_LEAST = 32


class Sight(NamedTuple):
    """What each of S segments sees, as flash attention takes it: segment i's queries are the pack's tokens
    queries[i]..queries[i + 1]; its keys are index[keys[i]]..index[keys[i + 1]], or those tokens themselves where no
    segment shares any (index: None). The last query stands at the last key.

    queries, keys: int32 [S + 1]; index: int64 [K]; most_queries, most_keys: of one segment.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    index: torch.Tensor | None
    most_queries: int
    most_keys: int


class Segment(NamedTuple):
    """Tokens start..end of a pack, that see those before them in the segment, and shared_start..shared_end before."""

    start: int
    end: int
    shared_start: int = 0
    shared_end: int = 0


@dataclass
class Pack:
    """Rows end to end, T tokens to compute.

    input_ids, position_ids: [1, T], positions counting from each row's beginning; places: [N], those of the tokens
    whose next one is supervised; targets: [N], that next one; rows: each row's id with the start and end of what is
    its own; row_tokens: the rows' tokens, shared ones counted for each; sight: on a GPU, the segments as its
    attention takes them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    segments: tuple[Segment, ...]
    rows: tuple[tuple[str, int, int], ...]
    row_tokens: int
    sight: Sight | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    @property
    def supervised(self) -> int:
        """How many tokens the loss counts."""
        return len(self.targets)

    def to(self, device: torch.device | str, flash: bool = False) -> "Pack":
        """The pack on that device, nothing waited for; with `flash`, its segments as `sight`."""
        names = ("input_ids", "position_ids", "places", "targets")
        laid = None
        if flash:
            laid = sight(self.segments)
            laid = Sight(*(moved(value, device) if isinstance(value, torch.Tensor) else value for value in laid))
        return dataclasses.replace(self, **{name: moved(getattr(self, name), device) for name in names}, sight=laid)


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on that device; a GPU fetches it when it comes to it."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class Tree:
    """Rows ({input_ids, labels}) whose first `shared` tokens are the same and not supervised."""

    rows: list[dict]
    shared: int

    def __len__(self) -> int:
        return self.shared + sum(len(row["input_ids"]) - self.shared for row in self.rows)


def pack(rows: Iterable[dict], tokens_per_pack: int) -> list[Pack]:
    """Lay rows ({id, input_ids, labels}; lists, or arrays, which take a tenth of the time) in as few packs of at most
    `tokens_per_pack` tokens as first-fit decreasing finds (Johnson 1973); a longer row has a pack of its own. A row's
    `prompt_tokens`, where there, is not read."""
    return [_lay(members) for members in _fitted(rows, tokens_per_pack)]


def sizes(rows: Iterable[dict], tokens_per_pack: int) -> list[tuple[int, bool]]:
    """Of each pack that `pack` would lay of these rows: its tokens, and whether any of its rows share a beginning."""
    fitted = _fitted(rows, tokens_per_pack)
    return [(sum(map(len, members)), any(tree.shared for tree in members)) for members in fitted]


def _fitted(rows: Iterable[dict], tokens_per_pack: int) -> list[list[Tree]]:
    bins: list[list[Tree]] = []
    filled: list[int] = []
    for tree in sorted(trees(rows, tokens_per_pack), key=len, reverse=True):
        place = next((i for i, size in enumerate(filled) if size + len(tree) <= tokens_per_pack), None)
        if place is None:
            bins.append([tree])
            filled.append(len(tree))
        else:
            bins[place].append(tree)
            filled[place] += len(tree)
    return bins


def deal(rows: list[dict], shares: int, tokens_per_pack: int) -> list[list[dict]]:
    """The rows in so many lists with about as many tokens to compute: rows that begin alike stay together up to one
    share, and the longest go first, each to the list that has the fewest tokens (Graham 1969, LPT)."""
    even = -(-sum(map(len, trees(rows, tokens_per_pack))) // shares)
    dealt: list[list[dict]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for tree in sorted(trees(rows, min(even, tokens_per_pack)), key=len, reverse=True):
        place = sizes.index(min(sizes))
        dealt[place] += tree.rows
        sizes[place] += len(tree)
    return dealt


def trees(rows: Iterable[dict], tokens_per_pack: int) -> list[Tree]:
    """Rows with the beginnings they share. Sorted, rows that begin alike stand together; each joins the tree before
    it where that lets fewer tokens be computed than leaving it out would."""
    found: list[Tree] = []
    for row in sorted(rows, key=beginning):
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


def beginning(row: dict) -> bytes:
    """What sorts rows as their tokens do."""
    return np.asarray(row["input_ids"], ">u4").tobytes()


def common(one: dict, other: dict) -> int:
    """How many tokens two rows begin with alike, none of them supervised nor followed by one that is."""
    length = min(len(one["input_ids"]), len(other["input_ids"]))
    ids, labels = ([np.asarray(row[name])[:length] for row in (one, other)] for name in ("input_ids", "labels"))
    supervised = _first((labels[0] != IGNORED) | (labels[1] != IGNORED))
    differs = _first(ids[0] != ids[1])
    # the token before a supervised one predicts it, in each row its own
    return differs if differs < supervised else max(0, supervised - 1)


def _first(flags: np.ndarray) -> int:
    """The place of the first that is set; past the end where none is."""
    place = int(flags.argmax()) if len(flags) else 0
    return place if len(flags) and flags[place] else len(flags)


def sight(segments: tuple[Segment, ...]) -> Sight:
    """What the segments see, on the CPU."""
    shared = [segment.shared_end - segment.shared_start for segment in segments]
    own = [segment.end - segment.start for segment in segments]
    seen = [a + b for a, b in zip(shared, own, strict=True)]
    index = None
    if any(shared):
        spans = [span for s in segments for span in ((s.shared_start, s.shared_end), (s.start, s.end))]
        index = torch.cat([torch.arange(start, end) for start, end in spans])
    queries, keys = (torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32) for sizes in (own, seen))
    return Sight(queries, keys, index, max(own), max(seen))


def padded(piece: Pack, tokens: int, segments: int, keys: int, longest: int) -> tuple[torch.Tensor, ...] | None:
    """The pack as tensors of fixed shapes: input_ids, position_ids [1, tokens]; the segments' queries and keys
    [segments + 1], as in Sight; and, where segments share, index [keys]. Padding are segments of their own, none over
    `longest`. None where that is too small for the pack."""
    laid = list(piece.segments)
    for start in range(len(piece), tokens, longest):
        laid.append(Segment(start, min(start + longest, tokens)))
    seen = sight(tuple(laid))
    if len(laid) > segments or (seen.index is not None and len(seen.index) > keys) or seen.most_keys > longest:
        return None
    more = tokens - len(piece)
    ids, positions = (F.pad(x, (0, more)) for x in (piece.input_ids, piece.position_ids))
    # segments without tokens fill up their number
    bounds = (torch.cat((x, x[-1:].expand(segments + 1 - len(x)))) for x in (seen.queries, seen.keys))
    return ids, positions, *bounds, *(() if seen.index is None else (F.pad(seen.index, (0, keys - len(seen.index))),))


def _lay(members: list[Tree]) -> Pack:
    length = sum(map(len, members))
    ids, positions, following = np.empty(length, np.int64), np.empty(length, np.int64), np.full(length, IGNORED)
    segments: list[Segment] = []
    rows: list[tuple[str, int, int]] = []
    end = 0
    for tree in members:
        shared = (end, end + tree.shared) if tree.shared else (0, 0)
        if tree.shared:
            ids[slice(*shared)] = tree.rows[0]["input_ids"][: tree.shared]
            positions[slice(*shared)] = np.arange(tree.shared)
            segments.append(Segment(*shared))
            end += tree.shared
        for row in tree.rows:
            start, end = end, end + len(row["input_ids"]) - tree.shared
            ids[start:end] = row["input_ids"][tree.shared :]
            positions[start:end] = np.arange(tree.shared, len(row["input_ids"]))
            following[start : end - 1] = row["labels"][tree.shared + 1 :]
            segments.append(Segment(start, end, *shared))
            rows.append((row["id"], start, end))
    row_tokens = sum(len(row["input_ids"]) for tree in members for row in tree.rows)
    places = np.flatnonzero(following != IGNORED)
    return Pack(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        places=torch.from_numpy(places),
        targets=torch.from_numpy(following[places]),
        segments=tuple(segments),
        rows=tuple(rows),
        row_tokens=row_tokens,
    )
