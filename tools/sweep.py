"""Values of parameters in; an experiment of every combination, and metrics/sweep.html that compares them, out.

    python -m tools.sweep -S lora.r=8,16,32 -S train.learning_rate=1e-4,5e-4
    python -m tools.sweep -S train.seed=0,1,2,3 --jobs 2

On each GPU runs one experiment, on a CPU one at a time; --jobs says how many, never two on one GPU. One that fails is
named and the others go on. Whatever ends it, type the same command again: what is done stays done. `dvc exp show` lists
all.

Each experiment is one `dvc exp run` in a clone of its own, from the last commit, with the one cache. In one repository
they are not sound (dvc 3.67.1): of six `dvc exp run --temp` begun at once three gave up on DVC's lock, all keep what
they are to run in one stash and take what lies there, and a kill can leave HEAD detached and params.yaml changed.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import networkx
import pynvml
from dvc.config import Config
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages import page
from stages.last_run import SCORES, flat
from stages.params import Machine, load
from stages.refusal import LAST_SECONDS, Refusal, run
from stages.sources.path import WATCHED
from tools import gpus, sweep_page
from tools.repository import RUNS, git, uncommitted
from tools.trials import PARAMS, Trial, combinations

PAGE = Path("metrics/sweep.html")
FOLDER = RUNS / "sweep"
# DVC, killed with this process; in a session of its own, so that Ctrl-C reaches this process alone, which ends the rest
DVC = (
    "import sys; from stages.refusal import die_with_parent; die_with_parent(int(sys.argv.pop(1))); "
    "from dvc.cli import main; sys.exit(main())"
)


@dataclass
class Running:
    """A DVC process in a clone, which leads a process group."""

    process: subprocess.Popen
    tree: Path
    log: Path
    began: float

    def end(self) -> None:
        """Leave nothing running: checkpoints and cache are such that a kill does them no harm."""
        deadline = time.monotonic() + LAST_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            while time.monotonic() < deadline:  # a stage of a DVC that was killed alone is still to go
                os.killpg(self.process.pid, 0)
                time.sleep(0.02)
        self.process.wait()
        shutil.rmtree(self.tree, ignore_errors=True)


def log(trial: Trial) -> Path:
    return FOLDER / f"{trial.name}.log"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def places(machine: Machine, jobs: int | None) -> list[str | None]:
    """Where a process may run: the GPUs, as CUDA_VISIBLE_DEVICES names them; on a CPU None, once for each process."""
    if machine.device == "xla":
        if jobs and jobs > 1:
            raise Refusal(f"--jobs {jobs}: machine.device is xla, and one training takes all TPU cores of a machine")
        return [None]
    found = [] if machine.device == "cpu" else gpus_here()
    if machine.device == "cuda" and not found:
        raise Refusal("params.yaml: machine.device is cuda, but there is no GPU here; set it to auto")
    if not found:
        return [None] * (jobs or 1)
    if machine.devices not in ("auto", 1):
        raise Refusal(f"params.yaml: machine.devices is {machine.devices}, but an experiment has one GPU; set it to 1")
    if machine.shard_base is True:
        raise Refusal("params.yaml: machine.shard_base is true, but an experiment has one GPU; set it to auto")
    if jobs and jobs > len(found):
        raise Refusal(f"--jobs {jobs}: there are {len(found)} GPUs here, and two on one would share its memory")
    return found[:jobs]


def gpus_here() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES can name it."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return []
    try:
        return gpus.visible(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def refuse_uncommitted() -> None:
    """Raise Refusal where an experiment, which starts from the last commit, would miss something."""
    for path in (*uncommitted(new=False), *uncommitted("stages")):
        raise Refusal(
            f"{path}: is not as in the last commit, from which experiments start and under which they are kept; "
            "git add and git commit it, or git stash it"
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be the only sweep of this repository: the kernel gives the lock up however this process ends."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{FOLDER.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal("another sweep runs in this repository; wait for its end, or end it") from None
        yield


def ref(head: str, trial: Trial) -> str:
    return f"refs/exps/{head[:2]}/{head[2:]}/{trial.name}"


def found(head: str, trial: Trial) -> str | None:
    """The commit of the trial's experiment; None where it has not been run. Raises Refusal where one of that name is
    another."""
    commit = git("for-each-ref", "--format=%(objectname)", ref(head, trial))
    if not commit:
        return None
    wanted, has = (decisive(git("show", f"{revision}:{PARAMS}")) for revision in (head, commit))
    if has != {**wanted, **trial.values}:
        raise Refusal(
            f"{trial.name}: an experiment of that name has other parameters; dvc exp rename {trial.name} NAME, "
            "then type this again"
        )
    return commit


def decisive(text: str) -> dict[str, Any]:
    values = flat("", YAML(typ="safe", pure=True).load(text))
    return {key: value for key, value in values if not key.startswith("machine.")}


def clone(tree: Path, head: str) -> None:
    """Make a clone of this repository at `head`, with the same cache, checkpoints and own data and models."""
    shutil.rmtree(tree, ignore_errors=True)
    who = []
    for key in ("user.name", "user.email"):
        with contextlib.suppress(Refusal):
            who += ["--config", f"{key}={git('config', key)}"]
    git("clone", "--quiet", "--no-checkout", *who, ".", tree)
    git("-C", tree, "checkout", "--quiet", "--detach", head)
    for listed in git("ls-files", "-z", "--others", "--", *WATCHED).split("\0"):
        if listed:
            path = tree / listed.rstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(listed).resolve())
    # DVC_ROOT is the clone there, and what checkpoints and downloads keep under it has to outlive it
    (tree / RUNS).symlink_to(RUNS.resolve())
    local = Path(".dvc/config.local")
    if local.exists():
        shutil.copy(local, tree / local)  # with its mode: it may hold a password
    with Repo(".") as repo:
        cache = repo.cache.local_cache_dir
    with Config(str(tree / ".dvc")).edit("local") as config:
        config.setdefault("cache", {})["dir"] = cache


def start(arguments: list[str], head: str, log: Path, place: str | None, at_once: int) -> Running:
    """Begin `dvc` with these arguments in a clone, on the GPU that `place` names where it names one."""
    tree = FOLDER / "trees" / sha256(log.name.encode()).hexdigest()[:8]
    clone(tree, head)
    environment = dict(os.environ)
    if place is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place
    elif at_once > 1:  # or each would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DVC, str(os.getpid()), *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(process, tree, log, time.monotonic())


def why(running: Running) -> str:
    """Why a process failed, in one line: what its stage said, else DVC, else the signal that ended it."""
    status = running.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in running.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    for start in ("error: ", "ERROR: "):
        said = [line.removeprefix(start) for line in lines if line.startswith(start)]
        if said:
            return said[-1]
    return f"exit status {status}"


def reads(stage, key: str) -> bool:
    """Whether the stage's parameters have the key among them."""
    read = [one for dep in stage.deps if isinstance(dep, ParamsDependency) for one in dep.params]
    return any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in read)


def shared(swept: list[str]) -> tuple[list[str], list[str]]:
    """The stages that no swept parameter reaches, and the swept parameters that decide what is trained."""
    with Repo(".") as repo:
        graph = repo.index.graph  # an edge leads to what a stage depends on
        reached, training = set(), set()
        for stage in graph:
            if any(reads(stage, key) for key in swept):
                reached |= {stage, *networkx.ancestors(graph, stage)}
            if stage.addressing == "train":
                training = {stage, *networkx.descendants(graph, stage)}
        apart = sorted(stage.addressing for stage in graph if stage not in reached)
        return apart, [key for key in swept if any(reads(stage, key) for stage in training)]


def run_shared(stages: list[str], head: str) -> None:
    """Run the stages once and before the experiments: their results then come out of the cache for all."""
    if not stages:
        return
    say(f"first, once for all, what no swept parameter reaches: {', '.join(stages)}")
    log = FOLDER / "shared.log"
    running = start(["repro", *stages], head, log, None, 1)
    try:
        if running.process.wait():
            raise Refusal(f"the stages that all experiments share failed: {why(running)}; all it said is in {log}")
    finally:
        running.end()


def run_all(trials: list[Trial], total: int, head: str, where: list[str | None], training: list[str]) -> dict[str, str]:
    """Run each trial on a place of its own; return why each that failed did, by its name. Of trials that train the very
    same adapter, whose values of `training` are the same, one runs at a time: the others then find it in the cache."""
    headline = sweep_page.headline(load(PARAMS))
    waiting, free, failed = list(trials), list(where), {}
    running: dict[str, tuple[Trial, str | None, Running]] = {}
    done = total - len(trials)
    try:
        while waiting or running:
            busy = [[trial.values[key] for key in training] for trial, _, _ in running.values()]
            while free and (trial := next((t for t in waiting if [t.values[k] for k in training] not in busy), None)):
                place = free.pop(0)
                waiting.remove(trial)
                busy.append([trial.values[key] for key in training])
                arguments = ["exp", "run", "--name", trial.name, *(f"-S{override}" for override in trial.overrides)]
                try:
                    running[trial.name] = trial, place, start(arguments, head, log(trial), place, len(where))
                except Refusal as refusal:  # its clone cannot be made
                    failed[trial.name] = str(refusal)
                    say(f"{trial.name}: failed: {refusal}")
                    free.append(place)
                    continue
                say(f"{trial.name}: begun{f' on GPU {place}' if place else ''}; what it says is in {log(trial)}")
            ended = [one for one in running.values() if one[2].process.poll() is not None]
            for trial, place, dvc in ended:
                seconds = time.monotonic() - dvc.began
                if dvc.process.returncode == 0:
                    one = ref(head, trial)
                    git("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", dvc.tree, f"+{one}:{one}")
                    done += 1
                    scores = json.loads(git("show", f"{one}:{SCORES}"))
                    score = f"{headline.replace('_', ' ')} {page.score(scores[headline], headline)}"
                    say(f"{trial.name}: {score} after {seconds:,.0f} s; {done} of {total} done")
                else:
                    failed[trial.name] = why(dvc)
                    say(f"{trial.name}: failed after {seconds:,.0f} s: {failed[trial.name]}")
                dvc.end()
                del running[trial.name]
                free.append(place)
            if not ended:
                time.sleep(0.2)
    finally:
        for _, _, dvc in running.values():
            dvc.end()
    return failed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description="Run every combination of settings.")
    parser.add_argument("-S", "--set-param", action="append", required=True, metavar="KEY=VALUE,VALUE")
    parser.add_argument("-j", "--jobs", type=int, metavar="N", help="experiments at once; never two on one GPU")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        raise Refusal(f"--jobs {options.jobs}: at least 1")
    params = load(PARAMS)
    trials = combinations(options.set_param)
    where = places(params.machine, options.jobs)
    refuse_uncommitted()
    head = git("rev-parse", "HEAD")
    with alone():
        shutil.rmtree(FOLDER / "trees", ignore_errors=True)  # of a sweep that was killed
        waiting = [trial for trial in trials if found(head, trial) is None]
        on = f", on {len(where)} GPU{'s' * (len(where) > 1)}" if where[0] else ""
        say(f"{len(trials)} experiments{on}; {len(trials) - len(waiting)} are done already")
        failed = {}
        if waiting:
            stages, training = shared(list(trials[0].values))
            run_shared(stages, head)
            failed = run_all(waiting, len(trials), head, where, training)
        commits = {trial.name: found(head, trial) for trial in trials}
        finished = {trial.name: (trial.values, commits[trial.name]) for trial in trials if commits[trial.name]}
        if finished:
            sweep_page.write(PAGE, params, head, finished, failed)
            say(f"{PAGE} compares them; dvc exp show lists them")
    if failed:
        say(f"{len(failed)} of {len(trials)} failed; type the same command again to run them again:")
        for one, line in failed.items():
            say(f"  {one}: {line}")
        sys.exit(1)


if __name__ == "__main__":
    run(main)
