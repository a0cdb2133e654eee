"""How a stage ends: one line and a status that is not 0, whatever ends it; and it does end when DVC does."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stages.outputs import new_file, new_folder
from stages.refusal import explained
from tests.conftest import ROOT

# A stage that writes an output and, meanwhile, does what its first argument says.
STAGE = """
import os, sys, time
from pathlib import Path
from stages.outputs import new_folder
from stages.refusal import run

def main(arguments):
    with new_folder(Path("out")) as folder:
        (folder / "file").write_text("half")
        Path("begun").write_text(str(os.getpid()))
        exec(arguments[0])

run(main)
"""
WAIT = "time.sleep(60)"


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen:
    (folder / "stage.py").write_text(STAGE)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stage_in_one_line_with_nothing_half_written(tmp_path, number):
    stage = start(tmp_path, sys.executable, "stage.py", WAIT, DVC_STAGE="train")
    wait_for(tmp_path / "begun")
    stage.send_signal(number)
    assert stage.communicate(timeout=30)[1] == f"error: stopped by {number.name}; go on with: dvc repro\n"
    assert stage.returncode == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == {"stage.py", "begun"}


def test_a_stage_that_will_not_end_at_a_signal_is_ended(tmp_path):
    stubborn = "\nwhile True:\n  try: time.sleep(60)\n  except SystemExit: pass"
    stage = start(tmp_path, sys.executable, "stage.py", stubborn)
    wait_for(tmp_path / "begun")
    stage.terminate()
    time.sleep(0.5)
    assert stage.poll() is None
    stage.terminate()
    stage.communicate(timeout=30)
    assert stage.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("raise MemoryError", "error: memory ran out"),
        ("import torch; torch.empty(1 << 60)", "error: memory ran out"),
        ("open('/dev/full', 'w', buffering=1).write('x\\n')", "error: the disk is full"),
    ],
)
def test_what_the_machine_lacks_is_one_line(tmp_path, wrong, line):
    stage = start(tmp_path, sys.executable, "stage.py", wrong)
    said = stage.communicate(timeout=60)[1]
    assert stage.returncode == 2 and said.startswith(line) and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"stage.py", "begun"}


def test_a_fault_of_the_code_keeps_its_trace(tmp_path):
    stage = start(tmp_path, sys.executable, "stage.py", "1 / 0")
    assert "ZeroDivisionError" in stage.communicate(timeout=30)[1] and stage.returncode == 1


def test_memory_of_a_gpu_that_ran_out_names_what_to_lower():
    said = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"))
    assert "Tried to allocate 2.00 GiB" in said and "machine.tokens_per_pack" in said and "\n" not in said
    assert explained(RuntimeError("shapes do not match")) is None


def test_an_input_that_is_not_there_is_one_line_and_another_lost_file_a_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as lost:
        Path("models/base").stat()
    assert explained(lost.value) == "models/base: is not there; dvc repro makes it"
    with pytest.raises(FileNotFoundError) as lost:
        Path("stages/none.py").stat()
    assert explained(lost.value) is None


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights that this user lacks")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "write",
    [
        "(folder / 'file').write_bytes(bytes(1 << 24))",
        "from safetensors.torch import save_file; import torch; save_file({'x': torch.zeros(1 << 22)}, folder / 'x')",
        "import pyarrow as a, pyarrow.parquet as p; p.write_table(a.table({'x': [os.urandom(1 << 24)]}), folder / 'x')",
        "import sqlite3; sqlite3.connect(folder / 'x').execute('create table x as select zeroblob(16000000)')",
    ],
    ids=["python", "safetensors", "parquet", "sqlite"],
)
def test_a_full_disk_is_one_line_whichever_library_meets_it(small_disk, write):
    stage = start(small_disk, sys.executable, "stage.py", write)
    said = stage.communicate(timeout=60)[1]
    assert stage.returncode == 2 and said.startswith("error: the disk is full") and said.count("\n") == 1
    assert {path.name for path in small_disk.iterdir()} == {"stage.py", "begun"}


def test_a_stage_leaves_dvc_the_room_to_write_its_lock(small_disk):
    stage = start(small_disk, sys.executable, "stage.py", "pass", DVC_STAGE="train")
    assert "error: the disk is full (under 32 MB are left)" in stage.communicate(timeout=30)[1]
    assert stage.returncode == 2


SHELLS = [shell for shell in ("dash", "bash", "zsh", "fish", "busybox") if shutil.which(shell)]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("after", ["", "; true"], ids=["one command", "two commands"])
def test_a_stage_is_gone_when_dvc_is_killed_whatever_shell_stands_between(tmp_path, shell, after):
    command = [shell, *(["sh"] if shell == "busybox" else []), "-c", f"'{sys.executable}' stage.py '{WAIT}'{after}"]
    dvc = f"import os, subprocess; subprocess.run({command!r}, env={{**os.environ, 'DVC_STAGE': 'train'}})"
    parent = start(tmp_path, sys.executable, "-c", dvc)
    stage = int(wait_for(tmp_path / "begun"))
    time.sleep(0.2)
    assert alive(stage)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(stage):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_whose_dvc_was_gone_before_it_began_does_not_begin(tmp_path):
    late = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {LATE!r}], start_new_session=True)"
    start(tmp_path, sys.executable, "-c", late, DVC_STAGE="train").wait()
    assert "DVC has ended" in wait_for(tmp_path / "said")
    assert not (tmp_path / "begun").exists()


# in a session of its own, as a process given to another parent sees that one in another
LATE = (
    "import os, subprocess, sys, time; time.sleep(0.5); "
    "done = subprocess.run([sys.executable, 'stage.py', 'pass'], stderr=-1, text=True, start_new_session=True); "
    "open('said', 'w').write(done.stderr)"
)


def in_a_container(folder: Path, command: list[str]) -> subprocess.Popen:
    """The command as the first process of a namespace, whose orphans become its own."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process namespace needs rights that this user lacks")
    return start(folder, *unshare, *command)


def test_in_a_container_a_stage_whose_dvc_was_gone_before_it_began_does_not_begin(tmp_path):
    stage = f"(sleep 0.5; DVC_STAGE=train '{sys.executable}' stage.py pass 2> said) & "
    dvc = f"sh -c {shlex.quote(stage)}; sleep 20"  # its parent ends at once; sh, the first process, is given it
    first = in_a_container(tmp_path, ["sh", "-c", dvc])
    assert "DVC has ended" in wait_for(tmp_path / "said")
    assert not (tmp_path / "begun").exists()
    first.kill()


def test_in_a_container_whose_first_process_is_dvc_a_stage_runs(tmp_path):
    stage = "[sys.executable, 'stage.py', 'pass'], env=os.environ | {'DVC_STAGE': 'train'}"
    dvc = f"import os, subprocess, sys; subprocess.run({stage})"
    first = in_a_container(tmp_path, [sys.executable, "-c", dvc, "dvc"])
    said = first.communicate(timeout=60)[1]
    assert not said and (tmp_path / "out/file").exists()


def test_a_stage_that_nothing_but_a_person_started_outlives_its_parent(tmp_path):
    command = [sys.executable, "stage.py", "time.sleep(1); Path('end').write_text('reached')"]
    parent = start(tmp_path, sys.executable, "-c", f"import subprocess; subprocess.run({command!r})")
    wait_for(tmp_path / "begun")
    parent.kill()
    parent.wait()
    assert wait_for(tmp_path / "end") == "reached"


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_what_a_killed_process_had_begun_is_deleted_by_the_next_and_a_living_ones_is_not(tmp_path, new):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".out.{gone.pid}.partial").mkdir()
    living = tmp_path / f".out.{os.getppid()}.partial"
    living.mkdir()
    with new(tmp_path / "out") as partial:
        if new is new_file:
            partial.write_text("whole")
        assert {path.name for path in tmp_path.glob(".out.*")} <= {partial.name, living.name}
    assert living.exists() and (tmp_path / "out").exists()
