"""Two runs set side by side, from the answers that each stored."""

import json

import pytest

from stages.refusal import Refusal
from tools import compare


def answer(number: int, right: bool) -> dict:
    scores = {"exact_match": right}
    return {"id": str(number), "scores": scores, "stopped": True, "nats": 1.0, "tokens": 2, "group": str(number)}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two commits' answers, as the working folders of one: 40 rows, of which the second gets 15 more right."""
    first = [answer(n, n < 10) for n in range(40)]
    second = [answer(n, n < 25) for n in range(1, 41)]
    stored = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in (("a", first), ("b", second))}
    monkeypatch.setattr(compare.dvc.api, "read", lambda path, repo, rev: stored[rev])
    return stored


def test_a_difference_beyond_noise_is_named_and_rows_of_one_alone_are_left_out(runs, capsys):
    compare.main(["a", "b"])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("exact_match"))
    assert line.split()[1:4] == ["0.2308", "0.6154", "+0.3846"] and line.endswith("better")
    assert next(line for line in said.splitlines() if line.startswith("loss")).endswith("noise")
    assert "39 rows in 39 groups; 2 answers to rows that only one answered are left out" in said


def test_the_same_run_twice_is_noise(runs, capsys):
    compare.main(["a", "a"])
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) == 3 and all(line.endswith("noise") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["workspace", "a"], "workspace: data/answers/tuned.jsonl cannot be had: .*; dvc pull, or run it again"),
        (["a", "old"], "old: data/answers/tuned.jsonl is from before answers kept their group"),
        (["a", "other"], "a and other answered different rows; compare runs of the same test rows"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(runs, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs["old"] = '{"id": "1"}\n'
    runs["other"] = json.dumps(answer(99, True)) + "\n"
    with pytest.raises(Refusal, match=said):
        compare.main(arguments)
