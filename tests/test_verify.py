"""A small repository that DVC has run, with a remote, damaged in every place."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.refusal import Refusal
from tools import verify

PIPELINE = """
stages:
  make:
    cmd: mkdir folder && echo one > folder/one && echo two > folder/two && echo three > three && echo 4 > metrics.json
    outs: [folder, three]
    metrics:
      - metrics.json: {cache: false}
  download:
    foreach: [model]
    do:
      cmd: mkdir -p models/base && cp weights provenance.json models/base
      outs: [models/base]
"""


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], check=True)


@pytest.fixture
def repository(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("repository")
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("init")
    dvc("config", "cache.type", "hardlink,symlink")
    dvc("remote", "add", "-d", "away", str(folder / "away"))
    Path("weights").write_text("weights")
    Path("provenance.json").write_text(json.dumps({"produced": {"weights": hashlib.sha256(b"weights").hexdigest()}}))
    Path("dvc.yaml").write_text(PIPELINE)
    dvc("repro")
    dvc("push")
    return folder


def verified(capsys, *arguments: str) -> tuple[int, list[str]]:
    """The exit status and the lines that it ends with."""
    with pytest.raises(SystemExit) as ended:
        verify.main(list(arguments))
    return ended.value.code, capsys.readouterr().out.splitlines()


def damage(path: Path) -> None:
    """Flip a bit in place, as nothing that DVC looks at shows: size, time and mode stay."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_nobody_touched_is_all_right(repository, capsys):
    status, lines = verified(capsys, "--remote")
    assert status == 0 and re.fullmatch(r"\d+ files hashed: all are what they should be", lines[0])


def test_every_object_of_the_cache_is_found_when_it_is_damaged_and_mended_as_the_line_says(repository, capsys):
    made = sorted(Path(".dvc/cache/files/md5").glob("??/*"))
    assert len(made) == 7  # five files and the lists of two folders
    for path in made:
        damage(path)
        status, lines = verified(capsys)
        assert status == 1 and lines[0].startswith(f"{path}: is not what its name says"), path
        removal = re.search(r"; (rm -f [^,;]*), then dvc pull", lines[0])[1]
        subprocess.run(removal, shell=True, check=True)
        dvc("pull")
        assert verified(capsys)[0] == 0, path


def test_every_object_of_the_remote_is_found_when_it_is_damaged(repository, capsys):
    made = sorted(Path("away/files/md5").glob("??/*"))
    assert len(made) == 7
    for path in made:
        damage(path)
        status, lines = verified(capsys, "--remote")
        assert status == 1 and len(lines) == 1 and str(path) in lines[0]
        damage(path)


def test_every_object_that_the_remote_lacks_is_named_but_what_is_never_pushed(repository, capsys):
    made = sorted(Path("away/files/md5").glob("??/*"))
    for path in made:
        content = path.read_bytes()
        path.unlink()
        status, lines = verified(capsys, "--remote")
        assert status == 1 and len(lines) == 1 and f"{path}: is not there, and " in lines[0], lines
        assert lines[0].endswith(" needs it; dvc push (No such file or directory)")
        path.write_bytes(content)
    base = hashlib.md5(b"weights").hexdigest()
    Path(f"away/files/md5/{base[:2]}/{base[2:]}").unlink()
    Path("dvc.yaml").write_text(PIPELINE.replace("outs: [models/base]", "outs: [{models/base: {push: false}}]"))
    assert verified(capsys, "--remote")[0] == 0


def test_an_output_that_is_gone_or_another_is_named_with_the_command_that_brings_it_back(repository, capsys):
    Path("folder/one").unlink()
    Path("three").unlink()
    Path("three").write_text("another\n")
    Path("metrics.json").write_text("another\n")
    status, lines = verified(capsys)
    assert status == 1
    assert sorted(line.split(":")[0] for line in lines) == ["folder/one", "metrics.json", "three"]
    assert any(line == "folder/one: is not there; dvc checkout" for line in lines)
    assert any("dvc checkout --force three" in line for line in lines)


def test_a_model_that_is_not_what_was_downloaded_is_named(repository, capsys):
    Path("models/base/weights").unlink()
    Path("models/base/weights").write_text("others")
    status, lines = verified(capsys)
    assert status == 1 and any("models/base/weights: is not the file whose sha256 provenance.json" in x for x in lines)


def test_without_a_lock_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="there is none here; run in the repository's top folder"):
        verify.main([])


def test_an_object_that_the_cache_has_lost_is_named_with_its_output_and_the_command_that_puts_it_back(
    repository, capsys
):
    for path in sorted(Path(".dvc/cache/files/md5").glob("??/*")):
        path.unlink()
        status, lines = verified(capsys)
        assert status == 1 and len(lines) == 1, lines
        found = re.fullmatch(
            r"(folder|three|models/base): the cache has lost (\w+(?:\.dir)?); dvc commit (\S+),.*", lines[0]
        )
        assert found[2] == path.parent.name + path.name
        dvc("commit", found[3])
        assert verified(capsys)[0] == 0, path


def test_what_is_neither_here_nor_in_the_cache_is_said_once(repository, capsys):
    Path("three").unlink()
    lost = hashlib.md5(b"three\n").hexdigest()
    Path(f".dvc/cache/files/md5/{lost[:2]}/{lost[2:]}").unlink()
    assert verified(capsys) == (1, ["three: is not there; dvc pull, or dvc repro make"])
