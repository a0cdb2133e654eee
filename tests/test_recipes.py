"""Every recipe, laid over params.yaml, is one that the stages accept, and one that they run from download to report."""

import importlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import ruamel.yaml
from huggingface_hub import constants

from bench import recipes as bench
from stages.params import load
from stages.refusal import Refusal
from tests import tiny_families
from tests.conftest import TEMPLATE
from tests.hubs import Hub, Repository
from tools import recipe

TOP = Path(__file__).parent.parent
RECIPES = sorted(TOP.glob("recipes/*.yaml"))
OWN = (TOP / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with params.yaml and the recipes."""
    shutil.copy(TOP / "params.yaml", tmp_path)
    shutil.copytree(TOP / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    commit()
    return tmp_path


def commit():
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"], check=True)


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_laid_over_the_parameters_is_sound_and_holds_its_values(name, clone):
    recipe.main([name])
    load()
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    overlay, wanted = yaml.load((clone / f"recipes/{name}.yaml").read_text()), yaml.load(OWN)
    under = overlay.pop("over", None)
    for values in (yaml.load((clone / f"recipes/{under}.yaml").read_text()) if under else {}, overlay):
        wanted |= {section: keys if section == "task" else wanted[section] | keys for section, keys in values.items()}
    assert yaml.load(Path("params.yaml").read_text()) == wanted


def test_comments_stay_and_only_what_the_recipe_holds_changes():
    assert recipe.laid_over(OWN, "lora:\n  r: 16\n") == OWN
    changed = recipe.laid_over(OWN, "lora:\n  r: 8\nmerge:\n  max_kl: 0.5\n")
    differing = [
        (before, after) for before, after in zip(OWN.splitlines(), changed.splitlines(), strict=True) if before != after
    ]
    assert [after.split("#")[0].strip() for _, after in differing] == ["r: 8", "max_kl: 0.5"]
    assert all(before.partition("#")[2] == after.partition("#")[2] for before, after in differing)


def test_git_undoes_a_recipe_and_changes_that_it_has_not_are_not_lost(clone):
    recipe.main(["quotes"])
    with pytest.raises(Refusal, match="holds changes that git does not"):
        recipe.main(["gretel"])
    subprocess.run(["git", "checkout", "-q", "params.yaml"], check=True)
    assert Path("params.yaml").read_text(encoding="utf-8") == OWN


def test_a_recipe_that_does_not_fit_leaves_the_parameters_as_they_were(clone):
    (clone / "recipes/odd.yaml").write_text("# Odd.\n\nlora:\n  rank: 8\n")
    commit()
    with pytest.raises(Refusal, match="rank is not a parameter"):
        recipe.main(["odd"])
    assert Path("params.yaml").read_text(encoding="utf-8") == OWN


def test_without_a_name_the_recipes_are_listed(clone, capsys):
    recipe.main([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in RECIPES]
    assert any("Quotations completed, with their author, from FreeBSD's fortune file" in line for line in listed)


def test_a_name_that_is_none_is_refused(clone, tmp_path):
    with pytest.raises(Refusal, match="did you mean quotes"):
        recipe.main(["qutes"])
    shutil.rmtree(tmp_path / ".git")
    with pytest.raises(Refusal, match=r"git status fails: .*run in the top folder of a clone"):
        recipe.main(["quotes"])


# each of them run, on a tiny model of its architecture and rows with its data set's columns

ARCHITECTURES = {
    "alpaca-gemma-3n": "gemma3n",
    "chat-llama-2-7b": "llama2",
    "gretel": "gemma3_text",
    "quotes": "gemma3_text",
    "quotes-gemma-2-27b": "gemma2",
    "quotes-gemma-2b": "gemma",
    "quotes-gemma-2b-local": "gemma",
    "quotes-gemma-2b-tpu": "gemma",
    "text-to-sql-gemma-3-1b": "gemma3_text",
    "text-to-sql-gemma-3-4b": "gemma3",
    "text-to-sql-gemma-3-12b": "gemma3",
    "text-to-sql-gemma-3-27b": "gemma3",
}
SIZE = {
    "prepare": {"validation": 0.2, "test": 0.3},
    "train": {"epochs": 1.0, "validations": 1},
    "merge": {"rows": 4},
    "evaluate": {"shots": 1, "max_new_tokens": 4},
    "machine": {
        "device": "cpu",
        "devices": 1,
        "dtype": "float32",
        "tokens_per_pack": 1000,
        "rows_per_batch": 8,
        "report_to": [],
    },
}
COUNT = 24


def row(task: str, number: int) -> dict:
    """A row with all columns of the data set that the recipes of a task name."""
    if task == "quotes":
        quote = f"“Whoever asks {number} times is answered at least {number} times.”"
        return {"quote": quote, "author": f"Author {number}", "tags": ["asking"]}
    if task == "chat":
        asked, answered = f"What is asked, {number} times?", f"It is answered, {number} times."
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    if task == "instructions":
        instruction, told = f"Count to {number}.", "Aloud." if number % 2 else ""
        return {"instruction": instruction, "input": told, "output": f"One to {number}.", "text": "…"}
    described = ("domain", "sql_complexity", "sql_task_type")
    return {
        "id": number,
        **{name: "…" for one in described for name in (one, f"{one}_description")},
        "sql_prompt": f"How many ships are longer than {number}?",
        "sql_context": f"CREATE TABLE ship (name TEXT, length INT); INSERT INTO ship VALUES ('a', {number + 1});",
        "sql": f"SELECT COUNT(*) FROM ship WHERE length > {number}" if number else "UPDATE ship SET length = 1",
        "sql_explanation": "…",
    }


def file_of(name: str, task: str) -> bytes:
    """The file of rows that a recipe calls `name`, in the format that its name says."""
    rows = [row(task, number) for number in range(COUNT)]
    if name.endswith(".parquet"):
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
        return out.getvalue()
    if name.endswith(".jsonl"):
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return "%\n".join(f"{row['quote']}\n\t\t-- {row['author']}\n" for row in rows).encode()


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, server.url)
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


def offer(spec: dict, files: dict[str, bytes], server: Hub) -> None:
    """Put the files where `spec`, a recipe's fetch, looks for them; in place of a wheel, into a folder."""
    if spec["source"] in ("hub", "modelscope"):
        there = server.repositories[spec["repository"]] = Repository()
        there.commits[spec["revision"]] = there.commits[there.push(files)]
        return
    if spec["source"] == "wheel":  # tests/test_sources.py has those
        own = "models/own/toy" if "config.json" in files else f"data/own/{next(iter(files))}"
        spec.clear()
        spec.update(source="path", path=own, sha256=None)
    folder = Path(spec["path"]) if "config.json" in files else Path(spec["path"]).parent
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write(values: dict) -> None:
    with Path("params.yaml").open("w") as file:
        ruamel.yaml.YAML(typ="safe", pure=True).dump(values, file)


def test_each_recipe_is_run():
    assert set(ARCHITECTURES) == {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_recipe_runs_from_download_to_report(name, server, tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    shutil.copy(TOP / "dvc.yaml", tmp_path)
    values = ruamel.yaml.YAML(typ="safe", pure=True).load(recipe.applied(OWN, TOP / f"recipes/{name}.yaml"))
    for section, changed in SIZE.items():
        values[section].update(changed)
    tiny_families.write(ARCHITECTURES[name], tmp_path / "published")
    if values["model"]["chat_template"] is None:
        shutil.copy(TEMPLATE, tmp_path / "published/chat_template.jinja")
    published = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    offer(values["model"]["fetch"], published, server)
    task, rows = values["task"]["name"], values["task"]["rows"]
    wanted = values["data"]["fetch"].get("files", [rows])[0]
    offer(values["data"]["fetch"], {wanted: file_of(rows, task)}, server)
    write(values)
    if values["model"]["fetch"].get("revision") == "master":
        with pytest.raises(Refusal) as refusal:
            importlib.import_module("stages.download").main(["model", "models/base"])
        values["model"]["fetch"]["revision"] = re.search(r"\b[0-9a-f]{40}\b", str(refusal.value))[0]
        write(values)

    with Repo(str(tmp_path), uninitialized=True) as repo:
        commands = [stage.cmd.split() for stage in repo.index.stages]
    assert len(commands) == 11
    for _, _, module, *arguments in commands:
        importlib.import_module(module).main(arguments)

    metrics = {path.stem: json.loads(path.read_text()) for path in Path("metrics").glob("*.json")}
    assert metrics["data"]["unusable"] == (task == "text_to_sql")  # the row that changes a table
    assert metrics["train"]["steps"] == -(-metrics["data"]["train_rows"] // values["train"]["batch_size"])
    assert metrics["comparison"].keys() >= {importlib.import_module(f"stages.tasks.{task}").HEADLINE, "loss"}
    adapter = json.loads(Path("models/adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (values["lora"]["r"], values["lora"]["alpha"])
    assert Path("metrics/report.html").stat().st_size > 10_000


def test_what_the_recipes_are_said_to_take_is_what_the_estimate_says(monkeypatch):
    monkeypatch.chdir(TOP)
    known = json.loads(bench.RESULTS.read_text())
    assert known == bench.all_expected()
    table = (TOP / "README.md").read_text()
    for one in known:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{one['recipe']}` |")]
        memory, seconds = (cell.strip() for cell in line.split("|")[5:7])
        assert memory == f"{one['gib_at_least']:.0f} to {one['gib']:.0f}"
        assert seconds == str(one["seconds_a_million_tokens"] or "not known")
