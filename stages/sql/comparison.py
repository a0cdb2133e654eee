"""Whether two results are equal, and from a prediction's results on every instance whether it is right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from sqlglot import exp

from stages.refusal import Refusal
from stages.sql.execution import Cell, Failure, Outcome, Rows, Timeout
from stages.sql.normal import collapsed, parsed

RELATIVE_TOLERANCE = 1e-6
# Orders of the columns that are tried; results with more columns of equal values are not worth the time.
MOST_PERMUTATIONS = 1_000
# Rows up to which a row whose float differs by a rounding is looked for among all others.
MOST_MATCHED = 400

Row = Sequence[Cell]


@dataclass(frozen=True)
class Verdict:
    """`right`: the same result on every instance; `valid`: ran on all of them; `why` says what it failed on, and
    `instance` numbers it."""

    right: bool
    valid: bool
    why: str
    instance: int | None = None


def is_ordered(query: str) -> bool:
    """Whether the order of the rows is part of the answer: the query as a whole has an ORDER BY."""
    tree = parsed(query)
    if isinstance(tree, exp.Query):
        return tree.args.get("order") is not None
    return " order by " in _outside(collapsed(query)).lower()


def _outside(text: str) -> str:
    """The text outside parentheses."""
    depth, kept = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        kept.append(character if depth == 0 else " ")
    return "".join(kept)


def equal(gold: Sequence[Row], predicted: Sequence[Row], ordered: bool) -> bool:
    """Whether two results hold the same rows as often, the columns in any one order; in sequence where `ordered`.

    Numbers are equal within 1e-6 of their size, text exactly, NULL to NULL, as Zhong et al. (2020) compare results.
    """
    if len(gold) != len(predicted):
        return False
    if not gold:
        return True
    if len(gold[0]) != len(predicted[0]):
        return False
    orders = islice(_permutations(gold, predicted), MOST_PERMUTATIONS)
    return any(_same(gold, [tuple(row[index] for index in order) for row in predicted], ordered) for order in orders)


def verdict(gold: Sequence[Outcome], predicted: Sequence[Outcome], ordered: bool) -> Verdict:
    """Judge a prediction by its outcomes on the instances on which the gold query had its own.

    `predicted` may end early with the first outcome that is not rows, as `Sandbox.run_all` has it. Raises Refusal
    where the gold query itself did not run: that is no prediction's fault.
    """
    if not gold:
        raise Refusal("the gold query: ran on no instance; fill at least one")
    for number, outcome in enumerate(gold):
        if not isinstance(outcome, Rows) or outcome.truncated:
            raise Refusal(f"the gold query: {_trouble(outcome)} on instance {number}; leave the row out")
    for number, outcome in enumerate(predicted):
        if not isinstance(outcome, Rows):
            return Verdict(False, False, f"{_trouble(outcome)} on instance {number}", number)
    if len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} outcomes for {len(gold)} instances")
    for number, (mine, theirs) in enumerate(zip(gold, predicted, strict=True)):
        if theirs.truncated or not equal(mine.rows, theirs.rows, ordered):
            return Verdict(False, True, f"another result on instance {number}", number)
    return Verdict(True, True, "")


def is_telling(outcomes: Sequence[Outcome]) -> bool:
    """Whether some result holds a value at all: a wrong query equals an empty one for nothing."""
    rows = (row for outcome in outcomes if isinstance(outcome, Rows) for row in outcome.rows)
    return any(value is not None for row in rows for value in row)


def _trouble(outcome: Outcome) -> str:
    if isinstance(outcome, Failure):
        return f"failed ({outcome.message})"
    if isinstance(outcome, Timeout):
        return f"took over {outcome.seconds:g} seconds"
    return "showed more rows than are compared"


def _same(gold: Sequence[Row], predicted: Sequence[Row], ordered: bool) -> bool:
    if ordered:
        return all(map(_row_equal, gold, predicted))
    if all(map(_row_equal, sorted(gold, key=_row_key), sorted(predicted, key=_row_key))):
        return True
    # two floats on either side of a rounding sort apart, so the sorted rows can miss one another
    floats = any(isinstance(value, float) for row in gold for value in row)
    return floats and len(gold) <= MOST_MATCHED and _matched(gold, predicted)


def _matched(gold: Sequence[Row], predicted: Sequence[Row]) -> bool:
    left = list(predicted)
    for row in gold:
        index = next((index for index, other in enumerate(left) if _row_equal(row, other)), None)
        if index is None:
            return False
        del left[index]
    return True


def _permutations(gold: Sequence[Row], predicted: Sequence[Row]) -> Iterator[list[int]]:
    """Orders of the predicted columns in which every column holds the values of the gold one; as it is comes first."""
    theirs = [[(row[index],) for row in predicted] for index in range(len(gold[0]))]
    mine = [[(row[index],) for row in gold] for index in range(len(gold[0]))]
    fits: list[list[int]] = []
    for index, column in enumerate(mine):
        others = sorted(range(len(theirs)), key=lambda other: other != index)
        fits.append([other for other in others if _same(column, theirs[other], ordered=False)])
    yield from _assignments(fits, [])


def _assignments(fits: list[list[int]], taken: list[int]) -> Iterator[list[int]]:
    if len(taken) == len(fits):
        yield taken
        return
    for index in fits[len(taken)]:
        if index not in taken:
            yield from _assignments(fits, [*taken, index])


def _row_equal(one: Row, other: Row) -> bool:
    return all(map(_cell_equal, one, other))


def _cell_equal(one: Cell, other: Cell) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        if not isinstance(one, (int, float)) or not isinstance(other, (int, float)):
            return False
        # equal infinities have no difference that is a number
        return one == other or abs(one - other) <= RELATIVE_TOLERANCE * max(abs(one), abs(other))
    return type(one) is type(other) and one == other


def _row_key(row: Row) -> tuple[tuple[str, Cell], ...]:
    return tuple(map(_cell_key, row))


def _cell_key(value: Cell) -> tuple[str, Cell]:
    if value is None:
        return ("", 0)
    if isinstance(value, (int, float)):
        return ("number", float(f"{value:.8g}") if isinstance(value, float) else value)
    return (type(value).__name__, value)
