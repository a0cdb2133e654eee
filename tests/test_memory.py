"""stages.models.memory knows shapes without torch; here the models themselves say what is so."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from bench import memory as bench
from stages.models import families, generate, graphs, loss, machine, memory
from stages.models.fused import fuse
from stages.models.load import load_model
from stages.models.lora import add_adapters
from stages.params import load
from tests import tiny_families
from tests.conftest import ROOT

GUESSED = 0.15  # what the estimate may be off by


@pytest.fixture(scope="module", params=[name for name in tiny_families.FAMILIES if name != "gemma3n"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny_families.write(request.param, folder)
    return folder


def lora(**values):
    return load(ROOT / "params.yaml").lora.model_copy(update=values)


def shape_of(folder) -> memory.Shape:
    return memory.shape(json.loads((folder / "config.json").read_text()))


def test_what_it_repeats_of_the_stages_is_what_they_have():
    assert memory.TOKENS_PER_PACK == machine.TOKENS_PER_PACK
    assert memory.ROWS_PER_BATCH == machine.ROWS_PER_BATCH
    assert memory.PROMPT_TOKENS == generate.PROMPT_TOKENS
    assert memory.HEAD_TOKENS == loss.TOKENS_AT_ONCE
    assert (memory.KEYS, memory.GRAPHS) == (graphs.KEYS, graphs.MOST)
    assert all(memory.recorded_size(tokens) == graphs.size_of(tokens) for tokens in range(1, 70000, 7))
    for known, asked in ((memory.RECORDED, "recorded"), (memory.SHARDED, "sharded")):
        of_text = {name for name, one in families.FAMILIES.items() if getattr(one, asked)}
        assert set(known) == of_text - {"gemma3"}  # whose text is gemma3_text


def test_the_adapters_are_as_many_and_as_large_as_peft_makes_them(folder):
    embedding = {"modules_to_save": ["embed_tokens"]}
    for more in ({}, {"target_modules": ["q_proj", "down_proj"]}, {"method": "dora"}, embedding, {"tokens": True}):
        more = {**more, "trainable_tokens": ["<eos>", "<pad>"]} if more.pop("tokens", False) else more
        settings = lora(r=4, **more)
        tokens = range(len(settings.trainable_tokens))
        model = add_adapters(load_model(folder, "cpu", torch.float32), settings, 0, list(tokens))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert memory.adapter_parameters(shape_of(folder), settings) == trained


def test_the_weights_are_counted_by_config_or_by_their_files(folder):
    model = load_model(folder, "cpu", torch.float32)
    shape = shape_of(folder)
    counted = sum(parameter.numel() for parameter in model.get_decoder().parameters())
    head = model.get_output_embeddings().weight
    counted += 0 if head is model.get_input_embeddings().weight else head.numel()
    small = (shape.layers + 1) * 3 * (shape.hidden + shape.queries)  # norms and biases, which count for nothing
    assert abs(shape.parameters - counted) <= small
    assert memory.shape(json.loads((folder / "config.json").read_text()), 4000).parameters == 1000


def test_classes_defaults_are_filled_in_where_a_configuration_leaves_them_out():
    shape = memory.shape({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}})
    whole = AutoConfig.for_model("gemma3_text", hidden_size=2560)
    assert (shape.layers, shape.inner) == (whole.num_hidden_layers, whole.intermediate_size)
    assert (shape.queries, shape.vocabulary) == (whole.num_attention_heads * whole.head_dim, whole.vocab_size)
    assert shape.tied


@pytest.mark.parametrize(
    "config",
    [[], {}, {"model_type": "mamba", "num_hidden_layers": 2}, {"text_config": "none"},
     {"num_hidden_layers": "2", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}],
)  # fmt: skip
def test_a_configuration_that_is_no_decoders_is_none(config):
    assert memory.shape(config) is None


@pytest.mark.parametrize("run", json.loads(bench.RESULTS.read_text())["memory"], ids=lambda run: run["model"])
def test_the_estimate_is_near_what_training_was_seen_to_take(run):
    found = bench.judged(run)
    assert abs(found["error"]) <= memory.ERROR and abs(found.get("needed_error", 0)) <= memory.ERROR


def kept_bytes(folder, dtype: torch.dtype, **changed) -> int:
    """What autograd keeps of four rows of 64 tokens in the decoder, the weights aside."""
    from stages.models.packs import pack

    model = add_adapters(load_model(folder, "cpu", dtype), lora(r=8, **changed), 0).train()
    fuse(model)
    rows = [{"id": str(n), "input_ids": [n + 1] * 64, "labels": [1] * 64} for n in range(4)]
    (piece,) = pack(rows, 256)
    kept, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().get_decoder()(
            input_ids=piece.input_ids, position_ids=piece.position_ids, attention_mask=None, segments=piece.segments,
            sight=None, use_cache=False,
        ).last_hidden_state  # fmt: skip
    assert hidden.requires_grad
    return sum(kept.values())


WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])  # the second's queries, keys and values have a bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps_for_the_way_back_is_what_autograd_keeps(tmp_path, kind, dtype):
    """On a CPU, in a model wide enough that what is left out counts for little."""
    config, model = (getattr(transformers, kind + part) for part in ("Config", "ForCausalLM"))
    model(config(vocab_size=512, num_hidden_layers=4, **WIDE)).save_pretrained(tmp_path)
    kept, shape = kept_bytes(tmp_path, dtype), shape_of(tmp_path)
    name = str(dtype).removeprefix("torch.")
    expected = 256 * shape.layers * memory.layer_bytes(shape, lora(r=8), name, False, False, 64, False)
    assert expected == pytest.approx(kept, rel=GUESSED)
    dropped, plain = (
        memory.layer_bytes(shape, lora(r=8, dropout=p), name, False, False, 64, False) for p in (0.1, 0.0)
    )
    more = kept_bytes(tmp_path, dtype, dropout=0.1) - kept
    assert 256 * shape.layers * (dropped - plain) == pytest.approx(more, rel=0.02)


def test_what_the_default_run_took_on_a_cpu_is_what_the_doctor_asks_for():
    """3.75 GiB, in bfloat16, by the metrics/timing.json that the repository came with."""
    config = {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048}
    config |= {"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    held = memory.training(memory.shape(config), lora(), "cpu", "bfloat16", 1024, 512, False, True)
    assert held.needed / memory.GIB == pytest.approx(3.75, rel=GUESSED)
