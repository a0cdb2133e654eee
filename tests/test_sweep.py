"""Sweeps through the real DVC, of a pipeline that trains nothing; and the page that compares what came out."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.params import load
from stages.refusal import Refusal
from tests.conftest import ROOT, write_params
from tests.test_report import HOSTILE, Page
from tools import doctor, sweep, sweep_page, trials

DVC_YAML = """
stages:
  prepare:
    cmd: python fake.py prepare
    deps: [fake.py, data/own]
    params: [prepare]
    outs: [data/rows]
  train:
    cmd: python fake.py train
    deps: [data/rows, fake.py]
    params: [lora, train]
    outs: [data/answers/tuned.jsonl]
    metrics:
      - metrics/tuned.json: {cache: false}
metrics:
  - metrics/timing.json
"""
FAKE = """
import json, os, sys, time
from pathlib import Path
from ruamel.yaml import YAML
from stages.refusal import Refusal, run

def main(arguments):
    runs = Path(os.environ["DVC_ROOT"]) / ".runs"
    if arguments == ["prepare"]:
        Path("data/rows").write_text(Path("data/own/rows").read_text())
        with (runs / "notes").open("a") as notes:
            notes.write(json.dumps({"prepared": time.time()}) + "\\n")
        return
    params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
    r, rate = params["lora"]["r"], params["train"]["learning_rate"]
    note = {"r": r, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid(), "group": os.getpgid(0)}
    def write(**more):
        with (runs / "notes").open("a") as notes:
            notes.write(json.dumps({**note, **more}) + "\\n")
    write(began=time.time())
    while (runs / f"hold-{r}").exists():
        time.sleep(0.02)
    if r == 16 and rate == 0.5:
        write(ended=time.time())
        raise Refusal("the loss at step 3 is not finite; lower train.learning_rate")
    right = 2 * r + 10 * (rate < 0.1)
    scores = [{"execution_accuracy": n < right, "valid_sql": True} for n in range(40)]
    Path("data/answers").mkdir(exist_ok=True)
    Path("metrics").mkdir(exist_ok=True)
    with open("data/answers/tuned.jsonl", "w") as file:
        for n, score in enumerate(scores):
            row = {"id": str(n), "group": str(n), "scores": score, "stopped": True, "tokens": 2, "nats": 1.0 + n / r}
            file.write(json.dumps(row) + "\\n")
    Path("metrics/tuned.json").write_text(json.dumps({"execution_accuracy": min(40, right) / 40}))
    Path("metrics/timing.json").write_text(json.dumps({"train": {"seconds": 10.0 * r}}))
    write(ended=time.time())

run(main)
"""


TWO_GPUS = """
class NVMLError(Exception):
    pass

def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 2
"""


class Repository:
    """A git repository with DVC, this project's code, and a pipeline of two stages."""

    def __init__(self, folder: Path):
        self.folder = folder
        named = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"), "t")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "PYTEST_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**kept, **named, "PATH": path}
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)

    def run(self, *command: str) -> str:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def start(self, *settings: str, **environment: str) -> subprocess.Popen:
        arguments = [argument for setting in settings for argument in ("-S", setting)]
        return subprocess.Popen(
            [sys.executable, "-m", "tools.sweep", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def sweep(self, *settings: str, **environment: str) -> tuple[int, str]:
        process = self.start(*settings, **environment)
        said = process.communicate(timeout=120)[1]
        return process.returncode, said

    def notes(self) -> list[dict]:
        path = self.folder / ".runs/notes"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @contextlib.contextmanager
    def held(self, r: int):
        """Training at that rank goes on for ever while the block runs."""
        hold = self.folder / f".runs/hold-{r}"
        hold.parent.mkdir(exist_ok=True)
        hold.touch()
        yield
        hold.unlink()

    def training(self, r: int) -> dict:
        """The note of the training at that rank, as soon as it has begun."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            begun = [note for note in self.notes() if note.get("r") == r]
            if begun:
                return begun[-1]
            time.sleep(0.05)
        raise AssertionError(f"no training at rank {r}")


def gone(process: int) -> bool:
    """Whether a process ends within seconds; one that nobody has waited for counts as ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    made = Repository(tmp_path_factory.mktemp("sweep") / "repository")
    for name in ("stages", "tools"):
        shutil.copytree(ROOT / name, made.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore", ".dvc/config"):
        (made.folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, made.folder / name)
    (made.folder / ".dvc/.gitignore").write_text("/tmp\n/cache\n/config.local\n")
    (made.folder / "dvc.yaml").write_text(DVC_YAML)
    (made.folder / "fake.py").write_text(FAKE)
    (made.folder / "pynvml.py").write_text(TWO_GPUS)  # found before the library
    (made.folder / "data/own").mkdir(parents=True)
    (made.folder / "data/own/.gitkeep").touch()
    (made.folder / "data/.gitignore").write_text("/rows\n/answers\n")
    write_params(made.folder, **{"lora.alpha": 8, "machine.device": "auto"})
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "start")
    (made.folder / "data/own/rows").write_text("not in git")
    return made


def test_eight_experiments_of_which_one_fails_and_one_is_killed_and_then_the_same_again(repository):
    settings = "lora.r=2,4,8,16", "train.learning_rate=1e-4,0.5"
    with repository.held(8):
        running = repository.start(*settings)
        victim = repository.training(8)
        os.kill(victim["group"], signal.SIGKILL)  # DVC, which leads its group
        assert gone(victim["pid"])
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 1, said
    assert "8 experiments, on 2 GPUs; 0 are done already" in said
    assert "r=8,learning_rate=0.0001: killed by SIGKILL\n" in said
    reason = "the loss at step 3 is not finite; lower train.learning_rate"
    assert f"r=16,learning_rate=0.5: {reason}\n" in said and "2 of 8 failed" in said
    assert "Traceback" not in said

    trained = [note for note in repository.notes() if "r" in note]
    assert {note["gpu"] for note in trained} == {"0", "1"}
    busy = dict.fromkeys("01")
    for note in trained:  # in the order of time
        if "began" in note:
            assert busy[note["gpu"]] in (None, victim["pid"]), "two at once on one GPU"
            busy[note["gpu"]] = note["pid"]
        else:
            busy[note["gpu"]] = None
    assert sum("prepared" in note for note in repository.notes()) == 1, "what no swept parameter reaches runs once"

    already = len(repository.notes())
    status, said = repository.sweep(*settings)
    assert status == 1 and "8 experiments, on 2 GPUs; 6 are done already" in said and "7 of 8 done" in said
    again = [note["r"] for note in repository.notes()[already:] if "began" in note]
    assert sorted(again) == [8, 16]
    assert not (repository.folder / ".runs/sweep/trees").exists() or not any(
        (repository.folder / ".runs/sweep/trees").iterdir()
    )

    assert repository.run("git", "status", "--porcelain") == "?? data/own/rows\n"
    assert repository.run("git", "rev-parse", "--abbrev-ref", "HEAD") == "main\n"
    shown = repository.run("dvc", "exp", "show", "--csv")
    assert sum("r=" in line for line in shown.splitlines()) == 7 and "lora.r" in shown and "execution_accuracy" in shown
    page = Page((repository.folder / "metrics/sweep.html").read_text())
    assert page.title == "text to sql, 7 experiments: 100.0% at best"
    assert "r=16,learning_rate=0.0001" in page.text and reason in page.text and "train 160" in page.text


def test_experiments_that_train_the_very_same_adapter_take_turns_and_train_once(repository):
    with repository.held(5):
        running = repository.start("lora.r=5,6", "evaluate.max_new_tokens=8,16")
        repository.training(5)
        repository.training(6)  # on the other GPU
        time.sleep(1)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 0 and "4 experiments, on 2 GPUs" in said and "4 of 4 done" in said, said
    assert sorted(note["r"] for note in repository.notes() if note.get("r") in (5, 6) and "began" in note) == [5, 6]


def test_a_sweep_that_is_killed_leaves_nothing_running_and_goes_on_where_it_stopped(repository):
    with repository.held(64):
        killed = repository.start("lora.r=32,64", CUDA_VISIBLE_DEVICES="0")
        victim = repository.training(64)
        status, said = repository.sweep("lora.r=1")
        assert status == 2 and said == "error: another sweep runs in this repository; wait for its end, or end it\n"
        killed.kill()
        killed.communicate()
        assert gone(victim["group"]) and gone(victim["pid"])
    status, said = repository.sweep("lora.r=32,64", CUDA_VISIBLE_DEVICES="0")
    assert status == 0 and "2 experiments, on 1 GPU; 1 are done already" in said
    assert [note["r"] for note in repository.notes() if "ended" in note].count(32) == 1


def test_ctrl_c_ends_the_children_and_says_so_in_one_line(repository):
    with repository.held(128), repository.held(256):
        running = repository.start("lora.r=128,256")
        victims = [repository.training(128), repository.training(256)]
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=30)[1]
        assert running.returncode == 130 and said.splitlines()[-1] == "error: stopped by SIGINT"
        assert "Traceback" not in said
        assert all(gone(victim["group"]) and gone(victim["pid"]) for victim in victims)
    assert not any((repository.folder / ".runs/sweep/trees").iterdir())


def test_what_is_not_committed_is_refused(repository):
    params = repository.folder / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("r: 16", "r: 17"))
    status, said = repository.sweep("lora.r=2,4")
    assert status == 2 and said.startswith("error: params.yaml: is not as in the last commit")
    params.write_text(before)
    added = repository.folder / "stages/tasks/mine.py"
    added.touch()
    status, said = repository.sweep("lora.r=2,4")
    assert status == 2 and said.startswith("error: stages/tasks/mine.py: is not as in the last commit")
    added.unlink()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["lora.r=8,sixteen"], "-S lora.r=sixteen: lora.r is the text 'sixteen'; it should be a whole number"),
        (["lora.r=8,0"], "-S lora.r=0: lora.r is 0; it should be at least 1"),
        (["lora.rank=8"], "-S lora.rank=8: lora.rank is not a parameter; did you mean lora.r"),
        (["+lora.new=8"], "-S +lora.new=8: lora.new is not a parameter"),
        (["lora=8"], "-S lora=8: lora is a section; name one of its parameters, as lora.alpha"),
        (["lora.r"], "-S lora.r: cannot be read"),
        (["lora.r=[8"], "-S lora.r=[8: cannot be read"),
        (["lora.r=8", "lora.r=16"], "-S lora.r: is there twice"),
        (["train.learning_rate=1e-4,0.0001"], "-S train.learning_rate=0.0001: is there twice"),
        (["machine.dtype=float32,bfloat16"], "machine decides how fast, not what comes out"),
        (["task.name=quotes,chat"], "scores of two tasks cannot be compared"),
        (["lora.method=lora,dora", "lora.init=pissa"], "-S lora.method=dora -S lora.init=pissa: lora: init pissa goes"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_in_one_line_before_anything_runs(tmp_path, monkeypatch, settings, said):
    write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        trials.combinations(settings)
    assert said in str(refused.value)
    assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)


def test_every_combination_has_a_name_that_git_takes_and_that_is_its_own(tmp_path, monkeypatch):
    write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = [
        "lora.target_modules=[q_proj,v_proj],all-linear",
        "prepare.seed=1,2",
        "train.seed=0",
        "evaluate.rows=null",
    ]
    made = trials.combinations([*settings, "data.license=a b,'a/b',a..b,x.lock"])
    names = [trial.name for trial in made]
    assert len(set(names)) == len(made) == 16
    assert all("prepare.seed=1,train.seed=0" in one or "prepare.seed=2,train.seed=0" in one for one in names)
    assert names[0].startswith("target_modules=q_proj,+v_proj,prepare.seed=1,train.seed=0,rows=null,license=a+b-")
    for one in names:
        subprocess.run(["git", "check-ref-format", f"refs/exps/{one}"], check=True)
    assert made[0].values["lora.target_modules"] == "q_proj, v_proj"


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep, "pynvml", Nvml)
    monkeypatch.setattr(doctor, "pynvml", Nvml)


class Nvml:
    """What a machine with four GPUs answers; each of them is told by the memory it has."""

    class NVMLError(Exception):
        pass

    @staticmethod
    def none(*_):
        return 0

    nvmlInit = nvmlShutdown = nvmlSystemGetCudaDriverVersion_v2 = none
    nvmlDeviceGetCount = staticmethod(lambda: 4)
    nvmlDeviceGetHandleByIndex = nvmlDeviceGetHandleByUUID = nvmlDeviceGetName = staticmethod(str)
    nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: SimpleNamespace(total=0, free=0))
    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda handle: (9, 0))


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("1", ["1"]),
        ("2, 0", ["2", "0"]),
        ("0,9,1", ["0"]),
        ("-1", []),
        ("1,,2", ["1"]),
        ("2,1,2", []),
        ("GPU-x,GPU-y", ["GPU-x", "GPU-y"]),
        ("GPU-x,1", ["GPU-x"]),
        ("1,GPU-x", ["1"]),
        ("MIG-y", ["MIG-y"]),
    ],
)
def test_doctor_and_sweep_see_those_gpus_that_cuda_sees(four_gpus, monkeypatch, listed, seen):
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert sweep.gpus_here() == seen
    assert [gpu.name for gpu in doctor.gpus()[0]] == seen
    if listed is not None:
        with_torch = torch.cuda._parse_visible_devices()  # which does not know how many there are
        assert [str(one) for one in with_torch if not isinstance(one, int) or one < 4][: len(seen)] == seen


@pytest.mark.parametrize(
    ("listed", "device", "jobs", "found"),
    [
        (None, "auto", None, ["0", "1", "2", "3"]),
        ("0,1", "auto", None, ["0", "1"]),
        ("2,1,3", "auto", 2, ["2", "1"]),
        ("0,1", "cpu", None, [None]),
        ("", "auto", 3, [None] * 3),
        ("-1", "auto", None, [None]),
        ("0,9", "auto", 2, "--jobs 2: there are 1 GPUs here"),
        ("", "cuda", None, "machine.device is cuda, but there is no GPU here"),
    ],
)
def test_never_two_on_one_gpu_and_on_a_cpu_one_at_a_time_unless_told_otherwise(
    four_gpus, monkeypatch, listed, device, jobs, found
):
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    machine = load(ROOT / "params.yaml").machine.model_copy(update={"device": device})
    if isinstance(found, list):
        assert sweep.places(machine, jobs) == found
    else:
        with pytest.raises(Refusal, match=found):
            sweep.places(machine, jobs)


@pytest.mark.parametrize(("key", "value"), [("devices", 2), ("shard_base", True)])
def test_what_takes_several_gpus_is_refused_where_an_experiment_has_one(monkeypatch, key, value):
    monkeypatch.setattr(sweep, "gpus_here", lambda: ["0", "1"])
    machine = load(ROOT / "params.yaml").machine.model_copy(update={"device": "cuda", key: value})
    with pytest.raises(Refusal, match=f"machine.{key} is .*an experiment has one GPU"):
        sweep.places(machine, None)


def test_tpus_train_one_experiment_at_a_time(monkeypatch):
    monkeypatch.setattr(sweep, "gpus_here", lambda: ["0", "1"])
    machine = load(ROOT / "params.yaml").machine.model_copy(update={"device": "xla"})
    assert sweep.places(machine, None) == sweep.places(machine, 1) == [None]
    with pytest.raises(Refusal, match="one training takes all TPU cores"):
        sweep.places(machine, 2)


# --- the page -----------------------------------------------------------------------------------------------------


def experiment(name: str, right: int, rows: int = 200, **values) -> sweep_page.Experiment:
    """One that got the first `right` of the rows right."""
    scored = {
        str(n): {
            "group": str(n),
            "scores": {"execution_accuracy": n < right},
            "stopped": True,
            "tokens": 2,
            "nats": 1.0,
        }
        for n in range(rows)
    }
    return sweep_page.Experiment(name, values, scored, {"train": 100.0})


def test_the_best_comes_first_and_what_is_behind_it_by_chance_is_told_from_what_is_worse():
    places = sweep_page.ranked(
        [experiment("low", 20), experiment("best", 100), experiment("near", 98)], "execution_accuracy"
    )
    assert [place.experiment.name for place in places] == ["best", "near", "low"]
    assert [place.close for place in places] == [False, True, False]
    assert places[0].lead is None and places[2].lead.mean == pytest.approx(0.4)
    assert places[0].low < 0.5 < places[0].high
    assert places[0].first > places[1].first > 0 == places[2].first
    assert sum(place.first for place in places) == pytest.approx(1)


def test_experiments_of_other_test_rows_are_compared_on_those_that_both_answered():
    fewer, other = experiment("fewer", 50, rows=100), experiment("other", 30)
    other = sweep_page.Experiment("other", {}, {f"x{one}": row for one, row in other.rows.items()}, {})
    best, second = sweep_page.ranked([fewer, experiment("all", 90)], "execution_accuracy")
    assert best.experiment.name == "fewer" and second.lead.mean == pytest.approx(-0.4)
    assert sweep_page.ranked([fewer, other], "execution_accuracy")[1].lead is None


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_page_has_every_experiment_and_no_text_of_a_parameter_is_markup(tmp_path, monkeypatch, count):
    monkeypatch.setattr(sweep_page, "read", lambda revision: experiment("", 60 + 7 * int(revision)).rows)
    monkeypatch.setattr(sweep_page, "timings", lambda revision: {})
    write_params(tmp_path)
    params = load(tmp_path / "params.yaml")
    pages = []
    for texts in (["plain $x$"] * count, [HOSTILE[n] + " $\\frac{" for n in range(count)]):
        finished = {f"{text} {n}": ({"lora.r": 2**n, "data.license": text}, str(n)) for n, text in enumerate(texts)}
        sweep_page.write(tmp_path / "sweep.html", params, "0", finished, {texts[0]: texts[0]})
        pages.append(Page((tmp_path / "sweep.html").read_text()))
        assert all(pages[-1].text.count(name) >= 1 for name in finished)
    made = [{(tag, name) for tag, attributes in page.elements for name in [None, *attributes]} for page in pages]
    assert made[0] == made[1] and ("script", None) not in made[0]
