"""dvc.yaml held to the truth: what it says of each stage against the stage's code, and against what DVC then runs."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ruamel.yaml

from stages.params import load
from stages.prepare import side
from stages.rows import Record
from stages.tasks import text_to_sql
from tests import forkserver

TOP = Path(__file__).parent.parent
TASKS = ("text_to_sql", "quotes", "instructions", "chat")
SOURCES = ("wheel", "path", "hub", "modelscope")
STAGES = {
    "download@model",
    "download@data",
    "prepare",
    "encode",
    "validation",
    "train",
    "merge",
    "evaluate@base",
    "evaluate@few_shot",
    "evaluate@tuned",
    "report",
}


def yaml(text: str):
    return ruamel.yaml.YAML(typ="safe", pure=True).load(text)


def imports(module: Path) -> set[Path]:
    """The files of this repository that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            path = TOP / (name.replace(".", "/") + ".py")
            if name.startswith("stages.") and path.exists():
                found.add(path)
    return found


def closure(*modules: Path) -> set[str]:
    """Files, relative to the repository, that running `modules` can import; they among them."""
    todo, seen = list(modules), set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += imports(module)
    return {str(path.relative_to(TOP)) for path in seen}


@pytest.fixture(scope="module")
def resolved() -> dict[str, dict]:
    """Each stage of dvc.yaml as DVC sees it, foreach and variables filled in."""
    from dvc.repo import Repo

    with Repo(str(TOP)) as repo:
        entries = {}
        for stage in repo.index.stages:
            entries[stage.name] = {
                "cmd": stage.cmd,
                "deps": [
                    os.path.relpath(dep.fs_path, TOP)
                    for dep in stage.deps
                    if dep.protocol == "local" and not hasattr(dep, "params")
                ],
                "params": [name for dep in stage.deps if hasattr(dep, "params") for name in dep.params],
                "outs": [os.path.relpath(out.fs_path, TOP) for out in stage.outs],
            }
        return entries


def module_of(stage: dict) -> Path:
    return TOP / (re.match(r"python -m ([\w.]+)", stage["cmd"])[1].replace(".", "/") + ".py")


def expanded(deps: list[str]) -> set[str]:
    """Python files among deps, those of listed folders one by one."""
    files = set()
    for dep in deps:
        path = TOP / dep
        files |= {str(p.relative_to(TOP)) for p in path.rglob("*.py")} if path.is_dir() else {dep}
    return {file for file in files if file.startswith("stages/") and file.endswith(".py") and "__init__" not in file}


def test_the_stages_are_those_of_the_design(resolved):
    assert set(resolved) == STAGES


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_module_that_a_stage_imports_is_among_its_deps_and_no_other(resolved, name):
    stage = resolved[name]
    module = module_of(stage)
    reached = {module, *(TOP / file for file in expanded(stage["cmd"].split()))}
    tasks = [TOP / f"stages/tasks/{task}.py" for task in TASKS]
    if re.search(r"stages[./]tasks[./]\{params\.task\.name\}", module.read_text()):
        reached.update(tasks)
    sources = [TOP / f"stages/sources/{source}.py" for source in SOURCES]
    if 'import_module(f"stages.sources.' in module.read_text():
        reached.update(sources)
    # the default task and the default source are the first
    others = {str(path.relative_to(TOP)) for path in [*tasks[1:], *sources[1:]]}
    assert expanded(stage["deps"]) == closure(*reached) - others


@pytest.mark.parametrize("task", TASKS)
def test_no_other_task_imports_a_module_that_the_deps_leave_out(resolved, task):
    for name in ("prepare", "evaluate@tuned"):
        allowed = expanded(resolved[name]["deps"]) | {f"stages/tasks/{task}.py"}
        assert closure(TOP / f"stages/tasks/{task}.py") <= allowed


def test_packages_do_nothing_when_imported():
    for path in TOP.glob("stages/**/__init__.py"):
        assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body), path


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_reads_the_params_that_dvc_tracks_for_it_and_machine_at_most(resolved, name):
    stage = resolved[name]
    read = set()
    for node in ast.walk(ast.parse(module_of(stage).read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("params", "load()"):
            read.add(node.attr)
    if name.startswith("download@"):
        read = {name.split("@")[1]}
    if name == "report":
        read = set(stage["params"])  # it shows all of them
        assert read == set(yaml((TOP / "params.yaml").read_text())) - {"machine"}
    assert read - {"machine"} == {param.split(".")[0] for param in stage["params"]}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_the_paths_of_a_command_are_deps_or_outputs(resolved, name):
    stage = resolved[name]
    words = stage["cmd"].split()[3:]
    paths = {word for word in words if "/" in word}
    named = set(stage["deps"]) | set(stage["outs"])
    assert all(path in named or any(Path(path) in Path(n).parents for n in named) for path in paths), paths - named
    assert set(stage["outs"]) <= paths, "an output that the command does not name"
    inputs = {dep for dep in stage["deps"] if not dep.startswith("stages") and not dep.endswith("/own")}
    assert all(any(dep == p or Path(p) in Path(dep).parents for p in paths) for dep in inputs), inputs - paths


def test_no_parameter_reaches_a_command_line():
    for stage in yaml((TOP / "dvc.yaml").read_text())["stages"].values():
        command = stage.get("do", stage)["cmd"]
        assert set(re.findall(r"\$\{([^}]*)\}", command)) <= {"key", "item.to", "item.model", "item.tokens"}


# --- what DVC then runs: the whole pipeline on a tiny model and its own rows ---------------------------------------

SCHEMA = "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, country TEXT)"
ROWS = [
    {"question": f"Which singers are older than {age} and from {country}?", "context": SCHEMA,
     "sql": f"SELECT name FROM singer WHERE age > {age} AND country = '{country}'"}
    for age in range(20, 32)
    for country in ("France", "Spain")
]  # fmt: skip
OVERRIDES = """
model: {fetch: {source: path, path: models/own/tiny, sha256: null}, chat_template: null}
data: {fetch: {source: path, path: data/own/rows.jsonl, sha256: null}, license: written for this test}
task: {name: text_to_sql, rows: rows.jsonl, schemas: null, columns: {question: question, query: sql, schema: context},
  schema_as: ddl, instances: 2, seed: 0, unusable: refuse}
prepare: {group_by: query, validation: 0.2, test: 0.25, rows: null, seed: 1}
lora: {r: 4, alpha: 8, dropout: 0.0, target_modules: all-linear, method: lora, init: default, quantize: null,
  trainable_tokens: [], modules_to_save: []}
merge: {onto: trained, max_shard_size: 2GB, rows: 4, max_kl: 0.5}
evaluate: {rows: null, shots: 2, max_new_tokens: 4}
"""


def running(said: str) -> set[str]:
    """The stages that DVC said it ran; one restored from the cache is not among them."""
    return set(re.findall(r"Running stage '([^']+)'", said))


class Clone:
    """A copy of the repository in a folder of its own, with DVC and a `python` that starts at once."""

    def __init__(self, folder: Path, python: Path):
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "PYTEST_"))},
            "PATH": f"{python}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_DEACTIVATE_ASYNC_LOAD": "1",  # torch cannot start threads twice across the fork
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
        }  # fmt: skip

    def run(self, *command: str, status: int = 0) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dvc(self, *arguments: str, status: int = 0) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, status=status)

    def repro(self, *arguments: str) -> set[str]:
        return running(self.dvc("repro", *arguments))

    def set(self, **values) -> None:
        """Change parameters: section__key=value."""
        path = self.folder / "params.yaml"
        roundtrip = ruamel.yaml.YAML()
        params = roundtrip.load(path.read_text())
        for name, value in values.items():
            section, key = name.split("__")
            params[section][key] = value
        with path.open("w") as file:
            roundtrip.dump(params, file)

    def read(self, path: str):
        return json.loads((self.folder / path).read_text())


@contextlib.contextmanager
def cloned(folder: Path, tiny_model: Path) -> Iterator[Clone]:
    """A clone in `folder`/repository whose params.yaml names the tiny model and ROWS; nothing has run yet."""
    folder /= "repository"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (TOP / name).is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TOP / name, folder / name)
    params = yaml((TOP / "params.yaml").read_text()) | yaml(OVERRIDES)
    params["train"].update(epochs=1.0, batch_size=4, validations=2, order="shared")
    params["machine"].update(
        device="cpu",
        devices=1,
        rendezvous=None,
        shard_base="auto",
        dtype="float32",
        tokens_per_pack=512,
        rows_per_batch=8,
        engine="batches",
        deterministic=False,
        report_to=[],
    )
    with (folder / "params.yaml").open("w") as file:
        ruamel.yaml.YAML().dump(params, file)
    shutil.copytree(tiny_model, folder / "models/own/tiny")
    (folder / "data/own/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    socket, python = folder.parent / "s", folder.parent / "bin"
    server = subprocess.Popen(
        [sys.executable, forkserver.__file__, "serve", str(socket)],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    forkserver.install(python, socket)
    made = Clone(folder, python)
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "start")
    while not socket.exists():
        assert server.poll() is None
    yield made
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model) -> Clone:
    with cloned(tmp_path_factory.mktemp("clone"), tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def reproduced(clone) -> Clone:
    assert clone.repro() == STAGES
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "first run")
    return clone


@pytest.fixture
def pipeline(reproduced):
    """The clone after its first run; what a test changes is taken back after it."""
    yield reproduced
    reproduced.run("git", "checkout", "-q", ".")
    reproduced.dvc("checkout", "--force", "-q")


def test_the_metrics_have_their_names(pipeline):
    assert {"train_rows", "validation_rows", "test_rows", "duplicates", "leaks"} <= set(
        pipeline.read("metrics/data.json")
    )
    scores = {"rows", "execution_accuracy", "valid_sql", "exact_match", "stop_rate", "loss"}
    assert scores <= set(pipeline.read("metrics/base.json"))
    assert scores <= set(pipeline.read("metrics/tuned.json"))
    assert {"greedy_agreement", "max_kl"} <= set(pipeline.read("metrics/merge.json"))
    assert {"steps", "train_loss", "validation_loss", "trainable_parameters"} <= set(
        pipeline.read("metrics/train.json")
    )
    assert {"train", "merge", "evaluate_base", "evaluate_tuned"} <= set(pipeline.read("metrics/timing.json"))


def test_plots_overlay_before_and_after_of_two_revisions(pipeline):
    shown = pipeline.run(
        sys.executable, "-m", "dvc", "plots", "diff", "HEAD", "--targets", "metrics/facets.csv", "--json"
    )
    (plot,) = json.loads(shown[shown.index("{") :])["data"]["metrics/facets.csv"]
    points = plot["content"]["data"]["values"]
    assert {(point["model"], point["rev"]) for point in points if point["class"] == "all"} == {
        (model, revision) for model in ("base", "few_shot", "tuned") for revision in ("HEAD", "workspace")
    }
    encoding = plot["content"]["encoding"]
    assert [encoding[name]["field"] for name in ("x", "y", "row", "color")] == ["score", "model", "class", "rev"]


def test_how_the_run_went_is_told_and_not_in_git(pipeline):
    page = (pipeline.folder / "metrics/run.html").read_text()
    assert "evaluate tuned" in page and "Tokens a second" in page
    assert "run.html" not in pipeline.run("git", "status", "--porcelain", "-uall")


def test_outputs_are_links_into_the_cache_and_not_copies(pipeline):
    cached = {file.stat().st_ino for file in (pipeline.folder / ".dvc/cache").rglob("*") if file.is_file()}
    for name in ("models/base/model.safetensors", "models/merged/model.safetensors", "data/tokens/train.parquet"):
        assert (pipeline.folder / name).stat().st_ino in cached, name  # of a symbolic link, what it points to


def test_nothing_runs_when_nothing_has_changed(pipeline):
    assert pipeline.repro() == set()


def test_a_machine_change_reruns_nothing(pipeline):
    pipeline.set(machine__tokens_per_pack=64, machine__rows_per_batch=2)
    assert pipeline.repro() == set()


def test_another_tasks_file_reruns_nothing(pipeline):
    with (pipeline.folder / "stages/tasks/quotes.py").open("a") as file:
        file.write("\n# edited\n")
    assert pipeline.repro() == set()


def test_evaluate_params_rerun_both_evaluations_and_the_report(pipeline):
    pipeline.set(evaluate__max_new_tokens=5)
    assert pipeline.repro() == {"validation", "evaluate@base", "evaluate@few_shot", "evaluate@tuned", "report"}


def test_an_experiment_with_another_lora_r_reruns_training_onward_and_going_back_trains_nothing(pipeline):
    ran = pipeline.dvc("exp", "run", "-S", "lora.r=2", "-n", "smaller")
    assert running(ran) == {"train", "merge", "evaluate@tuned", "report"}
    shown = pipeline.dvc("exp", "show", "--csv")
    assert "smaller" in shown and "lora.r" in shown and "execution_accuracy" in shown
    assert "trainable_parameters" in pipeline.dvc("metrics", "diff")
    compared = pipeline.run(sys.executable, "-m", "tools.compare", "HEAD", "smaller")
    assert re.search(r"execution_accuracy .*(noise|better|worse)\n", compared) and " rows in " in compared
    assert running(pipeline.dvc("exp", "run", "-S", "lora.r=4")) == set()


def test_a_change_of_the_scoring_trains_anew_where_training_is_measured_by_it_and_else_does_not(pipeline):
    def edited() -> set[str]:
        with (pipeline.folder / "stages/scores.py").open("a") as file:
            file.write("# another way to score\n")
        return pipeline.repro() & {"validation", "train", "evaluate@tuned"}

    assert edited() == {"validation", "evaluate@tuned"}
    pipeline.set(train__metric="score", train__keep="best")
    assert {"validation", "train"} <= pipeline.repro()
    assert "validation_score" in pipeline.read("metrics/train.json")
    assert edited() == {"validation", "train", "evaluate@tuned"}


def edit_an_answer(pipeline: Clone, name: str) -> None:
    """Give the first row of that side another answer, in the data set's own file."""
    params = load(pipeline.folder / "params.yaml")
    split = (pipeline.folder / f"data/conversations/{name}.jsonl").read_text().splitlines()
    number = int(json.loads(split[0])["where"].rsplit(" ", 1)[1]) - 1
    rows = [dict(row) for row in ROWS]
    for age in range(100, 200):  # another answer is another group: one that stays on the side
        rows[number]["sql"] = f"SELECT name FROM singer WHERE age > {age}"
        (changed,) = text_to_sql.conversations({"rows": [Record("rows.jsonl line 1", rows[number])]}, params.task)
        if side(changed.groups["query"], params.prepare) == name:
            break
    (pipeline.folder / "data/own/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_test_rows_answer_reruns_what_reads_the_test_rows_and_trains_nothing(pipeline):
    edit_an_answer(pipeline, "test")
    assert pipeline.repro() == STAGES - {"download@model", "validation", "train"}


def test_a_training_rows_answer_leaves_the_base_models_evaluation_alone_where_no_score_reads_it(pipeline):
    edit_an_answer(pipeline, "train")
    ran = pipeline.repro()
    assert {"train", "merge", "evaluate@tuned", "report"} <= ran
    assert "evaluate@base" not in ran


def test_a_forced_rerun_leaves_the_lock_as_it_was(pipeline, record_property):
    before = (pipeline.folder / "dvc.lock").read_text()
    assert pipeline.repro("-f") == STAGES
    after = (pipeline.folder / "dvc.lock").read_text()
    record_property("repro_twice", 1)
    record_property("repro_twice_identical", int(after == before))
    assert after == before


def test_the_benchs_run_says_which_stages_came_out_the_same_and_which_did_not(pipeline):
    out = pipeline.folder / "found.json"
    pipeline.run(sys.executable, "-m", "bench.default_run", str(out))
    found = pipeline.read("found.json")
    assert found["different"] == [] and set(found["identical"]) == STAGES - {"download@model", "download@data"}
    assert found["tuned"] == pipeline.read("metrics/tuned.json") and found["repro_seconds"] > 0
    out.unlink()


def test_large_outputs_do_not_exist_twice(pipeline):
    for path in ("models/base/model.safetensors", "models/merged/model.safetensors"):
        file = pipeline.folder / path
        twins = [
            p
            for p in (pipeline.folder / ".dvc/cache").rglob("*")
            if p.is_file() and p.stat().st_size == file.stat().st_size
        ]
        assert any(file.samefile(twin) for twin in twins)


def test_a_bad_row_stops_the_pipeline_in_one_line_before_anything_is_trained(pipeline):
    with (pipeline.folder / "data/own/rows.jsonl").open("a") as file:
        file.write('{"question": "How many?", "context": "CREATE TABLE t (a INT)"}\n')
    said = pipeline.dvc("repro", status=255)
    assert f"error: rows.jsonl line {len(ROWS) + 1}: sql is missing" in said
    assert "Traceback" not in said and "Running stage 'train'" not in said


# --- what goes wrong under DVC ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(reproduced, tmp_path):
    """The reproduced clone on a file system of its own, of 128 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs rights that this user lacks")
    shutil.copytree(reproduced.folder, folder / "repository", symlinks=True)
    copy = Clone(folder / "repository", Path())
    copy.environment = reproduced.environment
    yield copy
    subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_every_stage_fails_dvc_lock_stays_and_with_room_again_repro_goes_on(small_disk):
    lock, before = (small_disk.folder / "dvc.lock").read_text(), cached(small_disk)
    filler = small_disk.folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    for stage in sorted(STAGES):
        os.truncate(filler, filler.stat().st_size - (16 << 10))  # DVC needs a little before it runs the stage
        said = small_disk.dvc("repro", "--force", "--single-item", stage, status=255)
        assert "error: the disk is full" in said or "No space left on device" in said, said
        assert (small_disk.folder / "dvc.lock").read_text() == lock and cached(small_disk) == before
    filler.unlink()
    small_disk.repro()
    assert (small_disk.folder / "dvc.lock").read_text() == lock
    assert small_disk.repro() == set()


def test_a_dvc_lock_cut_short_is_mended_by_one_command(pipeline):
    lock = pipeline.folder / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: whole.index("    deps:") + 7])
    pipeline.dvc("repro", status=255)
    pipeline.run("git", "checkout", "dvc.lock")
    assert pipeline.repro() == set()
    assert lock.read_text() == whole


def test_a_stage_that_is_killed_leaves_nothing_in_the_cache_and_repro_goes_on(pipeline):
    lock = (pipeline.folder / "dvc.lock").read_text()
    before = set(pipeline.folder.glob(".runs/*/step*"))
    pipeline.set(train__epochs=100.0, machine__checkpoint_minutes=1e-9)
    repro = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "train"],
        cwd=pipeline.folder,
        env=pipeline.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not set(pipeline.folder.glob(".runs/*/step*")) - before:
        assert repro.poll() is None
        time.sleep(0.02)
    (process,) = {int(path.read_text()) for path in pipeline.folder.glob(".runs/*.lock") if path.read_text()}
    os.kill(process, signal.SIGTERM)
    assert repro.wait(60) == 255
    assert (pipeline.folder / "dvc.lock").read_text() == lock
    assert not (pipeline.folder / "models/adapter").exists()
    said = pipeline.dvc("repro", "train")
    assert re.search(r"going on after step \d+ of", said) and running(said) == {"train"}


# the outputs of a stage that fails are gone, and those after it could not begin
LAST_FIRST = [
    *("report", "evaluate@tuned", "evaluate@few_shot", "evaluate@base", "merge", "train", "validation"),
    *("encode", "prepare", "download@data", "download@model"),
]


def cached(pipeline: Clone) -> set[Path]:
    return {path for path in (pipeline.folder / ".dvc/cache").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ("SIGTERM", "error: stopped by SIGTERM; go on with: dvc repro"),
        ("SIGINT", "error: stopped by SIGINT; go on with: dvc repro"),
        ("SIGKILL", "exited with"),
        ("memory", "error: memory ran out"),
    ],
)
def test_what_befalls_any_stage_leaves_nothing_in_the_cache_and_one_command_goes_on(
    pipeline, trouble, line, monkeypatch
):
    lock, before = (pipeline.folder / "dvc.lock").read_text(), cached(pipeline)
    monkeypatch.setitem(pipeline.environment, "TROUBLE", trouble)
    for stage in LAST_FIRST:
        said = pipeline.dvc("repro", "--force", "--single-item", stage, status=255)
        assert line in said and "Traceback" not in said, said
        assert (pipeline.folder / "dvc.lock").read_text() == lock and cached(pipeline) == before
    assert trouble == "SIGKILL" or not list(pipeline.folder.glob("[!.]*/**/.*.partial"))
    monkeypatch.delitem(pipeline.environment, "TROUBLE")
    assert pipeline.repro() == set()  # all comes out of the cache
    assert (pipeline.folder / "dvc.lock").read_text() == lock
    assert "up to date" in pipeline.dvc("status")


def test_a_stage_that_writes_much_asks_for_room_before_it_writes(pipeline, monkeypatch):
    monkeypatch.setitem(pipeline.environment, "TROUBLE", "room")
    for stage in [stage for stage in LAST_FIRST if stage not in ("report", "validation")]:
        said = pipeline.dvc("repro", "--force", "--single-item", stage, status=255)
        assert "are to be written, and its disk has 33.6 MB left; free some room" in said, said


def test_ctrl_c_at_the_terminal_ends_dvc_and_its_stage(pipeline):
    lock = (pipeline.folder / "dvc.lock").read_text()
    before = set(pipeline.folder.glob(".runs/*/step*"))
    pipeline.set(train__epochs=200.0, machine__checkpoint_minutes=1e-9)
    environment = pipeline.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # no stand-in
    repro = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "train"],
        cwd=pipeline.folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    while not set(pipeline.folder.glob(".runs/*/step*")) - before:
        assert repro.poll() is None
        time.sleep(0.02)
    os.killpg(repro.pid, signal.SIGINT)
    said = repro.communicate(timeout=60)[0]
    assert repro.returncode == 255 and "error: stopped by SIGINT; go on with: dvc repro" in said, said
    assert (pipeline.folder / "dvc.lock").read_text() == lock and not (pipeline.folder / "models/adapter").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(repro.pid, 0)
