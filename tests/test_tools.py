"""What all tools that a person types have alike, and what they ask of git and DVC."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.refusal import Refusal
from tests.conftest import ROOT
from tools import repository

TYPED = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if "run(main)" in path.read_text())


@pytest.mark.parametrize("name", TYPED)
def test_every_tool_says_how_it_is_used_and_stands_in_the_list_of_what_is_where(name, capsys):
    main = importlib.import_module(f"tools.{name}").main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: python -m tools.{name} [-h]")
    with pytest.raises(SystemExit) as ended:
        main(["--no-such-thing"])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err
    assert f"{name}.py" in (ROOT / "docs/code.md").read_text()


def test_what_git_has_not_is_told_by_its_name_however_odd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], check=True, capture_output=True)

    with pytest.raises(Refusal, match=r"git status fails: .*run in the top folder of a clone of the repository"):
        repository.uncommitted()
    git("init", "-q")
    Path("stages").mkdir()
    for name in ("a b", "ö", "stages/c", "gone", "before"):
        Path(name).write_text(f"a text of some length, which is {name}\n")
    Path(".gitignore").write_text("/ignored\n")
    git("add", "-A")
    git("commit", "-qm", "all")
    assert repository.uncommitted() == []
    Path("a b").write_text("another\n")
    Path("ö").write_text("another\n")
    git("add", "ö")
    Path("gone").unlink()
    git("mv", "before", "after")
    Path("ignored").touch()
    Path("new one").touch()
    Path("stages/new").touch()
    tracked = {"a b", "ö", "gone", "before", "after"}
    assert set(repository.uncommitted(new=False)) == tracked
    assert set(repository.uncommitted()) == {*tracked, "new one", "stages/new"}
    assert repository.uncommitted("stages") == ["stages/new"]


@pytest.mark.parametrize(("remote", "asked"), [("", "repro"), ("shared", "repro --pull")])
def test_make_run_pulls_where_there_is_a_remote_and_else_does_not(tmp_path, remote, asked):
    """DVC 3.67 says nothing of a remote that is not set, and calls that success."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "requirements.txt").touch()
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    dvc = f'#!/bin/sh\n[ "$1" = config ] && echo "{remote}" || echo "$@" > asked\n'
    for name, text in (("dvc", dvc), ("python", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    subprocess.run(["make", "run"], cwd=tmp_path, check=True)
    assert (tmp_path / "asked").read_text().strip() == asked
