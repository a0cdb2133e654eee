"""What a person watches while it trains: gauges, telemetry, the table and the lines, and who else is told."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch
from rich.console import Console

from stages.models import trackers
from stages.models.watch import LINES, QUIET_SECONDS, Gauges, Reading, Telemetry, Watch
from stages.refusal import Refusal
from tests import test_train
from tests.conftest import ROOT

trained = test_train.trained  # the fixture
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that says what the list it gives says, utilisation by utilisation."""
    says = [80, 100]
    monkeypatch.setattr("torch.cuda.utilization", lambda device: says.pop(0))
    monkeypatch.setattr("torch.cuda.temperature", lambda device: 51)
    monkeypatch.setattr("torch.cuda.device_memory_used", lambda device: 20 * 2**30)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    card = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    return says


def watch(steps: int, done: int = 0, device: torch.device = CPU) -> tuple[Watch, Clock]:
    clock = Clock()
    return Watch(steps, done, Gauges(device, clock), Telemetry(), clock), clock


def make(of: Watch, clock: Clock, *steps: int, seconds: float = 1.0) -> None:
    """Steps of 100 tokens."""
    for step in steps:
        clock.now += seconds
        of.made(step, 100, 3 / step, 0.25, 1e-3)


# --- gauges -----------------------------------------------------------------------------------------------------------


def test_a_gpu_is_looked_at_now_and_then_and_told_of_in_the_timing(gpu):
    clock = Clock()
    gauges = Gauges(CUDA, clock)
    first = gauges.look()
    clock.now += 1
    assert gauges.look() == first == Reading(20.0, 80, 51)  # too early for another
    clock.now += 1
    assert gauges.look() == Reading(20.0, 100, 51)
    assert gauges.figures() == {"gpu": "A GPU", "gpu_utilisation_percent": 90.0, "gpu_temperature_celsius": 51}


def test_a_gpu_that_does_not_tell_is_asked_once_and_its_memory_is_torchs(gpu, monkeypatch):
    asked = []

    def refuse(device):
        asked.append(device)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr("torch.cuda.utilization", refuse)
    clock = Clock()
    gauges = Gauges(CUDA, clock)
    for _ in range(2):
        assert gauges.look() == Reading(3.0)
        clock.now += Gauges.EVERY_SECONDS
    assert len(asked) == 1 and gauges.figures() == {}


def test_on_a_cpu_there_is_the_processs_memory_and_nothing_of_a_gpu():
    gauges = Gauges(CPU)
    reading = gauges.look()
    assert reading.memory_gib == pytest.approx(psutil.Process().memory_info().rss / 2**30, abs=0.02)
    assert (reading.utilisation_percent, gauges.figures(), gauges.room()) == (None, {}, "")


# --- telemetry --------------------------------------------------------------------------------------------------------


def rows(telemetry: Telemetry, path) -> list[dict[str, str]]:
    telemetry.write(path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_telemetry_has_the_tokens_a_second_between_its_moments_and_what_the_machine_told(tmp_path):
    telemetry = Telemetry(apart_seconds=1)
    telemetry.add(2, 1, 100, Reading(1.5, 80, 50))
    telemetry.add(2.5, 2, 200, Reading(1.5, 80, 50))  # too near
    telemetry.add(4, 3, 400, Reading(1.5))
    first, last = rows(telemetry, tmp_path / "t.csv")
    assert first == {
        "seconds": "2.0", "step": "1", "tokens_per_second": "50.0",
        "memory_gib": "1.5", "utilisation_percent": "80", "temperature_celsius": "50",
    }  # fmt: skip
    assert (last["step"], last["tokens_per_second"], last["utilisation_percent"]) == ("3", "150.0", "")


def test_telemetry_stays_small_however_long_the_run_and_covers_all_of_it(tmp_path):
    telemetry = Telemetry()
    for step in range(1, 20_001):
        telemetry.add(step, step, 100 * step, Reading(1.0))
    telemetry.add(20_000, 20_000, 2_000_000, Reading(1.0), last=True)
    found = rows(telemetry, tmp_path / "t.csv")
    steps = [int(row["step"]) for row in found]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert Telemetry.MOST / 3 < len(found) < Telemetry.MOST
    assert steps[0] < 300 and steps[-1] == 20_000 and max(gaps) < 20_000 / 60
    assert {row["tokens_per_second"] for row in found} == {"100.0"}


def test_telemetry_of_a_process_that_goes_on_counts_on_from_what_the_checkpoint_kept(tmp_path):
    before = Telemetry(apart_seconds=1)
    before.add(10, 5, 1000, Reading(1.0))
    after = Telemetry(**json.loads(json.dumps(before.state)))
    after.add(10, 10, 500, Reading(2.0))
    found = rows(after, tmp_path / "t.csv")
    assert [(row["seconds"], row["step"], row["tokens_per_second"]) for row in found] == [
        ("10.0", "5", "100.0"),
        ("20.0", "10", "50.0"),
    ]


# --- lines and table --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_long_run_says_a_few_lines(capsys):
    of, clock = watch(1000)
    with of.shown(lambda values, step: None, Console(file=io.StringIO())):
        make(of, clock, *range(1, 1001))
        of.validated(1000, 0.5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == LINES + 2  # the first step, and the validation
    assert said[0].startswith("step 1 of 1,000: loss 3.000, gradient norm 0.25, learning rate 1.00e-03, tokens/s 100, ")
    assert said[0].endswith(", ? left")  # the first step compiles: nothing can be told from it
    assert said[10].startswith("step 500 of 1,000: ") and said[10].endswith(", 8:20 left")
    assert said[-1] == "step 1,000 of 1,000: validation loss 0.500"
    assert not any("\x1b" in line for line in said)


def test_without_a_terminal_slow_steps_say_a_line_every_ten_minutes(capsys):
    of, clock = watch(1000)
    with of.shown(lambda values, step: None, Console(file=io.StringIO())):
        make(of, clock, *range(1, 31), seconds=QUIET_SECONDS / 10)
    steps = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [1, 11, 21]


def test_a_terminal_gets_a_table_that_stays_at_the_bottom_and_what_else_is_said_above_it(capsys):
    of, clock = watch(1000)
    terminal = Terminal()
    with of.shown(lambda values, step: None, Console(file=terminal, force_terminal=True, width=80)):
        print("a warning", file=sys.stderr)
        print("another", file=sys.stderr)
        make(of, clock, *range(1, 501))
    assert capsys.readouterr().err == ""
    _, between, after = re.split("a warning|another", terminal.getvalue())
    assert between.strip().startswith("step 0 of 1,000") and between.endswith("\x1b[1A\x1b[2K")  # drawn, wiped away
    assert after.strip().startswith("step 0 of 1,000") and after.count("\x1b[1A\x1b[2Kstep 500 of 1,000") == 1


def test_the_colours_of_a_build_server_do_not_make_a_terminal_of_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    of, clock = watch(4)
    file = io.StringIO()
    with of.shown(lambda values, step: None, Console(file=file)):
        make(of, clock, 1)
    assert file.getvalue() == "" and capsys.readouterr().err.startswith("step 1 of 4: ")


def test_the_table_has_every_figure_of_a_gpu_within_80_columns(gpu):
    gpu[:] = [97] * 100
    of, clock = watch(100_000, device=CUDA)
    make(of, clock, *range(1, 41))
    of.validated(40, 1.234)
    of.recent[0] = (of.recent[0][0], -9_000_000)  # as many tokens a second as a node of GPUs makes
    lines = of.table().plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("step 40 of 100,000  ") and lines[0].endswith("0:40 gone, 27:46:00 left")
    for name, value in {
        "loss": "0.075", "validation loss": "1.234 at 40", "gradient norm": "0.25", "learning rate": "1.00e-03",
        "memory": "20.0 of 80.0 GiB", "utilisation": "97%", "temperature": "51 °C",
    }.items():  # fmt: skip
        assert re.search(rf"(^|  ){name} +{value} ", of.table().plain, re.MULTILINE), name
    assert re.search(r"tokens/s +4\d\d,\d\d\d ", of.table().plain)


def test_the_time_left_is_at_the_pace_since_the_first_step_and_runs_down_between_steps():
    of, clock = watch(11)
    make(of, clock, 1, seconds=100)
    assert of.left == "?"
    make(of, clock, 2, 3, seconds=10)
    assert of.left == "1:20"
    clock.now += 15
    assert of.left == "1:05"


def test_a_run_that_goes_on_reckons_with_its_own_steps_alone():
    of, clock = watch(20, done=10)
    assert of.table().plain.startswith("step 10 of 20") and of.left == "?"
    make(of, clock, 11, 12, 13, seconds=10)
    assert of.left == "1:10"
    assert of.tokens_per_second == pytest.approx(10.0)


# --- who else is told -------------------------------------------------------------------------------------------------


class Tracker:
    """Keeps what it is told; fails where `fails` says."""

    def __init__(self, fails: str = "", at: int = 0):
        self.fails, self.at = fails, at
        self.told: list[tuple[int, dict]] = []
        self.parameters: dict = {}
        self.gate = threading.Event()
        self.status = ""

    def start(self):
        if self.fails == "start":
            raise ConnectionRefusedError("no server at\n127.0.0.1")

    def store_init_configuration(self, values):
        self.parameters = values

    def log(self, values, step):
        if self.fails == "log" and step >= self.at:
            raise KeyError("whatever a client raises")
        if self.fails == "hangs" and step >= self.at:
            self.gate.wait(60)
        self.told.append((step, values))

    def finish(self, status):
        if self.fails == "finish":
            raise ConnectionResetError("the server is gone")
        self.status = status


@pytest.fixture
def listening(monkeypatch):
    """Puts trackers in the place of those that are named."""

    def put(**named: Tracker) -> dict[str, Tracker]:
        monkeypatch.setattr(trackers, "refuse_missing", lambda names: None)
        monkeypatch.setattr("stages.train.refuse_missing", lambda names: None)
        monkeypatch.setattr(trackers, "ERRORS", {})
        monkeypatch.setattr(trackers, "_tracker", lambda name, run, logs: (named[name], named[name].finish))
        return named

    return put


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_type(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in trackers.INSTALL:
        with pytest.raises(Refusal, match=rf"names {name}, which is not installed; take it out, or: pip install "):
            trackers.refuse_missing([name])
    trackers.refuse_missing([])


def test_a_tracker_that_does_not_begin_in_time_is_refused(listening, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "BEGIN_SECONDS", 0.2)
    silent = listening(mlflow=Tracker())["mlflow"]
    monkeypatch.setattr(silent, "start", silent.gate.wait)
    with pytest.raises(Refusal, match="mlflow has not begun after 0 s"), trackers.started(["mlflow"], {}):
        pytest.fail("it began")
    silent.gate.set()


def test_a_tracker_that_cannot_begin_is_refused_in_a_line_and_those_that_have_begun_are_ended(
    listening, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    named = listening(tensorboard=Tracker(), mlflow=Tracker("start"))
    with (
        pytest.raises(Refusal, match=r"mlflow cannot begin: no server at 127.0.0.1; mend it, or take it out"),
        trackers.started(list(named), {}),
    ):
        pytest.fail("it began")
    assert named["tensorboard"].status == "FAILED"


def test_a_file_in_the_way_of_the_logs_is_refused(listening, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listening(wandb=Tracker())
    (tmp_path / "logs").touch()
    with (
        pytest.raises(Refusal, match=r"logs: machine.report_to writes there: File exists"),
        trackers.started(["wandb"], {}),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("log", "wandb is told nothing from step 3 on: 'whatever a client raises'; training goes on\n"),
        ("finish", "wandb is told nothing from step 6 on: the server is gone; it may show the run as running\n"),
        ("hangs", "wandb is told nothing from step 3 on: it took over 1 s; it may show the run as running\n"),
    ],
)
def test_a_tracker_that_fails_leaves_a_line_and_training_and_the_other_trackers_as_they_would_have_been(
    fails,
    said,
    listening,
    trained,
    capsys,
    monkeypatch,
):
    monkeypatch.setattr(trackers, "END_SECONDS", 1.0)
    undisturbed = trained("undisturbed")
    capsys.readouterr()
    named = listening(wandb=Tracker(fails, at=3), tensorboard=Tracker())
    folder = trained("watched", **{"machine.report_to": ["wandb", "tensorboard"]})
    named["wandb"].gate.set()
    assert [line for line in capsys.readouterr().err.splitlines(True) if "told" in line] == [said]
    for name in ("adapter/adapter_model.safetensors", "train.json", "loss.csv"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    losses = [(step, values["loss"]) for step, values in named["tensorboard"].told if "loss" in values]
    with (folder / "loss.csv").open() as file:
        assert losses == [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["loss"]]
    assert [step for step, values in named["tensorboard"].told if "validation_loss" in values] == [2, 4, 6]
    assert {"gradient_norm", "learning_rate", "tokens_per_second", "memory_gib"} < set(named["tensorboard"].told[0][1])
    assert named["tensorboard"].status == "FINISHED"
    parameters = named["tensorboard"].parameters
    assert (parameters["lora.r"], parameters["train.batch_size"], parameters["steps"]) == (4, 4, 6)
    assert all(isinstance(value, (int, float, str)) for value in parameters.values())


def test_a_tracker_that_is_slower_than_the_steps_is_told_of_fewer_but_of_every_validation(
    listening, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    slow = listening(mlflow=Tracker("hangs", at=0))["mlflow"]
    with trackers.started(["mlflow"], {}) as tell:
        for step in range(1, 1001):
            tell({"loss": 1.0}, step)
        tell({"validation_loss": 2.0}, 1000)
        slow.gate.set()
    assert len(slow.told) <= trackers.MOST_UNTOLD + 2  # the one that it was at, and the validation
    assert slow.told[-1] == (1000, {"validation_loss": 2.0}) and slow.status == "FINISHED"


@pytest.mark.parametrize(
    ("ends", "status"),
    [(None, "FINISHED"), (Refusal("the loss is not finite"), "FAILED"), (KeyError("a fault"), "FAILED"),
     (SystemExit(143), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)  # fmt: skip
def test_a_tracker_is_told_how_training_ended(listening, tmp_path, monkeypatch, ends, status):
    monkeypatch.chdir(tmp_path)
    named = listening(mlflow=Tracker())
    with contextlib.suppress(BaseException), trackers.started(["mlflow"], {}) as tell:
        tell({"loss": 1.0}, 1)
        if ends:
            raise ends
    assert named["mlflow"].status == status


def test_each_tracker_is_told_of_the_end_in_its_own_words_and_tells_its_makers_nothing(tmp_path, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(end_run=told.append, set_tracking_uri=str))
    monkeypatch.setattr("accelerate.tracking.is_mlflow_available", lambda: True, raising=False)
    private = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_CODE": "true"}
    others = ["WANDB_DISABLE_GIT", "WANDB_CONSOLE", "WANDB_FINISH_TIMEOUT"]
    others += ["MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"]
    for variable in (*private, *others):
        monkeypatch.setenv(variable, "")  # so that it is as before when this test is done
        monkeypatch.delenv(variable)
    _, finish = trackers._tracker("mlflow", "run", tmp_path)
    finish(trackers.FAILED)
    wandb, finish = trackers._tracker("wandb", "run", tmp_path)
    wandb.run = SimpleNamespace(finish=lambda exit_code: told.append(exit_code))
    for status in (trackers.FINISHED, trackers.FAILED, trackers.KILLED):
        finish(status)
    board, finish = trackers._tracker("tensorboard", "run", tmp_path)
    board.writer = SimpleNamespace(close=lambda: told.append("closed"))
    finish(trackers.FAILED)
    assert told == ["FAILED", 0, 1, 1, "closed"]
    assert {variable: os.environ[variable] for variable in private} == private


HANGS = """
import sys, threading
from stages import refusal
from stages.models import trackers

class Silent:
    def __init__(self): self.asked = threading.Event()
    def start(self): pass
    def store_init_configuration(self, values): pass
    def log(self, values, step):
        self.asked.set()
        threading.Event().wait()

trackers.END_SECONDS = 0.2
trackers.ERRORS = {}
silent = {"mlflow": Silent(), "wandb": Silent()}
trackers._tracker = lambda name, *_: (silent[name], print)

def main(arguments):
    with trackers.started(["mlflow", "wandb"], {}) as tell:
        for step in range(3):
            tell({"loss": 1.0}, step)
        for one in silent.values():
            one.asked.wait()
        if arguments:
            print("begun", flush=True)
            threading.Event().wait()

refusal.run(main)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_ends_though_its_trackers_hang_and_when_it_is_told_to_in_its_own_way(tmp_path, stopped):
    """Not by the alarm that would kill it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, *["wait"] * stopped],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if stopped:
        process.stdout.readline()
        process.terminate()
    try:
        said = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == (128 + signal.SIGTERM if stopped else 0), said
    assert len([line for line in said if "is told nothing from step 0 on: it took over" in line]) == 2, said


def test_training_leaves_telemetry_up_to_its_last_step_and_says_how_it_goes(trained, capsys):
    folder = trained("run")
    said = capsys.readouterr().err
    assert re.search(r"^step 6 of 6: loss \d", said, re.MULTILINE) and "step 2 of 6: validation loss " in said
    with (folder / "metrics/telemetry.csv").open() as file:
        found = list(csv.DictReader(file))
    assert found[-1]["step"] == "6" and all(float(row["tokens_per_second"]) > 0 for row in found)
