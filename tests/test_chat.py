"""Questions to tiny models, as a person would ask them in a terminal."""

import json

import pytest
import torch
from conftest import LORA, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.conversation import Message, conversation
from stages.models.load import load_model
from stages.models.lora import add_adapters, save_adapter
from stages.params import Lora
from stages.refusal import Refusal
from tools import chat

MACHINE = {"machine.device": "cpu", "machine.dtype": "float32", "machine.devices": 1}


@pytest.fixture
def models(tmp_path, tiny_model, params_file, monkeypatch):
    """A repository's folder in which the pipeline has made its models: the merged one with other weights."""
    params_file(tmp_path, **MACHINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(tiny_model)
    write_tiny_model(tmp_path / "models/merged", seed=1)
    adapted = add_adapters(load_model(tiny_model, "cpu", torch.float32), Lora(**LORA | {"alpha": 64.0}), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(adapted, tmp_path / "models/adapter")
    return tmp_path / "models"


def greedy(folder, messages: list[dict[str, str]], tokens: int) -> str:
    """What plain transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_prompt_is_answered_as_plain_transformers_answers_it(models, capsys):
    chat.main(["How many singers?", "--max-new-tokens", "6"])
    asked = [{"role": "user", "content": "How many singers?"}]
    assert capsys.readouterr().out.strip() == greedy(models / "merged", asked, 6)


def test_a_prompt_can_stand_in_a_file(models, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("How many singers?\n")
    chat.main(["How many singers?", "--max-new-tokens", "6"])
    chat.main(["--file", "prompt.txt", "--max-new-tokens", "6"])
    first, second = capsys.readouterr().out.strip().split("\n")
    assert first == second


def test_a_conversation_remembers_until_it_begins_anew(models, monkeypatch):
    said = iter(["One?", "Two?", "/new", "One?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    answered, plainly = [], chat.Speaker.answer
    monkeypatch.setattr(chat.Speaker, "answer", lambda *given, **more: answered.append(plainly(*given, **more)))
    chat.main(["--models", "base", "--max-new-tokens", "4"])
    first, second, anew = answered
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": first}]
    assert second == greedy(models / "base", [*turns, {"role": "user", "content": "Two?"}], 4)
    assert anew == first


def test_the_adapter_changes_the_base_models_answer(models):
    params = chat.load()
    answers = {
        name: chat.speaker(name, None, params).answer("How many singers?", 8, 0.0, streamed=False)
        for name in ("base", "adapter")
    }
    assert answers["base"] != answers["adapter"]


@pytest.mark.parametrize("name", ["base", "adapter", "tuned"])
@pytest.mark.parametrize("quantize", ["nf4", "nf4-single", "int8"])
def test_a_quantized_model_has_the_weights_that_are_kept(models, name, quantize, monkeypatch):
    asked = []
    monkeypatch.setattr(chat, "say", lambda speakers, *_: asked.extend(speakers))
    chat.main(["How many singers?", "--models", name, "--quantize", quantize])
    (found,) = asked
    weight = next(value for key, value in found.model.named_parameters() if "down_proj" in key and "lora" not in key)
    folder = models / ("merged" if name == "tuned" else "base")
    plain, rounded = (load_model(folder, "cpu", torch.float32, quantize=kept) for kept in (None, quantize))
    assert torch.equal(weight, rounded.model.layers[0].mlp.down_proj.weight)
    assert not torch.equal(weight, plain.model.layers[0].mlp.down_proj.weight)
    assert any("lora_A" in key for key, _ in found.model.named_parameters()) == (name == "adapter")


def test_at_a_temperature_the_seed_decides_what_is_said(models, capsys):
    said = []
    for seed in ("1", "1", "2"):
        chat.main(["How many singers?", "--temperature", "5", "--seed", seed, "--max-new-tokens", "8"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_an_answer_is_written_as_it_comes(models, monkeypatch, capsys):
    came, plainly = [], chat.TextStreamer.put
    monkeypatch.setattr(chat.TextStreamer, "put", lambda self, ids: (came.append(ids.numel()), plainly(self, ids)))
    answer = chat.speaker("base", None, chat.load()).answer("How many singers?", 12, 0.0, streamed=True)
    assert len(came) > 3 and set(came[1:]) == {1}  # the prompt, then a token at a time
    assert capsys.readouterr().out.strip() == answer


def test_several_models_answer_in_columns_and_no_markup_is_read_in_what_they_say(models, capsys, monkeypatch):
    monkeypatch.setattr(chat.Speaker, "answer", lambda self, *_, **__: f"[red]{self.name} says[/red]")
    chat.main(["Hm?", "--models", "base", "tuned"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["base", "tuned"] for line in lines)
    assert any("[red]base says[/red]" in line and "[red]tuned says[/red]" in line for line in lines)


def test_a_test_row_is_shown_with_its_reference(models, tmp_path, capsys):
    row = conversation("mine.jsonl line 3", [Message(role="user", content="How many?")], "SELECT COUNT(*)", {})
    (tmp_path / "data/conversations").mkdir(parents=True)
    chat.TEST_ROWS.write_text(json.dumps(row.model_dump()) + "\n")
    chat.main(["--test", "--max-new-tokens", "2"])
    said = capsys.readouterr().out
    assert "mine.jsonl line 3" in said and "How many?" in said and "SELECT COUNT(*)" in said
    with pytest.raises(Refusal, match="holds no row nowhere"):
        chat.main(["--test", "nowhere"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--file", "b"], "give one of a prompt, --file and --test"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read as UTF-8 text: No such file"),
        ([""], "the prompt is empty"),
        (["a", "--temperature", "-1"], "--temperature should be at least 0"),
        (["a", "--models", "adapter"], "models/adapter: holds no model yet; make it with dvc repro"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(models, arguments, said):
    for file in (models / "adapter").iterdir():
        file.unlink()
    with pytest.raises(Refusal, match=said):
        chat.main(arguments)
