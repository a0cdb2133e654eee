"""A small repository with results that are needed and others that are not: what tools.prune says, and what goes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.models.checkpoints import KEPT_DAYS, STATE, locked
from stages.refusal import Refusal
from stages.sources import kept
from stages.train import curve_of
from tools import prune

PIPELINE = """
stages:
  make:
    cmd: mkdir folder && cp source folder/one && cp source folder/two && cp curve loss.csv
    deps: [source]
    outs: [folder]
    plots:
      - loss.csv: {cache: false}
"""
HISTORY = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]
MEGABYTE = 1_000_000


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def dvc(*arguments: str) -> None:
    run(sys.executable, "-m", "dvc", *arguments, "-q")


def made_of(letter: str) -> set[Path]:
    """Let the stage make its output of a megabyte of `letter`; the objects of the cache that are new with it."""
    before = objects()
    Path("source").write_text(letter * MEGABYTE)
    dvc("repro")
    return objects() - before


def objects() -> set[Path]:
    return set(Path(".dvc/cache/files/md5").glob("??/*"))


def commit(what: str) -> None:
    run("git", "add", "-A")
    run("git", "commit", "-qm", what)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@t")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    run("git", "init", "-q", "-b", "main")
    dvc("init")
    Path(".gitignore").write_text("/.runs\n")
    Path("dvc.yaml").write_text(PIPELINE)
    Path("curve").write_text(curve_of(HISTORY))
    return tmp_path


def said(capsys, *arguments: str) -> tuple[list[str], str]:
    """The lines about what can go, and the last, about all of it."""
    capsys.readouterr()
    prune.main(list(arguments))
    out, err = capsys.readouterr()
    return out.splitlines(), err.strip()


def test_what_no_workspace_branch_tag_or_experiment_uses_is_named_then_removed_and_nothing_else(repository, capsys):
    made_of("a")
    commit("main")
    run("git", "tag", "first")
    run("git", "switch", "-qc", "other")
    made_of("b")
    commit("other")
    run("git", "switch", "-q", "main")
    made_of("c")
    dvc("exp", "save", "-n", "tried")
    unneeded = made_of("d")
    made_of("e")
    before = objects()
    assert len(unneeded) == 2 and len(before) == 11  # of each letter the list of a folder and a file; the curve, once
    lines, total = said(capsys)
    assert lines == ["    1.0 MB  2 objects of the cache: in use by no workspace, branch, tag or experiment"]
    assert total == "1.0 MB would be freed by: python -m tools.prune --yes"
    assert objects() == before
    used = sum(path.stat().st_size for path in before)
    assert said(capsys, "--yes")[1] == "1.0 MB freed"
    assert objects() == before - unneeded
    assert MEGABYTE <= used - sum(path.stat().st_size for path in objects()) < 1.1 * MEGABYTE
    dvc("exp", "apply", "tried")
    assert Path("folder/one").read_text() == "c" * MEGABYTE
    for revision, letter in (("first", "a"), ("other", "b")):
        run("git", "checkout", "-q", "--force", revision)
        dvc("checkout", "--force")
        assert Path("folder/two").read_text() == letter * MEGABYTE


def test_where_nothing_can_go_that_is_said(repository, capsys):
    made_of("a")
    assert said(capsys) == (["nothing can go"], "")


def checkpoint(name: str, *, finished: bool, history: list[dict] = HISTORY, days_old: float = 0) -> Path:
    step = Path(f".runs/{name}/step000000002-0123")
    step.mkdir(parents=True)
    (step / STATE).write_text(json.dumps({"history": history, "finished": finished}))
    (step / "tensors").write_bytes(bytes(MEGABYTE))
    for path in (step / STATE, step / "tensors", step, step.parent):
        os.utime(path, (time.time() - days_old * 86400,) * 2)
    return step.parent


def test_checkpoints_go_when_dvc_has_the_result_or_when_they_are_old_and_never_from_a_living_training(
    repository, capsys
):
    made_of("a")
    commit("main")
    done = checkpoint("done", finished=True)
    old = checkpoint("old", finished=False, days_old=KEPT_DAYS + 1)
    going_on = checkpoint("going_on", finished=False)
    not_dvcs = checkpoint("not_dvcs", finished=True, history=HISTORY[:1])
    living = checkpoint("living", finished=True)
    with locked(living.with_name("living.lock"), ""):
        lines, _ = said(capsys)
        assert [line.split()[2].rstrip(":") for line in lines] == [str(done), str(old)]
        assert "DVC has its result" in lines[0] and f"for {KEPT_DAYS} days" in lines[1]
        said(capsys, "--yes")
        assert not done.exists() and not old.exists()
    assert all(path.exists() for path in (going_on, not_dvcs, living))


@pytest.mark.parametrize("lost", ["the list of its files", "a file", "a bit of a file"])
def test_checkpoints_stay_where_the_cache_has_lost_some_of_the_result(repository, capsys, lost):
    made = made_of("a")
    (listing,) = [path for path in made if path.suffix == ".dir"]
    file = max(made, key=lambda path: path.stat().st_size)
    commit("main")
    checkpoint("done", finished=True)
    assert "DVC has its result" in said(capsys)[0][0]
    if lost == "a bit of a file":
        file.chmod(0o644)
        file.write_bytes(b"b" + file.read_bytes()[1:])
    else:
        (listing if lost == "the list of its files" else file).unlink()
    assert not any("DVC has its result" in line for line in said(capsys, "--yes")[0])
    assert Path(".runs/done").exists()


def test_downloads_go_when_their_files_are_in_place_and_never_one_under_way(repository, capsys):
    made_of("a")
    places = {name: kept.place(kept.name("hub", f"owner/{name}@1")) for name in ("done", "cut", "old", "living")}
    for name, place in places.items():
        place.mkdir(parents=True)
        (place / "part").write_bytes(bytes(MEGABYTE))
        if name in ("old", "living"):
            for path in (place / "part", place):
                os.utime(path, (time.time() - (KEPT_DAYS + 1) * 86400,) * 2)
    Path("models/base").mkdir(parents=True)
    Path("models/base/provenance.json").write_text(json.dumps({"source": "hub", "origin": ["owner/done@1"]}))
    with kept.held(places["living"]):
        os.utime(places["living"], (0, 0))
        os.utime(places["living"] / kept.LOCK, (0, 0))
        assert len(said(capsys)[0]) == 2
        assert said(capsys, "--yes")[1] == "2.0 MB freed"
    assert {name for name, place in places.items() if place.exists()} == {"cut", "living"}


def test_while_dvc_runs_nothing_is_judged(repository):
    Path("dvc.yaml").write_text("stages:\n  wait:\n    cmd: touch begun && exec sleep 60\n    outs: [never]\n")
    repro = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-q"], start_new_session=True)
    try:
        while not Path("begun").exists():
            assert repro.poll() is None
            time.sleep(0.02)
        with pytest.raises(Refusal, match=rf"DVC is running \(process {repro.pid}\)"):
            prune.main(["--yes"])
    finally:
        os.killpg(repro.pid, 9)
        repro.wait(30)


def test_while_a_sweep_runs_or_dvc_in_one_of_its_clones_nothing_is_judged(repository):
    made_of("a")
    Path(".runs").mkdir()
    with locked(Path(".runs/sweep.lock"), ""), pytest.raises(Refusal, match="a sweep runs"):
        prune.main(["--yes"])
    clone = Path(".runs/sweep/trees/one/.dvc/tmp")
    clone.mkdir(parents=True)
    (clone / "rwlock").write_text(json.dumps({"write": {"folder": {"pid": 1, "cmd": "dvc repro"}}}))
    with pytest.raises(Refusal, match=r"DVC is running \(process 1\)"):  # another user's, as a rule
        prune.main(["--yes"])


def test_a_cache_that_other_clones_may_use_is_left_alone(repository, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("cache")
    dvc("cache", "dir", "--local", str(outside))
    made_of("a")
    made_of("b")
    before = set(outside.rglob("*"))
    lines, error = said(capsys, "--yes")
    assert lines == ["nothing can go"] and "other clones may use it" in error
    assert set(outside.rglob("*")) == before


def test_a_tag_whose_folder_never_came_to_this_clone_stops_nothing(repository, capsys):
    (listing,) = [path for path in made_of("a") if path.suffix == ".dir"]
    commit("first")
    run("git", "tag", "v1")
    made_of("b")
    listing.unlink()
    lines, _ = said(capsys, "--yes")
    assert len(lines) == 1 and "in use by no workspace" in lines[0]
    assert Path("folder/two").read_text() == "b" * MEGABYTE


def test_where_dvc_cannot_tell_what_is_in_use_nothing_goes(repository):
    made_of("a")
    made_of("b")
    before = objects()
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  make: [\n")
    with pytest.raises(Refusal, match=r"DVC says: .*nothing is removed before it can tell what is in use"):
        prune.main(["--yes"])
    assert objects() == before
