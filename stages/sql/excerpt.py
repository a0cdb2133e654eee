"""An outcome in, and of it what a person looks at: its first rows, cut, and how many there are; or why there are none.

Plain JSON: numbers, text, and null for NULL. Without column names, since two equal results may differ in them.
"""

import math
from typing import Any

from stages.sql.execution import Cell, Failure, Outcome, Timeout

ROWS = 5
COLUMNS = 8
CHARACTERS = 40


def excerpt(outcome: Outcome) -> dict[str, Any]:
    """`rows`, at most five of them, and the number of `all_rows` and `all_columns`; or `error`."""
    if isinstance(outcome, Failure):
        return {"error": _utf8(outcome.message)}
    if isinstance(outcome, Timeout):
        return {"error": f"took over {outcome.seconds:g} seconds"}
    if outcome.truncated:
        return {"error": "shows more than is compared"}
    rows = [[_cell(value) for value in row[:COLUMNS]] for row in outcome.rows[:ROWS]]
    return {"rows": rows, "all_rows": len(outcome.rows), "all_columns": len(outcome.rows[0]) if rows else 0}


def _cell(value: Cell) -> int | float | str | None:
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = _utf8(f"x'{value.hex()}'" if isinstance(value, bytes) else str(value))
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _utf8(text: str) -> str:
    """The text with a question mark for every byte that was no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
