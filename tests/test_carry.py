"""What is refused before it is carried, and what a carried folder says of a repository that is there already."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.refusal import SPARE_BYTES, Refusal
from tests.conftest import ROOT
from tools import carry

PIPELINE = """
stages:
  download:
    foreach: {model: models/base, data: data/raw}
    do:
      cmd: mkdir -p ${item} && head -c 1000000 /dev/zero > ${item}/file
      outs: ["${item}"]
"""


def run(*command: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, capture_output=True, text=True, **more)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One that has run its download stages."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@t")
    run("git", "init", "-q", "-b", "main")
    run(sys.executable, "-m", "dvc", "init", "-q")
    Path("dvc.yaml").write_text(PIPELINE)
    for own in ("data/own", "models/own", "stages/tasks"):
        Path(own).mkdir(parents=True)
        (Path(own) / ".gitkeep").touch()
    run(sys.executable, "-m", "dvc", "repro", "-q")
    commit("run")
    monkeypatch.setattr(carry, "collect", lambda wheels, python, machine: wheels.mkdir())
    return folder


def commit(message: str) -> str:
    run("git", "add", "-A")
    run("git", "commit", "-qm", message)
    return run("git", "rev-parse", "HEAD").stdout.strip()


def refused(tmp_path: Path) -> str:
    """The one line that carrying is refused with; nothing is left of what it had begun."""
    with pytest.raises(Refusal) as refusal:
        carry.main([str(tmp_path / "stick")])
    assert not list(tmp_path.glob("*stick*"))
    return str(refusal.value)


def test_a_task_of_ones_own_that_is_in_no_commit_is_refused(repository, tmp_path):
    Path("notes.txt").write_text("mine")
    Path("stages/tasks/mine.py").touch()
    assert refused(tmp_path).startswith("stages/tasks/mine.py: holds what no commit does")


def test_a_link_that_leads_nowhere_is_refused(repository, tmp_path):
    Path("data/own/rows.jsonl").symlink_to("gone.jsonl")
    assert refused(tmp_path).startswith("data/own/rows.jsonl, a link to gone.jsonl, cannot be read")


def test_room_is_asked_for_before_anything_is_written(repository, tmp_path, monkeypatch):
    elsewhere = tmp_path / "rows.jsonl"
    elsewhere.write_bytes(bytes(3_000_000))
    Path("data/own/rows.jsonl").symlink_to(elsewhere)
    free = SPARE_BYTES + 4_000_000  # a megabyte of data, one of the model, which is the same; three of rows
    monkeypatch.setattr("stages.outputs.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, free))
    assert "stick: 4." in (line := refused(tmp_path)) and "its disk has" in line
    elsewhere.write_bytes(bytes(2_000_000))
    carry.main([str(tmp_path / "stick")])
    assert (tmp_path / "stick/own/data/own/rows.jsonl").stat().st_size == 2_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "stick/objects").rglob("*") if path.is_file()) < 1_100_000


@pytest.fixture
def carried(repository, tmp_path, monkeypatch):
    """A carried folder; what it would call for make and dvc does nothing."""
    carry.main([str(tmp_path / "stick")])
    for name in ("make", "dvc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    (tmp_path / "there").mkdir()
    return tmp_path / "stick/run"


def unpack(script: Path) -> tuple[int, str]:
    done = subprocess.run([script], cwd=script.parent.parent / "there", capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_carried_folder_takes_up_a_repository_that_has_its_commit_and_says_when_it_has_more(carried, tmp_path):
    assert unpack(carried) == (0, "")
    assert unpack(carried) == (0, "")
    there = tmp_path / "there/lorepro"
    run("git", "commit", "-qm", "mine", "--allow-empty", cwd=there)
    status, said = unpack(carried)
    assert status == 0 and said.startswith("warning: ./lorepro is further than the commit") and said.count("\n") == 1


def test_a_carried_folder_says_that_a_repository_there_has_not_its_commit_and_how_to_bring_it(carried, tmp_path):
    assert unpack(carried) == (0, "")
    shutil.rmtree(tmp_path / "stick")
    Path("more").touch()
    brought = commit("more")
    carry.main([str(tmp_path / "stick")])
    status, said = unpack(carried)
    assert status == 2 and said.startswith("error: ./lorepro was there before") and brought in said
    assert said.count("\n") == 1
    command = said.partition("bring it there with ")[2].partition(", or run")[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path / "there", capture_output=True)
    assert unpack(carried) == (0, "")


def test_the_script_is_one_that_sh_can_read():
    run("sh", "-n", str(ROOT / "tools/carried_run.sh"))
