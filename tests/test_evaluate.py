"""The stage from a tiny model and a data set of quotations to answers and their scores."""

import importlib.util
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import encode, evaluate, prepare
from stages.refusal import Refusal
from stages.tasks import quotes

QUOTES = {"name": "quotes", "rows": "mine.jsonl", "given_words": 3, "longest": 400}
ARGUMENTS = [
    "data/conversations/test.jsonl",
    "data/conversations/learned.jsonl",
    "data/tokens/test.parquet",
    "data/answers/base.jsonl",
    "metrics/base.json",
]
MACHINE = {
    "machine.device": "cpu",
    "machine.devices": 1,
    "machine.dtype": "float32",
    "machine.tokens_per_pack": 64,
    "machine.rows_per_batch": 4,
}


@pytest.fixture
def stage(tmp_path, tiny_model, params_file, monkeypatch):
    """Runs prepare, encode and evaluate in a folder of its own; gives the answers and the metrics."""
    monkeypatch.chdir(tmp_path)
    Path("data/raw").mkdir(parents=True)
    rows = [{"quote": f"Saying number {n} is {'long ' * (n % 7)}wise.", "author": f"Sage {n}"} for n in range(40)]
    Path("data/raw/mine.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def go(**overrides) -> tuple[list[dict], dict]:
        changes = {"task": QUOTES, "evaluate.max_new_tokens": 8} | MACHINE
        changes |= {"prepare.group_by": "author", "prepare.validation": 0.1, "prepare.test": 0.3}
        params_file(tmp_path, **(changes | overrides))
        prepare.main(["data/raw", "data/conversations", "metrics/data.json"])
        encode.main([str(tiny_model), "data/conversations", "data/tokens", "metrics/tokens.json"])
        evaluate.main([str(tiny_model), *ARGUMENTS])
        answers = [json.loads(line) for line in Path("data/answers/base.jsonl").read_text().splitlines()]
        return answers, json.loads(Path("metrics/base.json").read_text())

    return go


def test_every_test_row_has_its_answer_beside_its_reference(stage):
    answers, metrics = stage()
    rows = {row["id"]: row for row in map(json.loads, Path("data/conversations/test.jsonl").read_text().splitlines())}
    assert [answer["id"] for answer in answers] == sorted(rows)
    assert metrics["rows"] == len(rows) == json.loads(Path("metrics/data.json").read_text())["test_rows"]
    for answer in answers:
        assert list(answer)[:6] == ["id", "where", "prompt", "reference", "answer", "stopped"]
        assert answer["prompt"].startswith("Quote: Saying number ")
        assert answer["reference"] == rows[answer["id"]]["messages"][-1]["content"]


def test_the_metrics_have_their_names_and_are_the_answers_means(stage):
    answers, metrics = stage()
    assert list(metrics) == [
        "rows",
        "right_form",
        "right_author",
        "chrf",
        "exact_match",
        "memorised",
        "stop_rate",
        "loss",
        "perplexity",
    ]
    assert metrics["stop_rate"] == round(sum(answer["stopped"] for answer in answers) / len(answers), 6)
    for name in ("right_form", "right_author", "chrf", "exact_match", "memorised"):
        assert metrics[name] == round(sum(answer["scores"][name] for answer in answers) / len(answers), 6)
    assert list(json.loads(Path("metrics/timing.json").read_text())) == ["evaluate_base"]


def test_the_loss_is_that_of_transformers_over_the_supervised_tokens(stage, tiny_model):
    _, metrics = stage()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, local_files_only=True)
    total = count = 0
    for row in pq.read_table("data/tokens/test.parquet").to_pylist():
        labels = torch.tensor([row["labels"]])
        supervised = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * supervised
        count += supervised
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_answers_are_those_of_transformers(stage, tiny_model):
    answers, _ = stage()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)
    for answer in answers:
        turn = [{"role": "user", "content": answer["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == answer["answer"]


def test_the_stage_writes_the_same_bytes_twice_and_in_any_batch(stage):
    stage()
    before = [Path(name).read_bytes() for name in ARGUMENTS[3:]]
    stage()
    assert [Path(name).read_bytes() for name in ARGUMENTS[3:]] == before
    stage(**{"machine.rows_per_batch": 3})
    assert Path(ARGUMENTS[3]).read_bytes() == before[0]


def test_fewer_rows_are_the_first_by_their_hash(stage):
    whole, _ = stage()
    some, metrics = stage(**{"evaluate.rows": 3})
    assert metrics["rows"] == 3
    assert [answer["id"] for answer in some] == [answer["id"] for answer in whole[:3]]


def test_what_an_answer_copies_is_looked_for_in_the_training_rows_answers(stage, monkeypatch):
    seen = []
    monkeypatch.setattr("stages.tasks.quotes.memorised", lambda a, p, training: seen.extend(training) or [0.5] * len(a))
    _, metrics = stage()
    rows = map(json.loads, Path("data/conversations/train.jsonl").read_text().splitlines())
    assert seen == [row["messages"][-1]["content"] for row in rows] and seen
    assert metrics["memorised"] == 0.5


def test_what_a_task_shows_stands_beside_each_answer(stage, monkeypatch):
    plain, metrics = stage()

    def score_and_show(rows, answers, options, training):
        for row, score in zip(rows, quotes.score(rows, answers, options, training), strict=True):
            yield score, {"of": row.id}

    monkeypatch.setattr(quotes, "score_and_show", score_and_show, raising=False)
    assert stage() == ([{**row, "shown": {"of": row["id"]}} for row in plain], metrics)


def test_rows_split_over_several_devices_are_answered_and_scored_the_same(stage):
    answers, metrics = stage()
    assert stage(**{"machine.devices": 2}) == (answers, metrics)
    assert len({answer["answer"] for answer in answers}) > 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is installed")
def test_an_engine_that_is_not_installed_is_refused_with_what_to_install(stage):
    with pytest.raises(Refusal, match="vllm, which is not installed; set it to batches"):
        stage(**{"machine.engine": "vllm"})


def test_a_loss_that_is_no_number_is_refused_and_leaves_no_answers(stage, tiny_model):
    stage()
    for name in ("data/answers/base.jsonl", "metrics/base.json"):
        Path(name).unlink()
    shutil.copytree(tiny_model, "broken")
    weights = load_file("broken/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "broken/model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"^broken: the loss on mine.jsonl line \d+ is not finite"):
        evaluate.main(["broken", *ARGUMENTS])
    assert not Path("data/answers/base.jsonl").exists() and not Path("metrics/base.json").exists()
