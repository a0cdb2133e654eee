"""Every data set and parameter file of malformed.py, given to the real stage: one line each, and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages import prepare
from stages.refusal import run
from tests import malformed
from tests.malformed import DATA

ROOT = Path(__file__).parent.parent


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs a stage, which must leave with status 2 and one line; gives that line, without its "error: "."""
    monkeypatch.chdir(tmp_path)

    def go(main, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        with pytest.raises(SystemExit) as left:
            run(main)
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        lines = said.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert lines[0].isprintable() and len(lines[0]) < 600
        return lines[0].removeprefix("error: ")

    return go


@pytest.mark.parametrize("task", malformed.TASKS)
def test_the_rows_before_a_wrong_one_are_sound(task, params_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = malformed.DataSet("sound", task, "a.jsonl", lambda: malformed.lines(task), "")
    params_file(tmp_path, **sound.write(tmp_path))
    prepare.main(["data/raw", "data/conversations", "metrics/data.json"])


@pytest.mark.parametrize("wrong", DATA, ids=lambda wrong: wrong.name)
def test_a_malformed_data_set_is_refused_in_one_line_that_names_file_row_and_field(
    wrong, params_file, tmp_path, refusal
):
    params_file(tmp_path, **wrong.write(tmp_path))
    assert refusal(prepare.main, "data/raw", "data/conversations", "metrics/data.json").startswith(wrong.said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "params.yaml"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["raw"]


def test_each_is_wrong_in_a_way_of_its_own():
    assert len({wrong.name for wrong in DATA}) == len(DATA) >= 60


def test_what_refuses_them_has_not_even_opened_the_library_that_would_use_a_gpu():
    code = "import stages.prepare, stages.rows, stages.tasks.text_to_sql, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
