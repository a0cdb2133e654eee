"""What is kept of an outcome for a person to look at."""

import json
import math

import pytest

from stages.sql.excerpt import CHARACTERS, COLUMNS, ROWS, excerpt
from stages.sql.execution import Failure, Rows, Timeout


def test_a_few_rows_are_kept_and_all_are_counted():
    outcome = Rows([(number, f"n{number}") for number in range(17)])
    assert excerpt(outcome) == {
        "rows": [[number, f"n{number}"] for number in range(ROWS)],
        "all_rows": 17,
        "all_columns": 2,
    }
    assert excerpt(Rows([])) == {"rows": [], "all_rows": 0, "all_columns": 0}


def test_wide_rows_and_long_texts_are_cut():
    found = excerpt(Rows([("long " * 20, *range(100))]))
    assert (len(found["rows"][0]), found["all_columns"]) == (COLUMNS, 101)
    assert len(found["rows"][0][0]) == CHARACTERS and found["rows"][0][0].endswith("…")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        ("1", "1"),
        (1, 1),
        (0.5, 0.5),
        (math.inf, "inf"),
        (b"\x00\xff", "x'00ff'"),
        ("caf\udcff", "caf?"),
        ("", ""),
    ],
)
def test_every_value_is_one_that_json_and_utf8_can_hold(value, kept):
    (((found,),), *_) = excerpt(Rows([(value,)])).values()
    assert found == kept and type(found) is type(kept)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Failure("no such column: \udcff"), "no such column: ?"),
        (Timeout(2.0), "took over 2 seconds"),
        (Rows([(1,)], truncated=True), "shows more than is compared"),
    ],
)
def test_without_a_result_there_is_the_reason(outcome, error):
    assert excerpt(outcome) == {"error": error}
