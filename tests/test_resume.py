"""Training that is killed, at any moment, and goes on: the same bytes, nothing stale, one trainer at a time."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from stages.models.checkpoints import Checkpoint, Run, _read, opened
from stages.refusal import Refusal
from tests import forkserver
from tests.conftest import CHAT, LORA, ROOT, write_asked, write_params, write_tiny_model
from tests.test_train import write_tokens

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
        write_asked(folder / "asked", folder / "validation.parquet", model)
        self.set(**overrides)

    def set(self, **overrides) -> None:
        train = {"train.epochs": 2.0, "train.batch_size": 4, "train.validations": 3, "train.learning_rate": 0.01}
        self.device = overrides.get("machine.device", "cpu")
        machine = {"machine.device": self.device, "machine.dtype": "float32", "machine.tokens_per_pack": 100}
        often = {"machine.checkpoint_minutes": 1e-9}
        lora = {f"lora.{key}": value for key, value in {**LORA, "dropout": 0.1}.items()}
        write_params(self.folder, **{**train, **machine, **often, **lora, **overrides})

    def start(self, *module: str, **environment: str) -> subprocess.Popen:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
        # what is forked has no way to a GPU
        python = sys.executable if self.device == "cuda" else self.python / "python"
        return subprocess.Popen(
            [python, "-m", *module,
             "base", "train.parquet", "validation.parquet", "asked", "adapter", "train.json", "loss.csv"],
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
        assert process.returncode & 255 == 256 - signal.SIGKILL, said  # in the stand-in's words or the kernel's

    def outputs(self) -> list[bytes]:
        return [(self.folder / name).read_bytes() for name in OUTPUTS]

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(".runs/*/step*"))


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Path]:
    """A folder with a `python` that has the libraries imported already."""
    socket = folder / "s"
    server = subprocess.Popen(
        [sys.executable, forkserver.__file__, "serve", str(socket)],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    forkserver.install(folder, socket)
    while not socket.exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield folder
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    with started(tmp_path_factory.mktemp("python")) as folder:
        yield folder


@pytest.fixture
def place(tmp_path, python, tiny_model):
    return lambda name, **overrides: Place(tmp_path / name, python, tiny_model, **overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, python, tiny_model):
    """What the stage writes when nothing happens to it."""
    there = Place(tmp_path_factory.mktemp("undisturbed") / "place", python, tiny_model)
    there.train()
    return there.outputs()


def edit_code(there: Place) -> None:
    path = there.folder / "stages/train.py"
    text = path.read_text()
    assert text.count("weight_decay=train.weight_decay") == 1
    path.write_text(text.replace("weight_decay=train.weight_decay", "weight_decay=train.weight_decay + 0.1"))


def edit_package(there: Place) -> None:
    """As if another version of a library were installed."""
    path = there.folder / "peft-0.0.0.dist-info/METADATA"
    path.parent.mkdir()
    path.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.0\n")


EDITS: dict[str, Callable[[Place], object]] = {
    "alpha": lambda there: there.set(**{"lora.alpha": 32.0}),
    "dropout": lambda there: there.set(**{"lora.dropout": 0.2}),
    "learning rate": lambda there: there.set(**{"train.learning_rate": 0.005}),
    "seed": lambda there: there.set(**{"train.seed": 1}),
    "pack": lambda there: there.set(**{"machine.tokens_per_pack": 150}),
    "training row": lambda there: write_tokens(there.folder / "train.parquet", 22, 7),
    "scoring": lambda there: (there.folder / "asked/scoring.json").write_text("[]"),
    "validation row": lambda there: write_tokens(there.folder / "validation.parquet", 5, 8),
    "weights": lambda there: write_tiny_model(there.folder / "base", seed=1),
    "code": edit_code,
    "package": edit_package,
}


def after(said: str) -> int | None:
    """The step after which training said it went on."""
    found = re.search(r"going on after step (\d+) of 12", said)
    return found and int(found[1])


@pytest.mark.parametrize("step", [1, 5, 11])
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
        {"lora.r": 128, "train.optimizer": "adamw_8bit"},
        {"train.keep": "best", "train.validations": 6, "train.learning_rate": 0.05},  # the best is step 2
        {**CHAT, "train.metric": "score", "evaluate.max_new_tokens": 6, "train.keep": "best"},
        {"train.early_stopping": 4, "train.validations": 6, "train.learning_rate": 0.05},  # ends at step 10
        {"lora.trainable_tokens": ["<end_of_turn>"], "lora.quantize": "int8"},
        {"lora.modules_to_save": ["lm_head"], "machine.dtype": "bfloat16", "train.optimizer": "adamw_8bit"},
    ],
)
def test_whatever_the_settings_a_training_killed_twice_gives_the_same_bytes(place, settings):
    clean, killed = place("clean", **settings), place("killed", **settings)
    clean.train()
    killed.killed("step:3")
    killed.killed("step:8")
    assert after(killed.train()) == 8
    assert killed.outputs() == clean.outputs()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora.dropout": 0.0}, {"lora.quantize": "nf4"}, {"lora.target_modules": ["q_proj", "v_proj"]}],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_on_a_gpu_a_training_killed_twice_gives_the_same_bytes_as_far_as_two_undisturbed_ones_do(
    place, settings, deterministic
):
    settings = {
        "machine.device": "cuda",
        "machine.dtype": "bfloat16",
        "machine.deterministic": deterministic,
    } | settings
    one, other, killed = (place(name, **settings) for name in ("one", "other", "killed"))
    one.train()
    other.train()
    if not deterministic and one.outputs() != other.outputs():
        pytest.skip("two undisturbed trainings differ here")
    assert other.outputs() == one.outputs()
    killed.killed("step:3")
    killed.killed("step:8")
    assert after(killed.train()) == 8
    assert killed.outputs() == one.outputs()


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


@pytest.mark.parametrize("edited", ["alpha", "training row", "code", "package"])
def test_what_decides_the_result_changed_training_begins_anew(place, edited):
    """All of EDITS are in bench/kills.py."""
    killed, clean = place("killed"), place("clean")
    killed.killed("step:6")
    for there in (killed, clean):
        EDITS[edited](there)
    assert after(killed.train()) is None
    clean.train()
    assert killed.outputs() == clean.outputs()


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "longer"])
def test_a_damaged_file_of_a_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, capsys, file, damage):
    run = Run(tmp_path / "run", "auto")
    for step in (1, 2, 3):
        run.save(Checkpoint(step, {"x": torch.full((3,), float(step))}, {"history": [step]}))
    path = max((tmp_path / "run").iterdir()) / file
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    if damage == "longer":
        path.write_bytes(content + b"\n")
    for place in range(len(content)) if damage == "flipped" else [0]:
        if damage == "flipped":
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert _refuses(path.parent)
    found = run.latest()
    assert (found.step, found.state, found.tensors["x"].tolist()) == (2, {"history": [2]}, [2.0, 2.0, 2.0])
    assert "step000000003" in capsys.readouterr().err


def test_a_checkpoint_that_the_disk_cannot_read_is_kept_and_named(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", 1)
    run.save(Checkpoint(1, {"x": torch.ones(3)}, {}))
    reads = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "tensors.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return reads(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(Refusal, match=r"step000000001.*Input/output error.*see to its disk, or delete the folder"):
        run.latest()
    monkeypatch.undo()
    assert run.latest().step == 1


def _refuses(folder: Path) -> bool:
    try:
        _read(folder)
    except (OSError, ValueError):
        return True
    return False


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
    assert not any(path.is_dir() for path in (there.folder / ".runs").iterdir())


def test_a_training_that_was_done_when_dvc_was_killed_is_not_done_again(place, undisturbed):
    there = place("done")
    dvc = {"DVC_ROOT": str(there.folder), "DVC_STAGE": "train"}
    there.train(**dvc)
    shutil.rmtree(there.folder / "adapter")  # as DVC does before it runs a stage again
    assert after(there.train(**dvc)) == 12
    assert there.outputs() == undisturbed


def test_a_training_whose_result_dvc_has_is_done_again_when_dvc_asks(place, undisturbed):
    there = place("forced")
    dvc = {"DVC_ROOT": str(there.folder), "DVC_STAGE": "train"}
    there.train(**dvc)
    recorded = hashlib.md5((there.folder / "loss.csv").read_bytes()).hexdigest()
    (there.folder / "dvc.lock").write_text(f"md5: {recorded}\n")
    assert after(there.train(**dvc)) is None
    assert there.outputs() == undisturbed


def test_checkpoints_lie_where_dvc_says_its_repository_is(place, tmp_path):
    there = place("temporary")
    there.killed("step:2", DVC_ROOT=str(tmp_path))
    assert list(tmp_path.glob(".runs/*/step*")) and not there.checkpoints()


def test_a_second_trainer_beside_a_living_one_refuses_in_one_line_and_the_first_goes_on(place):
    there = place("two")
    there.set(**{"train.epochs": 200.0})
    first = there.start("stages.train")
    while not there.checkpoints():
        assert first.poll() is None
        time.sleep(0.02)
    for changes in ({}, {"lora.r": 2}):  # the same adapter; and another, into the same folder
        there.set(**{"train.epochs": 200.0, **changes})
        said = there.train(status=2)
        assert re.fullmatch(r"error: adapter: another training .*: process \d+; wait for its end, or end it\n", said)
    assert first.poll() is None
    (process,) = {int(path.read_text()) for path in there.folder.glob(".runs/*.lock") if path.read_text()}
    os.kill(process, signal.SIGTERM)
    assert "stopped by SIGTERM" in first.communicate(timeout=30)[1]
    assert first.returncode == 128 + signal.SIGTERM and not (there.folder / "adapter").exists()


def test_checkpoints_that_nobody_went_on_from_for_long_are_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / ".runs" / name).mkdir(parents=True)
    os.utime(tmp_path / ".runs/old", (0, 0))
    with opened(Path("adapter"), {"seed": 1}, "auto"):
        assert not (tmp_path / ".runs/old").exists() and (tmp_path / ".runs/new").exists()


def test_the_interval_chosen_here_costs_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 3.0, 302.0, 304.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run = Run(tmp_path / "run", "auto")
    run.save(Checkpoint(1, {"x": torch.zeros(1)}, {}))  # takes 3 s
    assert not run.due and run.due


def test_training_draws_from_no_random_numbers_but_torchs(place):
    there = place("drawn")
    driver = (there.folder / "driver.py").read_text()
    check = """
import random
import numpy
def watched(self, *inputs, training_step=train.Trainer.training_step):
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    loss = training_step(self, *inputs)
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist())
    return loss
train.Trainer.training_step = watched
refusal.run"""
    (there.folder / "driver.py").write_text(driver.replace("refusal.run", check))
    assert there.start("driver", "none:0").wait(60) == 0
