"""A small pipeline's training, killed at random moments until it is done, again and again: are its bytes the same?

    python -m bench.kills kills FOLDER [MINUTES [BESIDE [FORMAT …]]]
    python -m bench.kills edits FOLDER

kills: SIGKILL to the stage, to DVC, to their process group, at random moments and, while a checkpoint is being written,
at once; after each, `dvc repro` goes on. The trainings take turns in the formats, all FORMATS unless named, with
dropout and several packs a step.
`lost_seconds_at_most` is the age of the newest checkpoint when the process that had written it was killed. edits:
something that decides the result is changed after a kill, and no checkpoint of the state before may be used. Both on
the tests' small model, in half an hour; they add `kills`, `identical`, `edits`, `stale_resumes` and more to
bench/results/reliability.json. Where there is a GPU, kills trains on it, with machine.deterministic, and adds its
counts as `gpu_kills`. MINUTES: after so many no new training is begun; each kind of kill has had its turn by seven.
BESIDE: so many repositories are at it at the same time, each with its share of the kills; the counts are written
whenever a training is done.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.checkpoints import RESULTS
from stages.outputs import write_json
from tests.conftest import ROOT, write_params, write_tiny_model
from tests.test_refusal import alive
from tests.test_resume import EDITS, Place, started
from tests.test_train import write_tokens

KILLS = 20  # of each kind
KILLS_A_TRAINING = 7
TARGETS = ("stage", "dvc", "group")
PIPELINE = """
stages:
  train:
    cmd: python -m stages.train base train.parquet validation.parquet asked adapter train.json loss.csv
    deps: [base, train.parquet, validation.parquet, stages]
    params: [lora, train]
    outs: [adapter]
    metrics:
      - train.json: {cache: false}
      - loss.csv: {cache: false}
"""
OUTPUTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "train.json", "loss.csv")
INTERVAL_SECONDS = 0.3
SETTINGS = {
    "train.epochs": 40.0,
    "train.batch_size": 4,
    "train.learning_rate": 0.01,
    "lora.r": 8,
    "lora.dropout": 0.1,
    "machine.device": "cpu",
    "machine.tokens_per_pack": 100,
    "machine.checkpoint_minutes": INTERVAL_SECONDS / 60,
}
COUNTED = (
    *("kills", *(f"killed_{target}" for target in TARGETS), "inside_a_checkpoint", "while_training", "left_running"),
    *("trainings", "identical", "not_from_the_last_checkpoint"),
)
FORMATS = {
    "float32": {"machine.dtype": "float32", "lora.quantize": None},
    "bfloat16": {"machine.dtype": "bfloat16", "lora.quantize": None},
    "nf4": {"machine.dtype": "bfloat16", "lora.quantize": "nf4"},
}
GPU = torch.cuda.is_available()
if GPU:
    SETTINGS |= {"machine.device": "cuda", "machine.deterministic": True, "train.epochs": 120.0}
    del FORMATS["float32"]
    KILLS_A_TRAINING = 5  # each begins with half a minute of its own


class Repository:
    def __init__(self, folder: Path):
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / ".dvcignore", folder / ".dvcignore")
        write_tiny_model(folder / "base")
        (folder / "asked").mkdir()
        write_tokens(folder / "train.parquet", 22, 0)
        write_tokens(folder / "validation.parquet", 5, 1)
        (folder / "dvc.yaml").write_text(PIPELINE)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DVC_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=folder, check=True)

    def take(self, form: str) -> None:
        write_params(self.folder, **SETTINGS, **FORMATS[form])

    def start(self) -> subprocess.Popen:
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=self.folder,
                env=self.environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> tuple[str, int]:
        """Let `dvc repro` end; what its outputs are, and the step after which training said it went on."""
        process = self.start()
        assert process.wait(600) == 0, (self.folder / "said").read_text()
        digest = hashlib.sha256(b"".join((self.folder / name).read_bytes() for name in OUTPUTS)).hexdigest()
        return digest, self.went_on_after()

    def went_on_after(self) -> int:
        found = re.search(r"going on after step (\d+)", (self.folder / "said").read_text())
        return int(found[1]) if found else 0

    def forget(self) -> None:
        """As if nothing had been trained."""
        for name in (".runs", ".dvc/cache", ".dvc/tmp", "dvc.lock", "adapter"):
            path = self.folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(".runs/*/step*"))

    def last_step(self) -> int:
        """Of the checkpoints there are; 0 where there is none."""
        return max((int(path.name[4:13]) for path in self.checkpoints()), default=0)

    def halves(self) -> set[tuple[int, int]]:
        """Each checkpoint that is half written, so that it can be told from one that another process left."""
        found = set()
        for path in self.folder.glob(".runs/*/partial"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.stat().st_ino, path.stat().st_mtime_ns))
        return found


def stage_of(dvc: int) -> int | None:
    """The process of `python -m stages.train` below DVC's."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == dvc and b"stages.train" in (path.parent / "cmdline").read_bytes():
                return int(path.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def kill(target: str, dvc: subprocess.Popen, stage: int) -> bool:
    """Whether it was alive to be killed."""
    if dvc.poll() is not None:
        return False
    try:
        if target == "stage":
            os.kill(stage, signal.SIGKILL)
        elif target == "dvc":
            dvc.kill()
        else:
            os.killpg(dvc.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def disturbed(repository: Repository, target: str, inside: bool, chance: random.Random, counts: Counter) -> bool:
    """Start DVC, kill `target` once; whether DVC was still at work then."""
    dvc = repository.start()
    stage = None
    while stage is None and dvc.poll() is None:
        stage = stage_of(dvc.pid)
        time.sleep(0.02)
    if stage is None:
        return False
    known, left = repository.checkpoints(), repository.halves()
    waits_for_training = inside or chance.random() < 0.8  # the others die while they start
    while waits_for_training and repository.checkpoints() == known and dvc.poll() is None:
        time.sleep(0.02)
    if inside:
        time.sleep(chance.uniform(0, 3 * INTERVAL_SECONDS))
        while not repository.halves() - left and dvc.poll() is None:
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0, 1.5 if waits_for_training else 6))
    killed = kill(target, dvc, stage)
    now = time.time()
    deadline = time.monotonic() + 10
    while dvc.poll() is None or alive(stage):
        if time.monotonic() > deadline:
            counts["left_running"] += 1
            print(f"{stage} lives on after a kill of {target}", file=sys.stderr, flush=True)
            break
        time.sleep(0.01)
    if killed:
        counts["kills"] += 1
        counts[f"killed_{target}"] += 1
        counts["inside_a_checkpoint"] += bool(repository.halves() - left)
        ages = [now - path.stat().st_mtime for path in repository.checkpoints() if path not in known]
        counts["while_training"] += bool(ages)
        counts["lost_seconds_at_most"] = max(counts["lost_seconds_at_most"], round(min(ages, default=0), 2))
    return killed


def campaign(
    repository: Repository, formats: list[str], minutes: float, kills: int, chance: random.Random, counts: Counter
) -> Iterator[str]:
    """Each kind so often, in turns; a training is killed up to KILLS_A_TRAINING times, then ends: its format."""
    deadline = time.monotonic() + 60 * minutes
    clean = {}
    for form in formats:
        repository.take(form)
        clean[form], _ = repository.finish()
        repository.forget()
    turns, targets = itertools.cycle(formats), itertools.cycle(TARGETS)
    while any(counts[f"killed_{target}"] < kills for target in TARGETS) and time.monotonic() < deadline:
        form = next(turns)
        repository.take(form)
        for target in itertools.islice(targets, KILLS_A_TRAINING):
            done = counts[f"killed_{target}"]
            if done < kills and not disturbed(repository, target, done % 3 == 0, chance, counts):
                break
        last, ended = repository.last_step(), (repository.folder / "dvc.lock").exists()
        digest, after = repository.finish()
        repository.forget()
        counts["trainings"] += 1
        counts["identical"] += digest == clean[form]
        counts["not_from_the_last_checkpoint"] += after != last and not ended
        yield form


def campaigns(folder: Path, minutes: str = "inf", beside: str = "1", *formats: str) -> None:
    """So many at the same time; what all have counted."""
    formats, number = list(formats) or list(FORMATS), int(beside)
    repositories = [Repository(folder / f"repository{n}") for n in range(number)]
    counts, writing = [Counter() for _ in repositories], threading.Lock()

    def work(n: int) -> None:
        given = formats, float(minutes), math.ceil(KILLS / number), random.Random(n), counts[n]
        for form in campaign(repositories[n], *given):
            with writing:
                print(n, form, dict(counts[n]), file=sys.stderr, flush=True)
                found = {
                    **dict.fromkeys(COUNTED, 0),
                    **sum(map(Counter, counts), Counter()),
                    "lost_seconds_at_most": max(one["lost_seconds_at_most"] for one in counts),
                    "kills_interval_seconds": INTERVAL_SECONDS,
                    "kills_formats": formats,
                    "kills_settings": SETTINGS,
                }
                keep({"gpu_kills": {"device": torch.cuda.get_device_name(), **found}} if GPU else found)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(work, range(number)))


def stale(folder: Path) -> dict[str, int]:
    """Edit what decides the result, after a kill: how often training went on nevertheless, or gave other bytes."""
    wrong = 0
    with started(folder / "python") as python:
        model = write_tiny_model(folder / "model")
        for name, edit in EDITS.items():
            killed, clean = (Place(folder / f"{name} {kind}", python, model) for kind in ("killed", "clean"))
            killed.killed("step:6")
            assert killed.checkpoints(), "nothing to be stale"
            edit(killed)
            edit(clean)
            said = killed.train()
            clean.train()
            wrong += "going on" in said or killed.outputs() != clean.outputs()
            print(name, "stale" if "going on" in said else "anew", file=sys.stderr, flush=True)
    return {"edits": len(EDITS), "stale_resumes": wrong}


def main(arguments: list[str]) -> None:
    what, folder = arguments[0], Path(arguments[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if what == "edits":
        keep(stale(folder))
    else:
        campaigns(folder, *arguments[2:])


def keep(found: dict) -> None:
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
