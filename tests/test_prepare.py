"""Rows to conversations on three sides: nothing twice, nothing on two sides, nothing moved by what is added."""

import json
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from stages import prepare
from stages.conversation import SIDES, Conversation, Message, conversation, read
from stages.params import Prepare
from stages.prepare import LEFT_OUT, Keys, leaks, side
from stages.refusal import Refusal

QUOTES = {
    "name": "quotes",
    "rows": "mine.jsonl",
    "given_words": 3,
    "longest": 400,
}


def settings(**changes) -> Prepare:
    return Prepare(**({"group_by": "author", "validation": 0.1, "test": 0.2, "rows": None, "seed": 0} | changes))


def row(question: str, answer: str = "yes", group: str | None = None) -> Conversation:
    prompt = [Message(role="user", content=question)]
    return conversation(f"mine.jsonl: {question}", prompt, answer, {"author": group or question})


@dataclass
class Found:
    sides: dict[str, list[Conversation]]
    duplicates: int
    asked_twice: int
    leaks: int


def split(rows: list[Conversation], settings: Prepare) -> Found:
    """The rows themselves on their sides."""
    keys = Keys()
    for one in rows:
        keys.add(one, settings)
    found = prepare.split(keys, settings)
    sides = {name: [] for name in SIDES}
    for one, number in zip(rows, found.sides, strict=True):
        if number != LEFT_OUT:
            sides[SIDES[number]].append(one)
    return Found(sides, found.duplicates, found.asked_twice, leaks(keys, found.sides))


def leaking(**sides: list[Conversation]) -> int:
    keys = Keys()
    for one in (one for name in SIDES for one in sides[name]):
        keys.add(one, settings())
    return leaks(keys, np.array([number for number, name in enumerate(SIDES) for _ in sides[name]]))


def on(sides: dict[str, list[Conversation]]) -> dict[str, str]:
    """The side of each conversation, by id."""
    return {c.id: name for name, members in sides.items() for c in members}


def test_exact_duplicates_are_dropped_and_counted():
    found = split([row("a"), row("b"), row("a"), row("a", group="another"), row("b", "no")], settings())
    kept = [(c.prompt[0].content, c.reference) for members in found.sides.values() for c in members]
    assert sorted(kept) == [("a", "yes"), ("b", "no"), ("b", "yes")]
    assert found.duplicates == 2


def test_rows_of_one_group_stand_on_one_side():
    rows = [row(f"question {n}", group=f"group {n % 100}") for n in range(1000)]
    found = split(rows, settings())
    owners = {}
    for name, members in found.sides.items():
        for c in members:
            owners.setdefault(c.groups["author"], set()).add(name)
    assert len(owners) == 100
    assert all(len(names) == 1 for names in owners.values())
    assert found.leaks == 0


def test_new_rows_move_no_older_row():
    old = [row(f"question {n}", group=f"group {n % 300}") for n in range(900)]
    new = [row(f"new {n}", group=f"group {n}") for n in range(600)]
    before, after = on(split(old, settings()).sides), on(split(new + old, settings()).sides)
    assert {name: after[name] for name in before} == before


def test_another_seed_makes_another_split():
    rows = [row(f"question {n}") for n in range(300)]
    assert on(split(rows, settings()).sides) != on(split(rows, settings(seed=1)).sides)


def test_the_shares_are_met_for_two_thousand_groups():
    sides = [side(f"group {n}", settings()) for n in range(2000)]
    assert abs(sides.count("test") / 2000 - 0.2) < 0.03
    assert abs(sides.count("validation") / 2000 - 0.1) < 0.02


def test_a_subset_is_the_same_whatever_the_order_and_part_of_every_larger_one():
    rows = [row(f"question {n}", group=f"group {n % 200}") for n in range(600)]
    whole = on(split(rows, settings()).sides)
    hundred = on(split(rows, settings(rows=100)).sides)
    two = on(split(rows[::-1], settings(rows=200)).sides)
    assert (len(hundred), len(two)) == (100, 200)
    assert hundred.items() <= two.items() <= whole.items()
    assert on(split(rows, settings(rows=600)).sides) == whole


def test_a_leak_is_found_by_its_group_and_by_its_prompt():
    clean = {"train": [row("a")], "validation": [row("b")], "test": [row("c")]}
    assert leaking(**clean) == 0
    assert leaking(**clean | {"test": [row("d", group="a"), row("e")]}) == 1
    assert leaking(**clean | {"validation": [row("a", "no", group="z")]}) == 1
    assert leaking(**clean | {"test": [row("b", "no", group="z")]}) == 0


def test_a_prompt_in_several_groups_stays_in_the_test_rows_and_is_left_out_of_the_others():
    # each of 60 questions has 20 answers, each in a group of its own, so that they fall on all sides
    rows = [row(f"question {n}", f"answer {m}", group=f"{n} {m}") for n in range(60) for m in range(20)]
    found = split(rows, settings())
    prompts = {name: {c.prompt_key for c in members} for name, members in found.sides.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    assert found.leaks == 0
    assert len(found.sides["test"]) == sum(side(c.groups["author"], settings()) == "test" for c in rows)
    assert found.asked_twice == 1200 - sum(map(len, found.sides.values())) > 0


def test_an_unknown_way_to_group_is_refused_with_those_there_are():
    with pytest.raises(Refusal, match=r"^params.yaml: prepare.group_by is topic; this task's rows group by: author$"):
        split([row("a")], settings(group_by="topic"))


@pytest.fixture
def stage(tmp_path, params_file, monkeypatch):
    """Runs the stage in a folder of its own, on lines that become data/raw/mine.jsonl."""
    monkeypatch.chdir(tmp_path)

    def go(lines: list[str], **overrides) -> dict:
        params_file(tmp_path, **({"task": QUOTES, "prepare.group_by": "author"} | overrides))
        Path("data/raw").mkdir(parents=True, exist_ok=True)
        Path("data/raw/mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
        prepare.main(["data/raw", "data/conversations", "metrics/data.json"])
        return json.loads(Path("metrics/data.json").read_text())

    return go


def quote(number: int, author: int | None = None) -> str:
    author = number if author is None else author
    return json.dumps({"quote": f"Saying number {number} is – wise", "author": f"Sage {author}é"}, ensure_ascii=False)


def test_the_stage_writes_conversations_and_their_numbers(stage):
    metrics = stage([quote(n, n % 120) for n in range(240)] + [quote(0)] * 3)
    written = {name: list(read(Path(f"data/conversations/{name}.jsonl"))) for name in SIDES}
    assert {f"{name}_rows": len(rows) for name, rows in written.items()} == {
        name: metrics[name] for name in ("train_rows", "validation_rows", "test_rows")
    }
    assert sum(map(len, written.values())) == 240
    assert (metrics["duplicates"], metrics["leaks"], metrics["asked_twice"]) == (3, 0, 0)
    assert metrics["train_groups"] + metrics["validation_groups"] + metrics["test_groups"] == 120
    first = written["train"][0]
    assert first.reference.startswith("Quote: Saying number ")
    assert first.where.startswith("mine.jsonl line ")


def test_the_stage_writes_the_same_bytes_twice(stage):
    lines = [quote(n) for n in range(100)]
    stage(lines)
    before = {path.name: path.read_bytes() for path in Path("data/conversations").iterdir()}
    stage(lines)
    assert {path.name: path.read_bytes() for path in Path("data/conversations").iterdir()} == before
    assert sorted(before) == ["learned.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]


def test_the_training_rows_answers_are_set_apart_for_a_score_that_reads_them_and_for_no_other(stage, monkeypatch):
    stage([quote(n) for n in range(100)])
    learned = [json.loads(line) for line in Path("data/conversations/learned.jsonl").read_text().splitlines()]
    assert learned == [c.reference for c in read(Path("data/conversations/train.jsonl"))] and learned
    monkeypatch.setattr("stages.tasks.quotes.TRAINING", False)
    stage([quote(n) for n in range(100)])
    assert Path("data/conversations/learned.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{broken", r"^mine.jsonl line 101: column 2 is not JSON"),
        ('{"quote": "x"}', r"^mine.jsonl line 101: author is missing; the row has: quote$"),
        ('{"quote": "x", "author": 7}', r"^mine.jsonl line 101: author should be a valid string, it is 7; mend it"),
    ],
)
def test_a_bad_row_stops_the_stage_and_leaves_the_old_outputs(bad, said, stage):
    stage([quote(n) for n in range(100)])
    before = {path: path.read_bytes() for path in Path().rglob("*.json*") if path.name != "mine.jsonl"}
    with pytest.raises(Refusal, match=said):
        stage([*(quote(n) for n in range(500, 600)), bad])
    assert {path: path.read_bytes() for path in Path().rglob("*.json*") if path.name != "mine.jsonl"} == before


def test_memory_does_not_grow_with_what_the_rows_hold(stage):
    peaks = []
    for count in (300, 3000):
        stage(
            [json.dumps({"quote": f"Saying {n} {'x' * 3000}", "author": f"Sage {n}"}) for n in range(count)],
            task=QUOTES | {"longest": 9999},
        )
        tracemalloc.start()
        prepare.main(["data/raw", "data/conversations", "metrics/data.json"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2700 * 300  # bytes; a row has 3,000


def test_an_empty_file_is_refused_by_name(stage):
    with pytest.raises(Refusal, match=r"^mine.jsonl: holds no rows; see task and data in params.yaml$"):
        stage([])
    assert not Path("data/conversations").exists()


def test_a_side_without_rows_is_refused(stage):
    with pytest.raises(Refusal, match=r"^no train rows out of 1; add rows, or change the shares in prepare$"):
        stage([quote(1)], **{"prepare.test": 0.99, "prepare.validation": 0.0})
    with pytest.raises(Refusal, match=r"^no test rows out of 20; "):
        stage([quote(n) for n in range(20)], **{"prepare.test": 0.0001, "prepare.validation": 0.5})
    with pytest.raises(Refusal, match=r"^no validation rows out of 100; "):
        stage([quote(n) for n in range(100)], **{"prepare.validation": 0.0})
    assert not Path("data/conversations").exists()
