"""Training that is killed, at any moment, and goes on: the same bytes, nothing stale, one trainer at a time."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forkserver
from tests.conftest import ROOT, write_params
from tests.test_train import LORA, write_tokens

# Runs the stage and kills it with SIGKILL, at the step or inside of the checkpoint that its first argument says.
DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
from stages import refusal, train

what, number = sys.argv.pop(1).split(":")
calls = 0

def now():
    global calls
    calls += 1
    return calls == int(number)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(file, fsync=os.fsync):
    if now():
        if os.path.isfile(f"/proc/self/fd/{file}"):
            os.ftruncate(file, os.fstat(file).st_size // 2)
        die()
    fsync(file)

def half_deleted(folder, rmtree=shutil.rmtree, **options):
    if Path(folder).is_dir() and now():
        next(Path(folder).iterdir()).unlink()
        die()
    rmtree(folder, **options)

def step(self, model, taken, *more, training_step=train.Trainer.training_step):
    if self.state.global_step == int(number):
        die()
    return training_step(self, model, taken, *more)

if what == "step":
    train.Trainer.training_step = step
if what == "write":
    os.fsync = half_written
if what == "rename":
    Path.rename = lambda self, target, rename=Path.rename: die() if now() else rename(self, target)
if what == "renamed":
    Path.rename = lambda self, target, rename=Path.rename: (rename(self, target), now() and die())
if what == "delete":
    shutil.rmtree = half_deleted
if what == "outputs":
    train.write_outputs = lambda *inputs: die()
refusal.run(train.main)
"""
OUTPUTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "train.json", "loss.csv")


class Place:
    """A folder with the code, parameters, a model and tokens, in which the train stage runs."""

    def __init__(self, folder: Path, python: Path, model: Path, **overrides):
        self.folder, self.python = folder, python
        folder.mkdir()
        shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(model, folder / "base")
        (folder / "driver.py").write_text(DRIVER)
        write_tokens(folder / "train.parquet", 22, 0)
        write_tokens(folder / "validation.parquet", 5, 1)
        self.set(**overrides)

    def set(self, **overrides) -> None:
        train = {"train.epochs": 2.0, "train.batch_size": 4, "train.validations": 3, "train.learning_rate": 0.01}
        machine = {"machine.device": "cpu", "machine.dtype": "float32", "machine.tokens_per_pack": 100}
        often = {"machine.checkpoint_minutes": 1e-9}
        lora = {f"lora.{key}": value for key, value in {**LORA, "dropout": 0.1}.items()}
        write_params(self.folder, **{**train, **machine, **often, **lora, **overrides})

    def start(self, *module: str, **environment: str) -> subprocess.Popen:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
        return subprocess.Popen(
            [self.python / "python", "-m", *module,
             "base", "train.parquet", "validation.parquet", "adapter", "train.json", "loss.csv"],
            cwd=self.folder, env={**clean, "HF_DEACTIVATE_ASYNC_LOAD": "1", **environment},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def train(self, status: int = 0, **environment: str) -> str:
        process = self.start("stages.train", **environment)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == status, said
        return said

    def killed(self, when: str, **environment: str) -> None:
        process = self.start("driver", when, **environment)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 256 - signal.SIGKILL, said

    def outputs(self) -> list[bytes]:
        return [(self.folder / name).read_bytes() for name in OUTPUTS]

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(".runs/*/step*"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A folder with a `python` that has the libraries imported already."""
    folder = tmp_path_factory.mktemp("python")
    server = subprocess.Popen(
        [sys.executable, forkserver.__file__, "serve", str(folder / "s")],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    forkserver.install(folder, folder / "s")
    while not (folder / "s").exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield folder
    server.stdin.close()
    server.wait(30)


@pytest.fixture
def place(tmp_path, python, tiny_model):
    return lambda name, **overrides: Place(tmp_path / name, python, tiny_model, **overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, python, tiny_model):
    """What the stage writes when nothing happens to it."""
    there = Place(tmp_path_factory.mktemp("undisturbed") / "place", python, tiny_model)
    there.train()
    return there.outputs()


def after(said: str) -> int | None:
    """The step after which training said it went on."""
    found = re.search(r"going on after step (\d+) of 12", said)
    return found and int(found[1])


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_a_training_killed_at_a_step_goes_on_there_and_gives_the_same_bytes(place, undisturbed, step):
    there = place("killed")
    there.killed(f"step:{step}")
    assert after(there.train()) == step
    assert there.outputs() == undisturbed


@pytest.mark.parametrize(
    "settings",
    [
        {"lora.quantize": "nf4", "machine.dtype": "bfloat16"},
        {"lora.dropout": 0.0, "machine.tokens_per_pack": 300, "train.weight_decay": 0.1},
        {"train.schedule": "linear", "train.warmup_ratio": 0.7, "train.order": "shuffled"},
        {"machine.dtype": "auto"},
    ],
)
def test_whatever_the_settings_a_training_killed_twice_gives_the_same_bytes(place, settings):
    clean, killed = place("clean", **settings), place("killed", **settings)
    clean.train()
    killed.killed("step:3")
    killed.killed("step:8")
    assert after(killed.train()) == 8
    assert killed.outputs() == clean.outputs()


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        *((f"write:{number}", 1) for number in (6, 7, 8, 9)),  # of the second checkpoint: three files, their folder
        ("rename:2", 1),
        ("renamed:2", 2),
        ("write:10", 2),  # the folder of the folder
        ("write:1", None),
        ("delete:1", 3),  # of the first
    ],
)
def test_a_kill_inside_a_checkpoints_writing_leaves_the_one_before(place, undisturbed, moment, left):
    there = place("killed")
    there.killed(moment)
    assert after(there.train()) == left
    assert there.outputs() == undisturbed


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "longer"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(place, undisturbed, file, damage):
    there = place("damaged")
    there.killed("step:6")
    older, newest = there.checkpoints()
    path = newest / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    if damage == "flipped":
        content[random.Random(file).randrange(len(content))] ^= 1
        path.write_bytes(content)
    if damage == "deleted":
        path.unlink()
    if damage == "longer":
        path.write_bytes(content + b"\n")
    said = there.train()
    assert after(said) == 5 and newest.name in said and older.name not in said
    assert there.outputs() == undisturbed


def test_with_every_checkpoint_damaged_training_begins_anew(place, undisturbed):
    there = place("damaged")
    there.killed("step:6")
    for folder in there.checkpoints():
        (folder / "state.json").write_text("{}")
    assert after(there.train()) is None
    assert there.outputs() == undisturbed


def test_checkpoints_are_gone_once_the_stage_is_done_and_at_most_two_are_kept_till_then(place):
    there = place("killed")
    there.killed("step:9")
    assert [int(path.name[4:13]) for path in there.checkpoints()] == [8, 9]
    there.train()
    assert not there.checkpoints() and not any(path.is_dir() for path in (there.folder / ".runs").iterdir())
