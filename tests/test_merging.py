"""Merged a block at a time, every file has the bytes that PEFT's merge and transformers' saving give; and what is not
covered is merged by them."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from stages import merge
from stages.models import shards
from stages.models.load import load_model
from stages.models.lora import save_adapter
from stages.models.merging import plan
from stages.models.shards import stored, stored_model, write_shard
from stages.models.unloaded import Uncovered
from stages.refusal import Refusal


def drawn(model: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * std)
    return model


def write_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB", **values) -> Path:
    """Linear layers with a bias, a head of its own, more rows than a block has at least."""
    values = {"hidden_size": 96, "tie_word_embeddings": False} | values
    config = LlamaConfig(
        vocab_size=200,
        intermediate_size=330,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        **values,
    )
    drawn(LlamaForCausalLM(config)).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_gemma_with_eyes(folder: Path) -> Path:
    """Gemma 3 as it comes from 4B on: an image tower beside the text, the tensors on the disk called otherwise than in
    the model."""
    text = Gemma3TextConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=199)
    drawn(Gemma3ForConditionalGeneration(config)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **values) -> Path:
    """An adapter none of whose weights is zero, saved in `dtype`."""
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | values
    model = get_peft_model(load_model(base, "cpu", torch.float32), LoraConfig(**values))
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            move = torch.randn(parameter.shape, generator=draw) * 0.05
            parameter.data = (parameter.data + move if "magnitude" in name else move).to(dtype)
    save_adapter(model, folder)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    # PEFT adds the head itself, as it came, to an adapter of the head
    safetensors.torch.save_file({name: tensors[name] for name in tensors if "base_layer" not in name}, path)
    return folder


def by_peft(base: Path, adapter: Path, folder: Path, max_shard_size: str = "1GB", quantize: str | None = None) -> Path:
    dtype = AutoConfig.from_pretrained(base).dtype
    model = merge.merge(load_model(base, "cpu", dtype), adapter, quantize)
    model.generation_config = GenerationConfig.from_pretrained(base)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def both(tmp_path, capsys):
    """Merges both ways; the files of the two, and what the stage said of its way."""

    def go(base: Path, adapter: Path, max_shard_size: str = "1GB", quantize: str | None = None):
        ours = tmp_path / "ours"
        ours.mkdir()
        capsys.readouterr()
        merge.write_model(base, adapter, ours, max_shard_size, "cpu", quantize)
        said = capsys.readouterr().err
        return contents(ours), contents(by_peft(base, adapter, tmp_path / "theirs", max_shard_size, quantize)), said

    return go


KINDS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "of some modules": {"target_modules": ["q_proj", "down_proj"]},
    "of one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "its head too": {"target_modules": ["v_proj", "lm_head"]},
    "ranks and alphas by name": {"rank_pattern": {"q_proj": 7, "down_proj": 2}, "alpha_pattern": {"v_proj": 11}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_pefts_own_merge(kind, dtype, both, tmp_path):
    base = write_llama(tmp_path / "base", dtype)
    ours, theirs, said = both(base, write_adapter(base, tmp_path / "adapter", **KINDS[kind]))
    assert "a block at a time" in said
    assert ours == theirs
    assert ours["model.safetensors"] != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_so_they_are_when_a_tensor_takes_several_blocks_and_the_model_several_files(kind, both, tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base", max_shard_size="60KB")
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    monkeypatch.setattr(shards, "ELEMENTS_PER_BLOCK", 1)
    weight = stored_model(base)["model.layers.0.mlp.gate_proj.weight"]
    assert [len(block) for block in weight.blocks()] == [64, 64, 64, 64, 64, 10]
    ours, theirs, said = both(base, adapter, "100KB")
    assert "a block at a time" in said
    assert len([name for name in ours if name.endswith(".safetensors")]) > 3
    assert ours == theirs


def test_tied_embeddings_are_written_once(both, tiny_model, tmp_path):
    ours, theirs, said = both(tiny_model, write_adapter(tiny_model, tmp_path / "adapter"))
    assert "a block at a time" in said
    assert {name: ours[name] for name in theirs} == theirs
    assert "lm_head.weight" not in stored(tmp_path / "ours/model.safetensors")


def test_adapters_in_bfloat16_are_added_in_float32_as_peft_does(both, tmp_path):
    base = write_llama(tmp_path / "base")
    ours, theirs, said = both(base, write_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16))
    assert "a block at a time" in said
    assert ours == theirs


@pytest.mark.parametrize("quantize", ["nf4", "nf4-single", "int8"])
@pytest.mark.parametrize("elements", [1, 1 << 20], ids=["in blocks", "whole"])
@pytest.mark.parametrize("width", [96, 128])
def test_the_values_that_are_kept_are_those_of_the_whole_weight(width, elements, quantize, both, tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base", hidden_size=width)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "gate_proj"])
    monkeypatch.setattr(shards, "ELEMENTS_PER_BLOCK", elements)
    ours, theirs, said = both(base, adapter, quantize=quantize)
    assert "a block at a time" in said
    assert ours == theirs


def test_tensors_called_otherwise_on_the_disk_than_in_the_model_are_found(both, tmp_path):
    base = write_gemma_with_eyes(tmp_path / "base")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in stored_model(base)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    ours, theirs, said = both(base, adapter)
    assert "merged 4 of" in said
    assert ours == theirs


WHOLE = {
    "modules_to_save": ({"modules_to_save": ["norm"]}, {}),
    "bias": ({"bias": "lora_only"}, {}),
    "lora_bias": ({"lora_bias": True}, {}),
    "trainable_token_indices": ({"trainable_token_indices": [3, 5]}, {}),
    "init_lora_weights": ({"init_lora_weights": "olora"}, {}),
    "embed_tokens is no plain linear layer": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "lm_head shares its weight": ({"target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("reason", WHOLE)
def test_what_is_not_covered_is_merged_by_peft(reason, both, tmp_path):
    values, model = WHOLE[reason]
    base = write_llama(tmp_path / "base", **model)
    ours, theirs, said = both(base, write_adapter(base, tmp_path / "adapter", **values))
    assert "merging in memory, the whole model at once: " in said
    assert reason in said
    assert ours == theirs


def test_a_base_of_two_types_is_merged_by_peft(both, tmp_path):
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    ours, theirs, said = both(base, adapter)
    assert "the base's files do not hold all tensors as torch.bfloat16" in said
    assert ours == theirs


def test_a_base_with_a_tensor_that_the_model_has_not_is_merged_by_peft(both, tmp_path):
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    safetensors.torch.save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}, base / "model.safetensors"
    )
    ours, theirs, said = both(base, adapter)
    assert "the base's files hold other tensors than the model" in said
    assert ours == theirs


@pytest.mark.parametrize("change", ["one more", "one less", "another shape"])
def test_an_adapter_whose_file_is_not_what_its_configuration_says_is_not_covered(change, tmp_path):
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = min(tensors)
    if change == "one more":
        tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 96)
    elif change == "one less":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, 1:].contiguous()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(Uncovered, match="the adapter's file "):
        plan(base, adapter, torch.bfloat16)


@pytest.mark.parametrize("value", [math.nan, 1e38])
def test_an_adapter_that_makes_a_weight_no_number_is_refused(value, tmp_path):
    base = write_llama(tmp_path / "base", torch.float16)
    adapter = write_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][300, 2] = value
    safetensors.torch.save_file(tensors, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        Refusal,
        match=r"^the adapter makes model.layers.1.mlp.up_proj.weight infinite or no number in torch.float16;",
    ):
        merge.write_model(base, adapter, tmp_path / "out", "1GB", "cpu", None)


def test_a_written_shard_is_the_file_that_safetensors_writes(tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (130, 5), "a": (), "c": (0, 4), "ä": (7,), "b.bias": (130,), "d": (65, 2, 3)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    places = stored(tmp_path / "theirs.safetensors")
    assert all(torch.equal(place.tensor(), tensors[name]) for name, place in places.items())
    write_shard(tmp_path / "ours.safetensors", dict(reversed(places.items())), lambda name: places[name].blocks())
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_blocks_are_no_larger_than_they_may_be(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(3000, 8000, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    sizes = [block.numel() for block in stored(tmp_path / "x.safetensors")["x"].blocks()]
    assert max(sizes) <= shards.ELEMENTS_PER_BLOCK
    assert sum(sizes) == math.prod((3000, 8000))


def test_a_base_that_ends_too_early_writes_nothing(tmp_path):
    base = write_llama(tmp_path / "base")
    places = stored_model(base)
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(EOFError, match="ends before its tensors do"):
        write_shard(tmp_path / "x", places, lambda name: places[name].blocks())
