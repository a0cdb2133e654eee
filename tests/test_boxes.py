"""One pipeline on several machines: from a hub with secrets in the environment, over a remote on a real sshd, in
another environment, and from a carried folder with the network cut off. The same dvc.lock, and no secret anywhere."""

import base64
import contextlib
import getpass
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import ruamel.yaml

from stages.params import load
from stages.refusal import Refusal
from tests import forkserver, test_pipeline
from tests.hubs import Hub, Repository
from tests.test_pipeline import ROWS, STAGES, Clone, running

clone = test_pipeline.clone
DOWNLOADS = {"download@model", "download@data"}
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
SECRETS = {
    name: f"{prefix}CANARY{name}0123456789abcdef"
    for name, prefix in {"hub": "hf_", "endpoint": "", "index": "", "tracker": ""}.items()
}
BASIC = "Basic " + base64.b64encode(f"name:{SECRETS['endpoint']}".encode()).decode()


@pytest.fixture(scope="module")
def hubs(tiny_model):
    """Both hubs on this machine: the model for those who have the token, the rows for those who have the password."""
    server = Hub()
    server.tokens = {SECRETS["hub"], BASIC}
    model, rows = Repository(gated={SECRETS["hub"]}), Repository(private={BASIC})
    server.repositories = {"owner/tiny": model, "datasets/owner/rows": rows}
    model.push({path.name: path.read_bytes() for path in tiny_model.iterdir()})
    rows.push({"rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()})
    yield server
    server.close()


class Box(Clone):
    """A clone of the repository that notes all that its commands say."""

    def __init__(self, folder: Path, python: Path, environment: dict[str, str]):
        super().__init__(folder, python)
        self.environment |= environment
        self.said = ""

    def run(self, *command: str, status: int = 0) -> str:
        said = super().run(*command, status=status)
        self.said += said
        return said

    def lock(self) -> str:
        return (self.folder / "dvc.lock").read_text()


@pytest.fixture(scope="module")
def secrets(hubs) -> dict[str, str]:
    host = hubs.url.removeprefix("http://")
    return {
        "HF_ENDPOINT": hubs.url,
        "HF_TOKEN": SECRETS["hub"],
        "MODELSCOPE_ENDPOINT": f"http://name:{SECRETS['endpoint']}@{host}",
        "PIP_INDEX_URL": f"http://name:{SECRETS['index']}@127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "WANDB_API_KEY": SECRETS["tracker"],
        "MLFLOW_TRACKING_PASSWORD": SECRETS["tracker"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["tracker"],
    }


@pytest.fixture(scope="module")
def first(hubs, secrets, request) -> Box:
    """The machine on which the pipeline ran first, model and rows from the hubs; dvc.lock is committed."""
    environment = pytest.MonkeyPatch()
    environment.delenv("HF_HUB_OFFLINE", raising=False)  # read when the library is imported, before the fork
    made = request.getfixturevalue("clone")
    box = Box(made.folder, made.folder.parent / "bin", secrets)
    environment.undo()
    box.run("git", "rm", "-rqf", "--cached", "data/own", "models/own")
    for name in ("data/own/rows.jsonl", "models/own/tiny"):
        path = box.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    from_hub(box, "model", "hub", "owner/tiny", hubs)
    from_hub(box, "data", "modelscope", "datasets/owner/rows", hubs)
    assert running(box.dvc("repro")) == STAGES
    box.run("git", "add", "-A")
    box.run("git", "commit", "-qm", "first run")
    return box


def from_hub(box: Box, section: str, source: str, name: str, hubs: Hub) -> None:
    commit = hubs.repositories[name].branches["main"]
    fetched = {"source": source, "repository": name, "revision": commit, "files": "auto"}
    box.set(**{f"{section}__fetch": fetched})


def another(box: Box, folder: Path, python: Path | None = None, **environment: str) -> Box:
    """A clone of the box's repository, on a machine with the same secrets that has run nothing yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    box.run("git", "clone", "-q", str(box.folder), str(folder))
    made = Box(folder, python or box.folder.parent / "bin", {})
    made.environment = box.environment | {"PATH": made.environment["PATH"]} | environment
    return made


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_a_machine_with_nothing_and_no_remote_makes_the_same_lock_whatever_its_environment(
    first, tmp_path, record_property
):
    other = {
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Pacific/Kiritimati",
        "HOME": str(tmp_path / "home"),
        "PYTHONHASHSEED": "4711",
        "COLUMNS": "40",
    }
    (tmp_path / "home").mkdir()
    server = subprocess.Popen(
        [sys.executable, forkserver.__file__, "serve", str(tmp_path / "s")],
        stdin=subprocess.PIPE,
        env={**{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}, **other},
        umask=0o077,
    )
    forkserver.install(tmp_path / "bin", tmp_path / "s")
    box = another(first, tmp_path / "another place" / "ö", tmp_path / "bin", **other)
    while not (tmp_path / "s").exists():
        assert server.poll() is None
    try:
        assert running(box.dvc("repro")) == STAGES
    finally:
        server.stdin.close()
        server.wait(30)
    count_box(box, first, record_property)


def count_box(box: Box, first: Box, record_property) -> None:
    """Compare, and let bench.boxes know."""
    record_property("fresh_boxes", 1)
    record_property("fresh_box_identical", int(box.lock() == first.lock()))
    assert box.lock() == first.lock()


# --- with a remote ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(first, tmp_path_factory):
    """A folder that an sshd of this machine's own gives to who has the key: the repository's remote, pushed to."""
    if not SSHD:
        pytest.skip("no sshd: apt-get install openssh-server")
    if not importlib.util.find_spec("dvc_ssh"):
        pytest.skip("no dvc-ssh: make install")
    place = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it locks itself in
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", place / "sshd_config"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        assert server.poll() is None and time.monotonic() < deadline, "sshd does not answer"
        time.sleep(0.02)
    first.dvc("remote", "add", "-d", "box", f"ssh://{getpass.getuser()}@127.0.0.1:{port}{place}/remote")
    with_key(first, place)
    first.run("git", "commit", "-qam", "a remote")
    first.dvc("push")
    yield place
    server.terminate()
    server.wait(10)


def with_key(box: Box, place: Path) -> None:
    box.dvc("remote", "modify", "--local", "box", "keyfile", str(place / "user"))


def installed(box: Box) -> None:
    """As if make had made the environment: what this test runs in."""
    programs = box.folder / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(Path(box.environment["PATH"].split(":")[0]) / "python")
    (programs / "dvc").write_text(f'#!/bin/sh\nexec {sys.executable} -m dvc "$@"\n')
    (programs / "dvc").chmod(0o755)
    (box.folder / ".venv/.installed").touch()


def objects(folder: Path, lock: str, paths: set[str]) -> set[str]:
    """The names of the objects that the outputs in `paths` consist of, as the cache of `folder` has them."""
    stages = ruamel.yaml.YAML(typ="safe", pure=True).load(lock)["stages"].values()
    names = {out["md5"] for stage in stages for out in stage["outs"] if out["path"] in paths}
    for name in list(names):
        if name.endswith(".dir"):
            listed = (folder / ".dvc/cache/files/md5" / name[:2] / name[2:]).read_text()
            names |= {member["md5"] for member in json.loads(listed)}
    return names


def test_a_push_leaves_out_the_base_model_and_the_rows_as_they_came_and_nothing_else(first, remote):
    held = {path.parent.name + path.name for path in (remote / "remote/files/md5").glob("??/*")}
    others = {"data/conversations", "data/tokens", "models/adapter", "models/merged", "metrics/report.html"}
    fetched, made = (objects(first.folder, first.lock(), paths) for paths in ({"models/base", "data/raw"}, others))
    assert made <= held
    assert not (fetched - made) & held  # the tokenizer is the merged model's too
    weights = (first.folder / "models/base/model.safetensors").stat().st_size
    assert weights > 10_000 and objects(first.folder, first.lock(), {"models/base"}) - made


def test_make_run_on_a_new_machine_fetches_base_and_rows_pulls_the_rest_and_leaves_the_lock_as_it_was(
    first, remote, tmp_path, record_property
):
    box = another(first, tmp_path / "repository")
    with_key(box, remote)
    installed(box)
    assert running(box.run("make", "run")) == DOWNLOADS
    count_box(box, first, record_property)
    assert not box.run("git", "status", "--porcelain", "dvc.lock")
    assert box.repro() == set()
    assert (box.folder / "models/adapter/adapter_model.safetensors").exists()
    assert "all are what they should be" in box.run(sys.executable, "-m", "tools.verify", "--remote")


def test_where_only_the_remote_can_be_reached_model_and_data_are_named_and_the_results_can_be_had(
    first, remote, hubs, tmp_path, monkeypatch
):
    monkeypatch.setattr(hubs, "repositories", {})
    box = another(first, tmp_path / "repository")
    with_key(box, remote)
    installed(box)
    said = box.run("make", "run", status=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors and all("owner/" in line for line in errors) and "Traceback" not in said
    box.dvc("pull", "--allow-missing")
    assert (box.folder / "models/merged/model.safetensors").exists() and not (box.folder / "models/base").exists()
    assert running(box.dvc("repro", "--allow-missing")) == set()


# --- without any network ---------------------------------------------------------------------------------------------


def without_network() -> list[str]:
    """What to put before a command, so that it has no network, where this user may do that."""
    command = ["unshare", "--map-root-user", "--net"]
    with contextlib.suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def write_wheel(
    folder: Path, name: str, *requires: str, files: dict[str, str] | None = None, tag="py3-none-any"
) -> None:
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        for path, text in {
            f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
            f"{name}-1.0.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
            f"{name}-1.0.dist-info/RECORD": "",
            **(files or {}),
        }.items():
            archive.writestr(path, text)


def test_a_carried_folder_runs_the_pipeline_where_there_is_no_network(first, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    # installs this test's own packages by reference, in place of some gigabytes
    write_wheel(
        index,
        "environment",
        "left-open[more]==1.0 ; platform_system == 'Linux'",
        "never==1.0 ; sys_platform == 'win32'",
        files={
            "environment.pth": "\n".join(path for path in sys.path if path.endswith("-packages")) + "\n",
            "environment-1.0.dist-info/entry_points.txt": "[console_scripts]\ndvc = dvc.cli:main\n",
        },
    )
    write_wheel(index, "left_open", "further==1.0 ; extra == 'more'", "absent==1.0 ; extra == 'other'")
    write_wheel(index, "further", tag=f"{here}-{here}-manylinux_2_17_x86_64")
    write_wheel(index, "further", tag=f"{here}-{here}-win_amd64")
    carrier = another(first, tmp_path / "carrier", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        carrier.environment.pop(name, None)
    (carrier.folder / "requirements.txt").write_text(
        "environment==1.0   # via x\nnever==1.0 ; python_full_version < '3.9'\n"
    )
    said = carrier.run(sys.executable, "-m", "tools.carry", str(tmp_path / "a stick"), status=2)
    assert "error: requirements.txt: holds what no commit does" in said
    carrier.run("git", "commit", "-qam", "other requirements")
    carrier.dvc("cache", "dir", "--local", str(tmp_path / "nothing"))
    said = carrier.run(sys.executable, "-m", "tools.carry", str(tmp_path / "a stick"), status=2)
    assert "names a model or data that is not here; dvc repro download@model" in said
    carrier.dvc("cache", "dir", "--local", str(first.folder / ".dvc/cache"))
    carrier.run(sys.executable, "-m", "tools.carry", str(tmp_path / "a stick"))
    assert not list(tmp_path.glob(".*.partial"))
    assert {path.name.split("-")[0] for path in (tmp_path / "a stick/wheels").iterdir()} == {
        "environment",
        "left_open",
        "further",
    }
    box = Box(tmp_path / "empty", tmp_path / "no", {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"})
    box.folder.mkdir()
    shell = without_network()
    box.environment["PYTHON"] = sys.executable
    said = box.run(*shell, str(tmp_path / "a stick/run"), "prepare")
    assert running(said) == {"prepare"}
    box.folder /= "lorepro"
    shutil.rmtree(tmp_path / "a stick")  # nothing here is a link to it
    assert box.lock() == first.lock() and (box.folder / "models/base/model.safetensors").exists()
    assert box.run(*shell, box.folder / ".venv/bin/dvc", "status", "prepare").strip().endswith("up to date.")


def test_a_carried_folder_says_which_python_it_is_for(tmp_path):
    script = (test_pipeline.TOP / "tools/carried_run.sh").read_text().replace("PYTHON_VERSION", "2.6")
    (tmp_path / "run").write_text(script)
    done = subprocess.run(["sh", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the wheels here are for Python 2.6")
    assert len(done.stderr.splitlines()) == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]


# --- what a shell would take for commands ----------------------------------------------------------------------------

EVIL = ("x$(touch ran)", "x';touch ran;'")  # bare or between double quotes; between single ones
TO_DVC = {("model", "fetch", "source"), ("data", "fetch", "source"), ("task", "name")}  # dvc.yaml names these


def strings(node: object, place: tuple = ()) -> list[tuple]:
    """The places of all texts in a params.yaml, and of what could be one."""
    if isinstance(node, dict | list):
        members = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in members for found in strings(value, (*place, key))]
    return [place] if node is None or isinstance(node, str) else []


def test_what_a_shell_would_run_is_inert_in_every_text_of_params(first):
    file, yaml = first.folder / "params.yaml", ruamel.yaml.YAML(typ="safe", pure=True)
    before = file.read_text()
    places = strings(yaml.load(before))
    assert len(places) > 25 and set(places) >= TO_DVC
    given = 0
    try:
        for place, evil in itertools.product(places, EVIL):
            values = yaml.load(before)
            holder = values
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = evil
            with file.open("w") as opened:
                yaml.dump(values, opened)
            try:
                load(file)
            except Refusal:
                if place not in TO_DVC:
                    continue
            done = subprocess.run(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=first.folder, env=first.environment, capture_output=True, text=True,
            )  # fmt: skip
            given += 1
            assert "Traceback" not in done.stderr and not list(first.folder.rglob("ran")), place
        assert given > 2 * len(TO_DVC)  # data.license at least may hold what it likes
    finally:
        first.run("git", "checkout", "-q", ".")
        first.dvc("checkout", "--force", "-q")


# --- no secret anywhere ----------------------------------------------------------------------------------------------


def held_bytes(folder: Path):
    """(name, bytes) of every file, and of every table of Parquet and every object of git as they are unpacked."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()
        if path.is_file() and path.suffix == ".parquet":
            yield str(path), repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
    packed = ["git", "cat-file", "--batch", "--batch-all-objects"]
    yield "git", subprocess.run(packed, cwd=folder, capture_output=True, check=True).stdout


def hits(folder: Path, said: str) -> list[str]:
    """Where a secret stands, plain or in base64."""
    wanted = [secret.encode() for secret in SECRETS.values()] + [BASIC.removeprefix("Basic ").encode()]
    return [name for name, data in [*held_bytes(folder), ("said", said.encode())] if any(w in data for w in wanted)]


def kill_at_a_checkpoint(box: Box) -> None:
    """Leave a training behind that was killed, with its checkpoint in .runs."""
    before = set(box.folder.glob(".runs/*/step*/manifest.json"))
    box.set(train__epochs=100.0, machine__checkpoint_minutes=1e-9)
    with (box.folder.parent / "said").open("w") as said:
        repro = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "train"],
            cwd=box.folder, env=box.environment, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not set(box.folder.glob(".runs/*/step*/manifest.json")) - before:
            assert repro.poll() is None
            time.sleep(0.02)
        (process,) = {int(path.read_text()) for path in box.folder.glob(".runs/*.lock") if path.read_text()}
        os.kill(process, signal.SIGTERM)
        assert repro.wait(60) == 255
    box.said += (box.folder.parent / "said").read_text()


def test_no_secret_of_the_environment_is_written_anywhere(first, record_property):
    assert "smaller" in first.dvc("exp", "run", "-S", "lora.r=2", "-n", "smaller")
    kill_at_a_checkpoint(first)
    first.dvc("exp", "show", "--csv")
    wheel = {"package": "toy", "version": "1.0", "sha256": "0" * 64, "members": ["rows.jsonl"]}
    first.set(data__fetch={"source": "wheel", "packages": [wheel], "joined": None, "sha256": None})
    said = first.dvc("repro", "download@data", status=255)
    assert "pip cannot download it" in said, said
    for section, source, repository in (("model", "hub", "owner/none"), ("data", "modelscope", "datasets/owner/none")):
        fetched = {"source": source, "repository": repository, "revision": "0" * 40, "files": "auto"}
        first.set(**{f"{section}__fetch": fetched})
        assert "there is no such repository" in first.dvc("repro", f"download@{section}", status=255)
    try:
        assert list(first.folder.glob(".runs/*/step*/*.safetensors"))
        assert (first.folder / "metrics/report.html").exists() and (first.folder / "metrics/run.html").exists()
        found = hits(first.folder, first.said)
        record_property("canary_hits", len(found))
        assert found == []
    finally:
        first.run("git", "checkout", "-q", ".")
        first.dvc("checkout", "--force", "-q")


def test_a_secret_would_be_found_in_each_of_those_places(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    run = {"cwd": folder, "check": True}
    subprocess.run(["git", "init", "-q"], **run)
    (folder / "deep").mkdir()
    (folder / "deep/file").write_text(f"x{SECRETS['hub']}x")
    subprocess.run(["git", "add", "-A"], **run)
    (folder / "deep/file").write_text("gone")
    assert hits(folder, f"a line with {BASIC}") == ["git", "said"]
    (folder / "deep/file").write_bytes(b"\0" + SECRETS["index"].encode())
    assert hits(folder, "") == [str(folder / "deep/file"), "git"]
    (folder / "deep/file").unlink()
    table = pyarrow.table({"text": [f"a row with {SECRETS['tracker']}"] * 9})
    pyarrow.parquet.write_table(table, folder / "deep/table.parquet", compression="zstd")
    assert str(folder / "deep/table.parquet") in hits(folder, "")
