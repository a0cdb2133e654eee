"""Models published to a hub on this machine (tests/hubs.py) by the client that people use, and fetched again."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import ruamel.yaml
import torch
from conftest import ROOT, write_params, write_tiny_model
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http

from stages import params
from stages.models.load import load_model
from stages.models.lora import add_adapters, save_adapter
from stages.refusal import Refusal
from stages.sources.provenance import checksums
from tests.conftest import LORA
from tests.hubs import Fault, Hub, Repository, sha256
from tools import card, licence, publish

CANARY = "hf_canary0123456789abcdef"
NAME = "owner/toy"
TERMS = """<html><style>p { color: red }</style><h1>Gemma Terms of Use</h1> <p>All Distributions must be accompanied by
a &ldquo;<b>Notice</b>&rdquo; text file that contains the following notice: &ldquo;Gemma is provided under and subject
to the Gemma Terms of Use found at ai.google.dev/gemma/terms&rdquo;. You may</p></html>"""
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
LLAMA3 = """META LLAMA 3 COMMUNITY LICENSE AGREEMENT ... (B) prominently display “Built with Meta Llama 3” on a related
website. ... you shall also include “Llama 3” at the beginning of any such AI model name. ... within a “Notice” text
file distributed as a part of such copies: “Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright
© Meta Platforms, Inc. All Rights Reserved.”"""
LLAMA2 = """LLAMA 2 COMMUNITY LICENSE AGREEMENT ... retain in all copies the following attribution notices within a
"Notice" text file distributed as a part of such copies: "Llama 2 is licensed under the LLAMA 2 Community License,
Copyright (c) Meta Platforms, Inc. All Rights Reserved." """
COMPARISON = {
    "execution_accuracy": {
        "base": {"mean": 0.05, "low": 0.01, "high": 0.1},
        "few_shot": {"mean": 0.15, "low": 0.1, "high": 0.2},
        "tuned": {"mean": 0.25, "low": 0.125, "high": 0.375},
        "over_base": {"mean": 0.2, "low": 0.1, "high": 0.3, "p": 0.00001, "verdict": "better"},
        "over_few_shot": {"mean": 0.1, "low": -0.05, "high": 0.25, "p": 0.3, "verdict": "noise"},
    },
    "loss": {
        "base": {"mean": 3.0, "low": 2.9, "high": 3.1},
        "few_shot": {"mean": 2.0, "low": 1.9, "high": 2.1},
        "tuned": {"mean": 0.5, "low": 0.4, "high": 0.6},
        "over_base": {"mean": -2.5, "low": -2.6, "high": -2.4, "p": 0.0, "verdict": "better"},
        "over_few_shot": {"mean": -1.5, "low": -1.6, "high": -1.4, "p": 0.0, "verdict": "better"},
    },
}
METRICS = {
    "comparison": COMPARISON,
    "tuned": {"rows": 40},
    "train": {
        "steps": 4,
        "kept_step": 4,
        "ended": "as planned",
        "train_loss": 1.0,
        "validation_loss": 1.5,
        "trainable_parameters": 1234,
    },
    "merge": {"rows": 16, "greedy_agreement": 0.9875, "max_kl": 0.0125, "mean_kl": 0.001},
    "data": {
        **{f"{side}_{of}": 20 for side in ("train", "validation", "test") for of in ("rows", "groups")},
        **{"unusable": 1, "duplicates": 2, "asked_twice": 3, "leaks": 0},
    },
}
PIPELINE = """
stages:
  all:
    cmd: cp -r made/. .
    deps: [made]
    params: [lora, train]
    outs: [models/base, models/adapter, models/merged, data/raw]
    metrics:
      - metrics: {cache: false}
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Path:
    """A repository after its run, committed: the pipeline's outputs, made by one stage that copies them."""
    folder = tmp_path_factory.mktemp("finished")
    made = folder / "made"
    shutil.copytree(tiny_model, made / "models/base")
    (made / "models/base/GEMMA_TERMS.html").write_text(TERMS)
    origin = {"source": "wheel", "origin": ["toy-weights==1.0.0"], "files": {"toy.gguf": "0" * 64}}
    (made / "models/base/provenance.json").write_text(
        json.dumps({**origin, "produced": checksums(made / "models/base")})
    )
    write_tiny_model(made / "models/merged", seed=1)
    adapted = add_adapters(load_model(tiny_model, "cpu", torch.bfloat16), params.Lora(**LORA), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(adapted, made / "models/adapter")
    (made / "data/raw").mkdir(parents=True)
    rows = {"source": "wheel", "origin": ["toy-rows==2.0"], "files": {"rows.jsonl": "1" * 64}}
    (made / "data/raw/provenance.json").write_text(json.dumps({**rows, "license": "CC0 (as | you\nlike)"}))
    (made / "metrics").mkdir()
    for name, value in METRICS.items():
        (made / f"metrics/{name}.json").write_text(json.dumps(value))
    write_params(folder, **{"evaluate.max_new_tokens": 6})
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / ".gitignore").write_text("/.runs\n")
    before = Path.cwd()
    os.chdir(folder)
    run("git", "init", "-q", "-b", "main")
    run("git", "remote", "add", "origin", f"https://someone:{CANARY}@example.org/team/lorepro.git")
    run(sys.executable, "-m", "dvc", "init", "-q")
    run(sys.executable, "-m", "dvc", "config", "cache.type", "copy")
    run(sys.executable, "-m", "dvc", "repro", "-q")
    commit()
    os.chdir(before)
    return folder


def commit() -> None:
    run("git", "add", "-A")
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "run")


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, that the test runs in."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A hub that knows one token, which the environment holds."""
    server = Hub()
    server.tokens = {CANARY}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    yield server
    server.close()


def held(server: Hub, name: str = NAME) -> dict[str, bytes]:
    """The files of the repository's main branch."""
    there = server.repositories[name]
    return there.commits[there.branches["main"]]


def folder_of(name: str = NAME) -> dict[str, bytes]:
    folder = Path(".runs/publish") / name.replace("/", "--")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sent(server: Hub) -> list[str]:
    """The addresses that files' bytes were sent to."""
    return [path for host, path, headers in server.asked if host == "storage" and "range" not in headers]


def refused(*arguments: str) -> str:
    """The one line that publishing is refused with."""
    with pytest.raises(Refusal) as refusal:
        publish.main(list(arguments))
    line = str(refusal.value)
    assert "\n" not in refusal.value.args[0] and CANARY not in line
    return line


# what goes


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_what_the_folder_shows_is_what_the_hub_has_after_one_commit(project, server, capsys, kind):
    publish.main([NAME, kind])
    files = held(server)
    assert files.pop(".gitattributes") and files == folder_of()
    assert len(server.repositories[NAME].commits) == 2  # the hub's own, and this one
    assert server.repositories[NAME].private is None
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    assert files[weights] == (project / f"models/{kind}" / weights).read_bytes()
    assert {"README.md", "GEMMA_TERMS.html", "NOTICE", "tokenizer.json", "chat_template.jinja"} < set(files)
    assert ("model.safetensors" in files) == (kind == "merged")
    there = server.repositories[NAME]
    assert capsys.readouterr().out.strip() == f"{server.url}/{NAME}/commit/{there.branches['main']}"
    assert not any("Bearer" in str(headers) for host, _, headers in server.asked if host == "storage")


def test_private_makes_a_private_repository(project, server):
    publish.main([NAME, "--private"])
    assert server.repositories[NAME].private == {CANARY}
    assert "README.md" in held(server)


def test_the_cards_code_answers_with_what_the_hub_has(project, server):
    """In one process, in the order that the card of the adapter asks for: the base is in models/base."""
    code = ""
    for kind in ("adapter", "merged"):
        publish.main([f"{NAME}-{kind}", kind])
        code += python_of(project / f".runs/publish/owner--toy-{kind}/README.md")
        code += "\nprint(type(model).__name__, model.generation_config.eos_token_id)\n"
    home = project.parent / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+) \[1, 5\]$", done.stdout, re.M) == ["PeftModelForCausalLM", "Gemma3ForCausalLM"]
    for kind, weights in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        (fetched,) = home.rglob(weights)
        assert fetched.read_bytes() == (project / f"models/{kind}" / weights).read_bytes()


def python_of(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.S)[1]


def test_a_dry_run_needs_no_token_sends_nothing_and_says_what_would_go(project, server, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    publish.main([NAME, "merged", "--dry-run"])
    assert server.asked == []
    said = capsys.readouterr()
    assert said.out == "written to .runs/publish/owner--toy, and not sent\n"
    sizes = re.findall(r"^ +([\d,]+) bytes  (\S+)$", said.err, re.M)
    assert sizes == [(f"{len(content):,}", name) for name, content in sorted(folder_of().items())]


def test_a_sentence_of_the_licence_goes_into_the_notice_with_what_the_base_brought(project):
    (project / "models/base/NOTICE.txt").write_text("Made by others.\n")
    publish.fill(new(project), "merged", NAME, publish.find_licence(None), "c" * 40, lock(project))
    notice = (project / "new/NOTICE").read_text()
    assert notice.startswith("Made by others.\n\n" + NOTICE) and "from toy by fine-tuning" in notice
    assert not (project / "new/NOTICE.txt").exists()


def new(project: Path) -> Path:
    (project / "new").mkdir()
    return project / "new"


def lock(project: Path) -> dict:
    return ruamel.yaml.YAML(typ="safe", pure=True).load(project / "dvc.lock")


@pytest.mark.parametrize(
    ("source", "origin", "named", "revision"),
    [
        ("hub", f"team/base@{'a' * 40}", "team/base", "a" * 40),
        ("modelscope", f"team/base@{'a' * 40}", "models/base", None),  # PEFT would look for the name on the other hub
        ("path", "models/own/toy", "models/base", None),
    ],
)
def test_the_adapter_and_the_card_name_the_base_where_it_has_a_name(project, source, origin, named, revision):
    path = project / "models/base/provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source, "origin": [origin]}))
    publish.fill(new(project), "adapter", NAME, publish.find_licence(None), "c" * 40, lock(project))
    config = json.loads((project / "new/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == named and config["revision"] == revision
    made = json.loads((project / "models/adapter/adapter_config.json").read_text())
    same = ("base_model_name_or_path", "revision")
    assert {k: v for k, v in config.items() if k not in same} == {k: v for k, v in made.items() if k not in same}
    written = ModelCard.load(project / "new/README.md")
    assert written.data.base_model == ("team/base" if source == "hub" else None)
    code = python_of(project / "new/README.md")
    compile(code, "card", "exec")
    assert (f'"{named}"' in code) and (("a" * 40 in code) == (source == "hub"))
    assert ("The base is not on this hub" in written.text) == (source != "hub")
    assert ("Before `dvc repro`, `models/own/toy` must be there" in written.text) == (source == "path")


# the card


@pytest.fixture
def written(project) -> ModelCard:
    publish.main([NAME, "adapter", "--dry-run"])
    return ModelCard.load(project / ".runs/publish/owner--toy/README.md")


def test_the_metadata_are_those_that_the_hub_reads(written):
    data = written.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "gemma", "text-generation")
    assert {"lora", "text-to-sql"} <= set(data.tags) and data.datasets is None and data.model_name == "toy"
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == set(COMPARISON)
    assert results["execution_accuracy"].metric_value == 0.25
    assert results["execution_accuracy"].metric_name == "execution accuracy (95% interval 0.125 to 0.375)"
    assert results["loss"].dataset_split == "test" and results["loss"].dataset_type == "toy-rows"


def test_a_data_set_of_the_hub_has_its_name_in_the_metadata(project):
    path = project / "data/raw/provenance.json"
    there = {"source": "hub", "origin": [f"datasets/team/rows@{'b' * 40}"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | there))
    publish.fill(new(project), "merged", NAME, publish.find_licence(None), "c" * 40, lock(project))
    data = ModelCard.load(project / "new/README.md").data
    assert data.datasets == ["team/rows"] and data.library_name == "transformers"
    assert {(one.dataset_type, one.dataset_revision) for one in data.eval_results} == {("team/rows", "b" * 40)}


def test_the_card_gives_each_score_with_its_interval_and_the_verdict(written):
    assert "| execution accuracy | 5.0% (1.0 to 10.0) | 15.0% (10.0 to 20.0) | 25.0% (12.5 to 37.5) |" in written.text
    assert "**better**: +20.0 points (+10.0 to +30.0, p < 0.0001)" in written.text
    assert "**noise**: +10.0 points (−5.0 to +25.0, p = 0.3000)" in written.text
    assert (
        "1.000 nats a token on training rows, at step 4, whose adapter this is, 1.500 on validation rows"
        in written.text
    )


def test_the_card_says_where_all_comes_from_and_how_to_make_it_again(written, project):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert f"git checkout {head}\n" in written.text
    assert "git clone https://example.org/team/lorepro.git again" in written.text
    assert "CC0 (as | you like)" in written.text and "`toy-rows==2.0`" in written.text
    (made,) = (out for out in lock(project)["stages"]["all"]["outs"] if out["path"] == "models/adapter")
    assert made["md5"] in written.text and "1" * 64 in written.text
    assert "[GEMMA_TERMS.html](GEMMA_TERMS.html)" in written.text and "[NOTICE](NOTICE)" in written.text


def test_the_card_shows_the_prompt_as_the_chat_template_writes_it(written):
    asked = "singer(id, name, age)\n\nWhich singers are older than 30?"
    assert f"```text\n<bos><start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n```" in written.text
    assert "```text\nSELECT name FROM singer WHERE age > 30\n```" in written.text


def test_no_path_of_this_machine_and_no_token_stands_in_the_card(written, project):
    assert str(project) not in written.content and CANARY not in written.content and "someone" not in written.content


def test_the_tables_of_the_card_are_even(written):
    """A row of a table that has more or fewer cells than its head would not be drawn as meant."""
    blocks = re.sub(r"```.*?```", "", written.text, flags=re.S).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.strip().startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
        assert re.fullmatch(r"(\|---)+\|", table[1])


@pytest.mark.parametrize("task", sorted(path.stem for path in (ROOT / "stages/tasks").glob("[a-z]*.py")))
def test_each_task_has_an_example(task, params_file, tmp_path, tiny_model):
    options = {
        "chat": {"name": "chat", "rows": "x"},
        "instructions": {"name": "instructions", "rows": "x", "headings": "english"},
        "quotes": {"name": "quotes", "rows": "x", "given_words": 4, "longest": 300},
        "text_to_sql": {
            **{"name": "text_to_sql", "rows": "x", "schemas": "y", "schema_as": "ddl", "instances": 1, "seed": 0},
            **{"columns": {"question": "q", "query": "sql", "schema": "tables"}, "unusable": "refuse"},
        },
    }
    section = params.load(params_file(tmp_path, task=options[task])).task
    row, prompt = card.example(section, card.AutoTokenizer.from_pretrained(tiny_model))
    assert row.prompt[0].content in prompt and row.reference not in prompt


def test_each_score_that_the_readme_explains_has_a_meaning():
    table = re.search(r"\| metric \| meaning \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S)[1]
    counts = {
        "perplexity",
        "unusable",
        "duplicates",
        "asked_twice",
        "leaks",
        "greedy_agreement",
        "max_kl",
        "kept_step",
        "ended",
        "validation_score",
    }
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named - counts == set(card.MEANINGS)


@pytest.mark.parametrize(("quantize", "double"), [("nf4", True), ("nf4-single", False)])
def test_an_adapter_trained_on_4_bit_values_is_loaded_onto_them(project, quantize, double):
    write_params(project, **{"lora.quantize": quantize})
    publish.fill(new(project), "adapter", NAME, publish.find_licence(None), "c" * 40, lock(project))
    code = python_of(project / "new/README.md")
    compile(code, "card", "exec")
    assert 'bnb_4bit_quant_type="nf4"' in code and "BitsAndBytesConfig, GenerationConfig" in code
    assert f"bnb_4bit_use_double_quant={double}," in code


# licences


@pytest.mark.parametrize(
    ("text", "name", "notice"),
    [
        (
            LLAMA2,
            "llama2",
            "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc.",
        ),
        (LLAMA3, "llama3", "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2", None),
        ("Apache License\n   Version 2.0, January 2004", "apache-2.0", None),
        ("Permission is hereby granted, free of\ncharge, to any person obtaining a copy of", "mit", None),
        ("Do as you like", "other", None),
    ],
)
def test_a_licence_is_known_by_its_words_and_what_it_asks_for_found_in_them(tmp_path, text, name, notice):
    (tmp_path / "LICENSE").write_text(text)
    found = licence.read(tmp_path / "LICENSE")
    assert found.hub == name and (found.notice or "").startswith(notice or "")
    assert (found.notice is None) == (notice is None)


def test_a_name_that_the_licence_does_not_allow_is_refused(project, server):
    Path("llama.txt").write_text(LLAMA3)
    line = refused(NAME, "--license", "llama.txt")
    assert "llama.txt asks for a name that begins with 'Llama 3'" in line and server.asked == []
    publish.main(["owner/llama-3-toy", "--license", "llama.txt"])
    files = held(server, "owner/llama-3-toy")
    assert b"**Built with Meta Llama 3**" in files["README.md"] and files["llama.txt"] == LLAMA3.encode()


def test_a_base_that_came_without_its_licence_is_refused_until_one_is_given(project, server):
    shutil.rmtree("models/base")
    Path("made/models/base/GEMMA_TERMS.html").unlink()
    run(sys.executable, "-m", "dvc", "repro", "-q")
    commit()
    line = refused(NAME)
    assert "came without its licence" in line and "toy-weights==1.0.0" in line and "--license FILE" in line
    assert "there is no such file" in refused(NAME, "--license", "TERMS")
    Path("TERMS").write_text("Do as you like")
    publish.main([NAME, "--license", "TERMS"])
    data = ModelCard(held(server)["README.md"].decode()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "terms", "TERMS")
    assert held(server)["TERMS"] == b"Do as you like" and "NOTICE" not in held(server)


# what is refused before anything is sent


@pytest.mark.parametrize("name", ["toy", "owner/", "a/b/c", "https://huggingface.co/owner/toy", "owner/t oy", "a/b--c"])
def test_what_is_no_name_of_a_repository_is_refused(project, server, name):
    assert "give OWNER/NAME" in refused(name)


def test_without_a_token_it_is_refused(project, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    assert refused(NAME).startswith("HF_TOKEN is not set; set it to a token that may write") and server.asked == []


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_output_that_is_not_there_is_refused(project, server, kind):
    shutil.rmtree(f"models/{kind}")
    assert refused(NAME, kind) == (
        f"models/{kind}: holds no model yet; make it with dvc repro, or fetch it with dvc pull"
    )


def test_outputs_that_the_parameters_no_longer_make_are_refused(project, server):
    write_params(project, **{"lora.r": 2})
    line = refused(NAME)
    assert "the outputs are not what params.yaml and the code make (all;" in line and "dvc repro" in line
    commit()
    assert "dvc repro" in refused(NAME)
    assert server.asked == []


@pytest.mark.parametrize("path", ["params.yaml", "dvc.yaml", "dvc.lock", "requirements.txt", "made/more.py"])
def test_what_made_the_model_and_is_not_committed_is_refused(project, server, path):
    with Path(path).open("a") as file:
        file.write("# a remark\n")
    if path.startswith("made"):
        run(sys.executable, "-m", "dvc", "repro", "-q")
    line = refused(NAME)
    assert path in line and "not committed" in line and server.asked == []


def test_a_commit_that_origin_may_not_have_is_told_of_in_a_line(project, capsys):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def warned() -> list[str]:
        publish.main([NAME, "--dry-run"])
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    run("git", "update-ref", "refs/remotes/another/main", head)
    (line,) = warned()
    assert line.startswith(f"warning: commit {head[:12]}, which the card names, is on no branch of origin")
    run("git", "update-ref", "refs/remotes/origin/main", head)  # as a push leaves it
    assert warned() == []
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "later", "--allow-empty")
    assert len(warned()) == 1
    run("git", "remote", "remove", "origin")  # the card then says that it knows no address
    assert warned() == []


def test_what_has_no_part_in_the_model_may_change(project, server):
    Path("notes.txt").write_text("mine")
    publish.main([NAME])
    assert "notes.txt" not in held(server)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_file_that_was_damaged_in_place_is_refused(project, server, kind):
    (path,) = Path(f"models/{kind}").glob("*.safetensors")
    subprocess.run([sys.executable, "-m", "dvc", "status", "-q"], check=True)  # which remembers its hash
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refused(NAME, kind) == f"{path}: is not what dvc.lock says; python -m tools.verify tells what to do"
    assert NAME not in server.repositories


# what is wrong with the hub


def test_a_token_that_the_hub_does_not_know_is_refused(project, server):
    server.tokens = set()
    assert "does not know the token in HF_TOKEN" in refused(NAME)


def test_a_token_that_may_not_make_the_owners_repositories_is_refused(project, server):
    server.owners["owner"] = set()
    line = refused(NAME)
    assert line.startswith(f"{NAME}: the token in HF_TOKEN may not write there (it says: You don't have the rights")
    assert NAME not in server.repositories


def test_a_token_that_may_read_a_repository_and_not_write_is_refused(project, server):
    server.repositories[NAME] = Repository(writers={"another"})
    server.repositories[NAME].push({".gitattributes": b""})
    line = refused(NAME)
    assert "may not write there (it says: Forbidden: pass a token with write access (…))" in line
    assert sent(server) == []


def test_a_repository_that_has_other_files_is_refused_until_they_may_go(project, server):
    there = server.repositories[NAME] = Repository()
    there.push({".gitattributes": b"x", "model.bin": b"other", "sub/notes.md": b"y", "NOTICE": b"z"})
    line = refused(NAME)
    assert "has other files (model.bin, sub/notes.md)" in line and "--replace" in line
    assert len(there.commits) == 1 and sent(server) == []
    publish.main([NAME, "--replace"])
    assert set(held(server)) == {".gitattributes", *folder_of()} and held(server)["NOTICE"] != b"z"
    assert len(there.commits) == 2


def test_a_public_repository_is_not_taken_for_a_private_one(project, server):
    server.repositories[NAME] = Repository()
    server.repositories[NAME].push({".gitattributes": b""})
    assert "is there and public" in refused(NAME, "--private")


def test_what_is_there_already_is_not_committed_again(project, server, capsys):
    publish.main([NAME])
    first = capsys.readouterr().out
    publish.main([NAME])
    assert capsys.readouterr().out == first
    assert len(server.repositories[NAME].commits) == 2


def test_a_connection_cut_while_sending_loses_nothing_that_was_sent(project, server):
    weights, tokenizer = (
        sha256(Path(path).read_bytes()) for path in ("models/merged/model.safetensors", "models/merged/tokenizer.json")
    )
    server.faults[weights] = [Fault(cut_after=2000)] * 6
    line = refused(NAME, "merged")
    assert "the connection was lost" in line and "type it again" in line
    assert set(held(server)) == {".gitattributes"}
    server.faults.clear()
    for digest in [digest for digest in server.stored if digest != tokenizer]:
        del server.stored[digest]  # as if the others had not been sent yet
    assert tokenizer in server.stored
    server.asked.clear()
    publish.main([NAME, "merged"])
    assert any(weights in path for path in sent(server)) and not any(tokenizer in path for path in sent(server))
    files = held(server)
    assert files.pop(".gitattributes") and files == folder_of()


def test_an_answer_lost_after_the_commit_is_found_committed_when_typed_again(project, server):
    server.faults["commit"] = [Fault(cut_after=0)]
    assert "the connection was lost" in refused(NAME)
    server.asked.clear()
    publish.main([NAME])
    assert sent(server) == [] and len(server.repositories[NAME].commits) == 2


def test_a_commit_that_came_between_is_not_overwritten(project, server, monkeypatch):
    look = publish.HfApi.list_repo_files

    def looked(*arguments, **named):
        server.repositories[NAME].push({".gitattributes": b"", "theirs.txt": b"new"})
        return look(*arguments, **named)

    monkeypatch.setattr(publish.HfApi, "list_repo_files", looked)
    assert "was changed meanwhile (it says: A commit has happened since." in refused(NAME)
    assert held(server)["theirs.txt"] == b"new"


def test_a_card_that_the_hub_does_not_take_is_refused_before_anything_is_sent(project, server):
    server.faults["card"] = [Fault(status=400)]
    assert "does not take it: Invalid metadata in README.md" in refused(NAME) and sent(server) == []


def test_any_other_status_is_one_line(project, server):
    server.faults["commit"] = [Fault(status=413)]
    assert "answers 413" in refused(NAME)


def test_a_hub_that_cannot_be_reached_is_one_line(project, server):
    server.close()
    assert "the connection was lost (ConnectError)" in refused(NAME)


def test_the_token_is_written_nowhere(project, server):
    home = project.parent / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    before = {path for path in project.rglob("*") if path.is_file()}
    for arguments, status in (([NAME], 0), ([NAME, "merged"], 2)):  # the second has other files than the first
        command = [sys.executable, "-m", "tools.publish", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, "has other files" in done.stderr) == (status, status == 2)
        assert CANARY not in done.stdout + done.stderr and "Traceback" not in done.stderr
    made = [path for path in (*home.rglob("*"), *project.rglob("*")) if path.is_file() and path not in before]
    assert made and not any(CANARY.encode() in path.read_bytes() for path in made)
    assert not any(CANARY.encode() in content for content in held(server).values())
