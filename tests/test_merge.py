"""A tiny base and its adapter to one model that answers as they do; and a merge that does not, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import encode, merge
from stages.conversation import Message, conversation
from stages.models import merging
from stages.models.load import load_model
from stages.models.lora import add_adapters, load_adapter, save_adapter
from stages.params import Lora
from stages.refusal import Refusal
from tests.conftest import LORA

MACHINE = {
    "machine.device": "cpu",
    "machine.devices": 1,
    "machine.dtype": "float32",
    "machine.tokens_per_pack": 64,
    "machine.rows_per_batch": 4,
}


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """An adapter that changes the model visibly: fresh ones begin with B = 0, which changes nothing."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = add_adapters(load_model(tiny_model, "cpu", torch.float32), Lora(**LORA), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def stage(tmp_path, tiny_model, adapter, params_file, monkeypatch):
    """Runs the stage in a folder of its own, on a copy of the base that a test may change; gives the metrics."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "base")
    Path("conversations").mkdir()
    for name in ("train", "validation", "test"):
        rows = [
            conversation(f"{name} {n}", [Message(role="user", content=f"{name} {n}?")], f"It is {n}.", {})
            for n in range(6)
        ]
        Path(f"conversations/{name}.jsonl").write_text("".join(f"{json.dumps(c.model_dump())}\n" for c in rows))
    params_file(tmp_path)
    encode.main(["base", "conversations", "tokens", "tokens.json"])

    def go(adapter: Path = adapter, **overrides) -> dict:
        params_file(tmp_path, **(MACHINE | {"merge.max_kl": 0.5} | overrides))
        merge.main(["base", str(adapter), "tokens/test.parquet", "models/merged", "metrics/merge.json"])
        return json.loads(Path("metrics/merge.json").read_text())

    return go


def logits(model) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    ids = torch.arange(6, 70)[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float()


def test_the_merged_model_answers_as_base_and_adapter_do(stage, tiny_model, adapter):
    metrics = stage()
    assert list(metrics) == ["rows", "greedy_agreement", "max_kl", "mean_kl"]
    assert metrics["rows"] == 6
    assert metrics["greedy_agreement"] > 0.9
    assert 0 <= metrics["mean_kl"] <= metrics["max_kl"] < 0.5
    merged = AutoModelForCausalLM.from_pretrained("models/merged", dtype=torch.float32, local_files_only=True)
    base = load_model(tiny_model, "cpu", torch.float32)
    plain = logits(base)
    tuned = logits(load_adapter(base, adapter).get_base_model())
    # the base's bfloat16 keeps 8 bits: the merge stands near the adapter, far from the base
    assert (logits(merged) - tuned).abs().mean() < 0.1 * (plain - tuned).abs().mean()


def test_the_check_finds_nothing_but_rounding_in_float32(stage):
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model.save_pretrained("base")
    metrics = stage(**{"merge.max_kl": 1e-4})
    assert (metrics["greedy_agreement"], metrics["max_kl"] < 1e-4) == (1.0, True)


def test_the_merged_folder_is_a_model_like_the_base(stage, tiny_model):
    stage()
    merged = Path("models/merged")
    model = AutoModelForCausalLM.from_pretrained(merged, local_files_only=True)
    assert type(model).__name__ == AutoConfig.from_pretrained(tiny_model).architectures[0] == "Gemma3ForCausalLM"
    assert model.dtype == torch.bfloat16
    with safe_open(merged / "model.safetensors", "pt") as new, safe_open(tiny_model / "model.safetensors", "pt") as old:
        assert sorted(new.keys()) == sorted(old.keys())
    assert not list(merged.glob("adapter*"))
    base, tuned = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in (tiny_model, merged))
    assert tuned.chat_template == base.chat_template
    assert tuned("How many – 五?").input_ids == base("How many – 五?").input_ids
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [1, 5]
    prompt = tuned.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3


def test_the_stage_writes_the_same_bytes_twice(stage):
    stage()
    before = {path.name: path.read_bytes() for path in [*Path("models/merged").iterdir(), Path("metrics/merge.json")]}
    stage()
    after = {path.name: path.read_bytes() for path in [*Path("models/merged").iterdir(), Path("metrics/merge.json")]}
    assert after == before


def test_a_merge_that_is_not_the_model_that_was_trained_is_refused_and_leaves_nothing(stage):
    with pytest.raises(
        Refusal, match=r"^the merged model is not the one that was trained: KL .* merge.max_kl = 1e-09; "
    ):
        stage(**{"merge.max_kl": 1e-9})
    assert not Path("metrics/merge.json").exists()
    assert list(Path("models").iterdir()) == []


def test_a_refused_merge_leaves_the_one_before_it(stage):
    stage()
    before = {path: path.read_bytes() for path in Path("models/merged").iterdir()}
    with pytest.raises(Refusal):
        stage(**{"merge.max_kl": 1e-9})
    assert {path: path.read_bytes() for path in Path("models/merged").iterdir()} == before


def test_a_merge_that_forgets_the_adapter_is_found(stage, monkeypatch):
    rounding = stage()["max_kl"]
    forgotten = []

    def forgetful(name, layer, own, blocks):
        forgotten.append(name)
        return blocks

    monkeypatch.setattr(merging, "merged", forgetful)
    with pytest.raises(Refusal, match=r"^the merged model is not the one that was trained"):
        stage(**{"merge.max_kl": 3 * rounding})
    assert forgotten


@pytest.mark.parametrize("values", [{"temperature": 0.7}, {"top_p": 0.9, "top_k": 64}])
def test_sampling_values_without_do_sample_are_saved_as_sampling(values, stage):
    path = Path("base/generation_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    stage()
    saved = GenerationConfig.from_pretrained("models/merged")
    assert saved.do_sample is True
    assert {name: getattr(saved, name) for name in values} == values
    assert saved.eos_token_id == [1, 5]


def test_a_generation_config_without_sampling_values_stays_greedy():
    assert not merge.repair(GenerationConfig(eos_token_id=[1, 5])).do_sample


def test_shards_are_no_larger_than_asked(stage):
    stage(**{"merge.max_shard_size": "20KB"})
    shards = sorted(Path("models/merged").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads(Path("models/merged/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert logits(AutoModelForCausalLM.from_pretrained("models/merged", local_files_only=True)).isfinite().all()


def test_an_adapter_trained_on_4_bit_values_is_merged_onto_those_and_agrees(stage):
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model.save_pretrained("base")
    found = stage(**{"lora.quantize": "nf4", "merge.max_kl": 1e-4})
    assert (found["greedy_agreement"], found["max_kl"] < 1e-4) == (1.0, True)


def test_merged_onto_the_stored_weights_it_is_further_from_the_model_that_was_trained(stage):
    onto_trained = stage(**{"lora.quantize": "nf4"})
    onto_stored = stage(**{"lora.quantize": "nf4", "merge.onto": "stored", "merge.max_kl": 100.0})
    assert onto_stored["mean_kl"] > 10 * onto_trained["mean_kl"]


def test_4_bit_values_are_sixteen_to_a_block_and_leave_head_and_embedding_alone(tiny_model):
    plain, rounded = (load_model(tiny_model, "cpu", torch.float32, quantize=q) for q in (None, "nf4"))
    weight = rounded.model.layers[0].mlp.gate_proj.weight
    assert all(len(block.unique()) <= 16 for block in weight.reshape(-1, 64))
    assert not torch.equal(weight, plain.model.layers[0].mlp.gate_proj.weight)
    assert torch.equal(rounded.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(rounded.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_weights_that_are_no_numbers_are_refused_and_leave_no_model(stage):
    weights = load_file("base/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")  # no linear layer's, which the merge itself looks at
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"^base: gives what is no number on a test row"):
        stage()
    assert not Path("models/merged").exists() and not Path("metrics/merge.json").exists()
