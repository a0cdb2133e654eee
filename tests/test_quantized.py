"""Weights of 4 and 8 bits: what a CPU rounds to is what bitsandbytes keeps; packed layers multiply as merged ones."""

from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_bnb_weight
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.families import adaptable
from stages.models.fused import _FusedLora, _WideLora, fuse
from stages.models.load import load_model, pack_loss
from stages.models.lora import add_adapters, twin
from stages.models.packs import IGNORED, pack
from stages.models.quantized import dense, kept_values, multiply_restored, packing, restore_scales, restored
from stages.params import Lora, Quantize
from tests.conftest import LORA


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_transformers(folder, dtype: torch.dtype, quantize: str = "int8"):
    """The model with the weights that a GPU would hold: bitsandbytes packs on a CPU too."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=packing(AutoConfig.from_pretrained(folder), quantize, dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_that_are_restored_once_give_the_weights_that_those_restored_each_time_give(tiny_model, dtype):
    model = by_transformers(tiny_model, dtype, "nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    before = [dense(layer.weight, dtype) for layer in layers]
    assert layers and all(layer.weight.quant_state.nested for layer in layers)
    restore_scales(model)
    assert not any(layer.weight.quant_state.nested for layer in layers)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(dense(layer.weight, dtype), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(330, 128), (3, 7, 64)])
def test_4_bit_values_are_restored_bit_for_bit_as_bitsandbytes_restores_them(shape, dtype):
    packed, state = quantize_4bit(drawn(*shape, dtype=dtype), quant_type="nf4", compress_statistics=False)
    found = restored(packed, state.absmax, state.code, state.blocksize, state.shape, dtype)
    assert torch.equal(found, dequantize_4bit(packed, state))


def test_a_model_that_answers_while_it_trains_has_no_second_copy_of_nf4s_scales(tiny_model):
    model = by_transformers(tiny_model, torch.float32, "nf4")
    restore_scales(model)
    model = add_adapters(model, Lora(**LORA | {"quantize": "nf4"}), seed=0)
    pairs = zip(model.get_base_model().modules(), twin(model).modules(), strict=True)
    pairs = [(one, other) for one, other in pairs if isinstance(one, Linear4bit)]
    assert pairs
    for one, other in pairs:
        assert one is not other and one.weight is other.weight and one.quant_state is other.quant_state


@pytest.mark.parametrize("quantize", ["nf4", "nf4-single"])
@pytest.mark.parametrize("shape", [(330, 128), (200, 64), (1, 7)])
def test_nf4_values_are_what_bitsandbytes_keeps(shape, quantize):
    weight = drawn(*shape)
    double = quantize == "nf4"
    kept = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=double))
    assert torch.equal(torch.cat(list(kept_values(quantize, weight.split(64)))), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(330, 128), (200, 64), (1, 7)])
def test_int8_values_are_what_bitsandbytes_keeps(shape, dtype):
    weight = drawn(*shape, dtype=dtype)
    layer = Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.weight = held = Int8Params(weight, requires_grad=False)._quantize("cpu")
    assert held.dtype == torch.int8
    found = torch.cat(list(kept_values("int8", weight.split(64))))
    assert torch.equal(found, dequantize_bnb_weight(held, layer.state).to(dtype))
    assert all(len(row.unique()) <= 255 for row in found)
    assert 0 < (found - weight).abs().max() <= weight.abs().max() / 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", get_args(Quantize))
def test_the_model_that_a_cpu_rounds_has_the_values_of_the_one_that_transformers_packs(tiny_model, dtype, quantize):
    packed = by_transformers(tiny_model, dtype, quantize)
    plain, rounded = (load_model(tiny_model, "cpu", dtype, quantize=kept) for kept in (None, quantize))
    kinds = (Linear8bitLt, Linear4bit)
    layers = {name for name, module in packed.named_modules() if isinstance(module, kinds)}
    assert layers == set(adaptable(plain))
    for name, weight in rounded.named_parameters():
        own, before = packed.get_parameter(name), plain.get_parameter(name)
        assert torch.equal(weight, dense(own, dtype))
        assert torch.equal(weight, before) == (name.removesuffix(".weight") not in layers)


def test_a_packed_layer_multiplies_by_its_restored_weight_and_takes_inputs_that_overflow_float16(tiny_model):
    packed, rounded = (
        by_transformers(tiny_model, torch.float32),
        load_model(tiny_model, "cpu", torch.float32, quantize="int8"),
    )
    multiply_restored(packed)
    x = drawn(5, 32).requires_grad_()
    for scale in (1.0, 1e6):
        out, gradients = [], []
        for model in (packed, rounded):
            out.append(model.model.layers[0].mlp.gate_proj(scale * x))
            gradients.append(torch.autograd.grad(out[-1].square().sum() / scale**2, x)[0])
        assert out[0].isfinite().all()
        torch.testing.assert_close(out[0], out[1])
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("changed", [{}, {"dropout": 1e-9}, {"method": "dora"}], ids=["fused", "dropout", "PEFT's own"])
def test_adapters_on_packed_weights_have_the_loss_and_gradients_of_those_on_rounded_ones(tiny_model, changed):
    ids = list(range(6, 40))
    rows = [{"id": "row", "input_ids": ids, "labels": [IGNORED] * 20 + ids[20:], "prompt_tokens": 20}]
    found = []
    for base in (
        by_transformers(tiny_model, torch.float32),
        load_model(tiny_model, "cpu", torch.float32, quantize="int8"),
    ):
        multiply_restored(base)
        base.set_attn_implementation("packed")
        model = add_adapters(base, Lora(**LORA | changed), seed=0).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        fuse(model)
        loss = sum(pack_loss(model.get_base_model(), piece) for piece in pack(rows, 200))
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (packed_loss, packed), (rounded_loss, rounded) = found
    assert packed_loss == pytest.approx(rounded_loss, rel=1e-5)
    for name, gradient in rounded.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [_FusedLora, _WideLora])
def test_the_products_of_adapted_layers_take_a_packed_weight(kind):
    held = Int8Params(drawn(6, 4), requires_grad=False)._quantize("cpu")
    x, down, up = drawn(10, 4), drawn(3, 4), drawn(6, 3)
    found = kind.apply(x, held, down, up, 0.5)
    torch.testing.assert_close(found, x @ dense(held, torch.float32).T + 0.5 * (x @ down.T) @ up.T)
