"""Weights of fewer bits, by bitsandbytes: packed, as a GPU holds them, or rounded to the values that are kept."""

import types
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.functional import (
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, PreTrainedModel

from stages.models.compiled import any_weight
from stages.models.families import adaptable

DOUBLE = {"nf4": True, "nf4-single": False}  # of 4 bits, whether their scales are quantized too


def packing(config: transformers.PretrainedConfig, quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What lets transformers pack the weights of the language model's linear layers, the head apart, as it loads
    them."""
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    kept = set(adaptable(empty))
    left_alone = [n for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and n not in kept]
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_alone)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=DOUBLE[quantize],
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_alone,
    )


def multiply_restored(model: PreTrainedModel) -> None:
    """Let layers of 8-bit weights multiply by the restored weight. bitsandbytes' own product rounds its inputs to 8
    bits too, by way of float16, which those of Gemma 3 overflow; and a merged model does neither."""
    for layer in model.modules():
        if type(layer) is Linear8bitLt:
            layer.forward = types.MethodType(_forward, layer)


@torch.no_grad()
def restore_scales(model: PreTrainedModel) -> None:
    """Restore the scales of nf4, which are quantized themselves, once and not before every product: the weights keep
    their values, and take 4.5 bits in place of 4.1."""
    for layer in model.modules():
        state = getattr(layer.weight, "quant_state", None) if isinstance(layer, Linear4bit) else None
        if state is not None and state.nested:
            state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None


@torch.no_grad()
def hold_packed(layer: torch.nn.Linear, weight: torch.Tensor, quantize: str) -> None:
    """Give the layer `weight` packed, the bytes that transformers' layers would hold, on a CPU too; it multiplies by
    the restored weight."""
    if quantize in DOUBLE:
        values, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=DOUBLE[quantize])
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
        layer.weight.quant_state = state
    else:
        values, scales, _ = int8_vectorwise_quant(weight.half())
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
        layer.weight.SCB = scales
    layer.forward = types.MethodType(_forward, layer)


class _Product(torch.autograd.Function):
    """x·Wᵀ; W is restored again on the way back, where autograd would keep it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, dense(weight, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ dense(ctx.weight, gradient.dtype), None


def _forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product = _Product.apply(x, layer.weight)
    return product if layer.bias is None else product + layer.bias


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a product takes it: a packed one restored."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        if weight.is_cuda and not state.nested:
            return any_weight(restored)(weight.data, state.absmax, state.code, state.blocksize, state.shape, dtype)
        return dequantize_4bit(weight, state)
    if (scales := getattr(weight, "SCB", None)) is not None:
        return int8_vectorwise_dequant(weight.data, scales).to(dtype)
    return weight


def restored(
    packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor, block: int, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """dequantize_4bit, bit for bit; compiled, in 0.6 of its time on an H200. packed: two values in each byte; scales:
    of each `block` values; code: what the 16 values stand for."""
    place = torch.arange(2 * packed.numel(), device=packed.device)
    value = (packed.flatten()[place // 2].int() >> (4 - 4 * (place % 2))) & 15
    return (code[value] * scales[place // block]).to(dtype).reshape(shape)


@torch.no_grad()
def round_weights(model: PreTrainedModel, quantize: str) -> None:
    """Give each weight of the language model's linear layers, the head apart, the values that `quantize` keeps."""
    for module in adaptable(model).values():
        (value,) = kept_values(quantize, [module.weight.data])
        module.weight.copy_(value)


def as_one_block(quantize: str, columns: int) -> bool:
    """Whether rows of so many elements are rounded otherwise where others stand before them: nf4's 64 go across."""
    return quantize in DOUBLE and columns % 64 != 0


def kept_values(quantize: str, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A weight's blocks of rows with the values that are kept of them; `as_one_block` says when it must be one.
    quantize: one of params.Quantize."""
    return int8_values(blocks) if quantize == "int8" else nf4_values(blocks, DOUBLE[quantize])


def nf4_values(blocks: Iterable[torch.Tensor], double: bool) -> Iterator[torch.Tensor]:
    """NormalFloat4 (Dettmers et al. 2023, "QLoRA"); with double quantization the scales of each 64 elements are
    themselves quantized over the weight as a whole."""
    if not double:
        yield from (dequantize_4bit(*quantize_4bit(block, quant_type="nf4")) for block in blocks)
        return
    packed, states = zip(*(quantize_4bit(block, quant_type="nf4") for block in blocks), strict=True)
    scales = torch.cat([state.absmax for state in states])
    mean = scales.mean()
    scales = dequantize_blockwise(*quantize_blockwise(scales - mean, blocksize=256)) + mean
    for part, state, own in zip(packed, states, scales.split([len(state.absmax) for state in states]), strict=True):
        state.absmax = own
        yield dequantize_4bit(part, state)


def int8_values(blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Whole multiples of a 127th of the row's largest, taken of the weight in float16 (Dettmers et al. 2022,
    "LLM.int8()", section 2)."""
    for block in blocks:
        values, scales, _ = int8_vectorwise_quant(block.half())
        yield int8_vectorwise_dequant(values, scales).to(block.dtype)
