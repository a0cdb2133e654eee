"""The validation stage: what training needs to score its own answers, and nothing where it does not."""

import json
import shutil
from types import SimpleNamespace

import pytest

from stages import validation
from stages.conversation import Message, conversation
from stages.refusal import SPARE_BYTES, Refusal
from tests.conftest import CHAT


@pytest.fixture
def made(tmp_path, monkeypatch, params_file):
    """A function that runs the stage on seven rows, or as many as asked, and returns its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversations").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "stages/tasks").mkdir(parents=True)
    (tmp_path / "stages/tasks/chat.py").write_text("0")
    (tmp_path / "code/one.py").write_text("1")
    (tmp_path / "alone.py").write_text("2")

    def run(rows: int = 7, **overrides):
        params_file(tmp_path, **CHAT, **overrides)
        lines = [conversation(str(n), [Message(role="user", content=f"q{n}")], f"a{n}", {}) for n in range(rows)]
        text = "".join(row.model_dump_json() + "\n" for row in lines)
        (tmp_path / "conversations/validation.jsonl").write_text(text)
        (tmp_path / "conversations/learned.jsonl").write_text('"learned"\n')
        validation.main(["conversations", "out", "code", "alone.py"])
        return {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}

    return run


def test_for_the_loss_nothing_is_set_aside_whatever_the_rows_and_the_code(made, tmp_path):
    before = made()
    (tmp_path / "alone.py").write_text("3")
    assert made(rows=9) == before == {"scoring.json": "{}\n"}


def test_for_the_score_the_rows_with_the_first_ids_are_set_aside_and_all_that_decides_a_score(made, tmp_path):
    found = made(**{"train.metric": "score", "train.metric_rows": 3})
    ids = [json.loads(line)["id"] for line in found["rows.jsonl"].splitlines()]
    whole = [json.loads(line)["id"] for line in (tmp_path / "conversations/validation.jsonl").read_text().splitlines()]
    assert ids == sorted(whole)[:3]
    assert found["learned.jsonl"] == '"learned"\n'
    scoring = json.loads(found["scoring.json"])
    assert (scoring["task"], scoring["max_new_tokens"]) == (CHAT["task"], 80)
    assert scoring["code"].keys() == {"alone.py", "code/one.py", "stages/tasks/chat.py"}
    (tmp_path / "code/one.py").write_text("3")
    changed = made(**{"train.metric": "score", "train.metric_rows": 3})
    assert {name for name in found if changed[name] != found[name]} == {"scoring.json"}


def test_without_a_row_a_score_is_refused(made):
    with pytest.raises(Refusal, match=r"raise prepare\.validation"):
        made(rows=0, **{"train.metric": "score"})


def test_for_the_score_a_disk_without_room_is_refused_before_rows_are_set_aside(made, monkeypatch):
    made()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SPARE_BYTES))
    with pytest.raises(Refusal, match=r"^out: 0\.0 MB are to be written"):
        made(**{"train.metric": "score"})
    assert made() == {"scoring.json": "{}\n"}
