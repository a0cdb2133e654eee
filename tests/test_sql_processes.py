"""Work spread over processes: the same results, in the same order, and the same refusal as without."""

import pytest

from stages.refusal import Refusal
from stages.sql import processes
from stages.sql.processes import mapped
from stages.tasks import text_to_sql
from tests.test_gretel_rows import BIG, ROWS, UNUSABLE, conversations, options, row


def halved(numbers: list[int]) -> list[float]:
    """What the processes do; it cannot be done to 7."""
    if 7 in numbers:
        raise Refusal("row 7: no")
    return [number / 2 for number in numbers]


def numbers(until: int, broken: bool = False):
    yield from range(until)
    if broken:
        raise Refusal(f"row {until}: cannot be read")


def test_results_come_in_the_order_of_the_items():
    assert list(mapped(halved, (n for n in range(100, 123)), 4)) == [n / 2 for n in range(100, 123)]
    assert list(mapped(halved, range(4), 4)) == [n / 2 for n in range(4)]
    assert list(mapped(halved, (), 4)) == []


@pytest.mark.parametrize(
    ("until", "broken", "size", "said", "before"),
    [
        (9, False, 2, "row 7: no", 6),
        (9, True, 2, "row 7: no", 6),
        (9, True, 20, "row 7: no", 0),
        (6, True, 2, "row 6: cannot be read", 6),
        (5, True, 2, "row 5: cannot be read", 5),
        (5, True, 20, "row 5: cannot be read", 5),
    ],
)
def test_the_first_refusal_is_told_whatever_was_read_ahead(until, broken, size, said, before):
    found = []
    with pytest.raises(Refusal, match=f"^{said}$"):
        for result in mapped(halved, numbers(until, broken), size):
            found.append(result)
    assert found == [n / 2 for n in range(before)]


def test_items_are_read_no_further_ahead_than_there_are_processes(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    read = []
    results = mapped(halved, (read.append(n) or n for n in range(100, 200)), 5)
    next(results)
    assert len(read) == 15
    results.close()


def test_rows_become_the_same_conversations_on_several_processes(monkeypatch):
    rows = [row(*one[:3]) for one in ROWS] + [row("?", context, query) for _, context, query in UNUSABLE]
    alone = conversations(*rows, unusable="drop")
    monkeypatch.setattr(text_to_sql, "ROWS_AT_ONCE", 4)
    several = conversations(*rows, unusable="drop")
    assert list(map(str, several)) == list(map(str, alone))
    assert len(alone) == len(rows)


def test_unscorable_rows_are_the_same_on_several_processes(monkeypatch):
    schemas = [BIG.replace("(a BIGINT)", f"(a BIGINT, c{n} INT)").replace("INTO t", "INTO t (a)") for n in range(6)]
    bad = [row(f"{n}?", schema, "SELECT SUM(a) FROM t") for n, schema in enumerate(schemas)]
    good = [row(*one[:3]) for one in ROWS]
    rows = conversations(good[0], bad[0], *good[1:4], *bad[1:], *good[4:])
    drop, refuse = options(unusable="drop"), options(unusable="refuse")
    alone = list(text_to_sql.unscorable(rows, drop))
    monkeypatch.setattr(text_to_sql, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(text_to_sql, "cores", lambda: 2)
    assert list(map(str, text_to_sql.unscorable(rows, drop))) == list(map(str, alone))
    assert [one.prompt[0].content[-2:] for one, _ in alone] == [f"{n}?" for n in range(6)]
    with pytest.raises(Refusal, match=r"^gretel.jsonl line 2: the reference query does not run: integer overflow"):
        list(text_to_sql.unscorable(rows, refuse))
