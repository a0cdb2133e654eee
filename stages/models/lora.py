"""params.yaml's lora section in; a model with fresh, seeded adapters out, and adapters saved the same bytes twice."""

import functools
import json
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from stages.models.families import adaptable
from stages.params import Lora
from stages.refusal import Refusal

CONFIG = "adapter_config.json"
# params.yaml's names, as PEFT calls them; PiSSA's decomposition by 16 rounds of subspace iteration, in seconds
INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa_niter_16", "olora": "olora"}


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Adapters in float32, whatever the base's format: AdamW's small steps vanish in bfloat16.

    Raises Refusal where a name of `lora.target_modules` is that of no linear layer of the language model.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.target_modules),
        use_rslora=lora.method == "rslora",
        use_dora=lora.method == "dora",
        init_lora_weights=INIT[lora.init],
        task_type="CAUSAL_LM",
    )
    set_seed(seed)  # before the adapters are drawn: the Trainer seeds too late
    adapted = get_peft_model(model, config)
    if lora.init in ("pissa", "olora"):  # which took out of the base what they put into the adapters
        adapted.begun_from = tempfile.TemporaryDirectory()
        adapted.save_pretrained(adapted.begun_from.name)
    return adapted


def targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """What PEFT is to adapt: the language model's linear layers, all or those that are called as `wanted` says; whole
    names where others, those of an image tower, are called the same."""
    linear = adaptable(model)
    there = sorted({name.rsplit(".", 1)[-1] for name in linear})
    names = there if wanted == "all-linear" else sorted(set(wanted))
    for one in names:
        if not any(_called(name, [one]) for name in linear):
            raise Refusal(f"params.yaml: lora.target_modules {one!r} matches nothing; there are: {', '.join(there)}")
    chosen = sorted(name for name in linear if _called(name, names))
    return names if chosen == sorted(name for name, _ in model.named_modules() if _called(name, names)) else chosen


def _called(module: str, names: list[str]) -> bool:
    """Whether the module's whole name ends as PEFT asks of one in `target_modules`."""
    return f".{module}".endswith(tuple(f".{name}" for name in names))


class _FusedLora(torch.autograd.Function):
    """x·Wᵀ + s·(x·Aᵀ)·Bᵀ as two products into one result.

    PEFT's own line makes the product, its scaled copy and the sum one after another, each as large as the result, in
    float32 whatever the model's format, and autograd keeps more of the kind; here x and x·Aᵀ are kept.
    """

    @staticmethod
    def forward(ctx, rows, weight, down, up, scaling: float):
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        inner = rows @ down.T
        out = (rows @ dense(weight).T).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, down, up, inner = ctx.saved_tensors
        to_inner = (gradient @ up).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ dense(weight)).addmm_(to_inner, down)
        to_up = (gradient.T @ inner).mul_(ctx.scaling)
        return to_x, None, (to_inner.T @ rows).float(), to_up.float(), None


class _WideLora(torch.autograd.Function):
    """The same as one product, [x, x·Aᵀ]·[W, s·B]ᵀ.

    Where a layer widens, adding the adapter's part to the result, as _FusedLora does, costs a pass over the larger
    tensor; here it costs r more columns of the product. W and s·B are copied side by side each time: with the
    thousands of tokens that a GPU takes at once, under a hundredth of the time.
    """

    @staticmethod
    def forward(ctx, rows, weight, down, up, scaling: float):
        down = down.to(rows.dtype)
        inner = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return torch.cat((rows, inner), dim=1) @ _beside(weight, up, scaling).T

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, down, up, inner = ctx.saved_tensors
        to_both = gradient @ _beside(weight, up, ctx.scaling)
        to_inner = to_both[:, rows.shape[1] :]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.addmm(to_both[:, : rows.shape[1]], to_inner, down)
        to_up = (gradient.T @ inner).float() * ctx.scaling
        return to_x, None, (to_inner.T @ rows).float(), to_up, None


def _beside(weight: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """[W, s·B]: [out, in + r]."""
    weight = dense(weight)
    return torch.cat((weight, (up * scaling).to(weight.dtype)), dim=1)


def dense(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a product takes it: a quantized one de-quantized."""
    state = getattr(weight, "quant_state", None)
    return weight if state is None else dequantize_4bit(weight, state)


def fuse(model: PeftModel) -> None:
    """Let the adapters of plain linear layers train through _FusedLora or _WideLora, and on a GPU compute an MLP's
    act(gate)·up in one pass; others (dropout, bias, DoRA) keep PEFT's forward."""
    cuda = model.device.type == "cuda"
    for layer in model.modules():
        if _is_plain(layer):
            wide = cuda and layer.out_features > layer.in_features
            layer.forward = types.MethodType(_wide_forward if wide else _fused_forward, layer)
    for module in model.modules() if cuda else ():
        if _is_gated(module, model.device, model.dtype):
            module.forward = types.MethodType(_gated_forward, module)


def _is_plain(layer: torch.nn.Module | None) -> bool:
    if not isinstance(layer, peft.tuners.lora.LoraLayer) or layer.active_adapters != ["default"]:
        return False
    base, dropout = layer.get_base_layer(), layer.lora_dropout["default"]
    kinds = (torch.nn.Linear, Linear4bit)
    return (
        type(base) in kinds and base.bias is None and isinstance(dropout, torch.nn.Identity) and not layer.lora_variant
    )


@torch.no_grad()
def _is_gated(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the module computes down(act(gate(x))·up(x)), as most MLPs do, and nothing more: tried on numbers."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    x = torch.randn(4, module.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))


def _factors(layer: peft.tuners.lora.LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.get_base_layer().weight, down, up, layer.scaling["default"]


def _by_rows(
    product: type[torch.autograd.Function], layer: peft.tuners.lora.LoraLayer, x: torch.Tensor
) -> torch.Tensor:
    """x: [..., in]. Shaped out here, since Gemma 3n scales one such result in place, which autograd forbids where the
    function itself returns a view."""
    return product.apply(x.reshape(-1, x.shape[-1]), *_factors(layer)).reshape(*x.shape[:-1], -1)


def _fused_forward(layer: peft.tuners.lora.LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return _by_rows(_FusedLora, layer, x)


def _wide_forward(layer: peft.tuners.lora.LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return _by_rows(_WideLora, layer, x)


def _gated_forward(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_compiled_gate()(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))


@functools.cache
def _compiled_gate() -> Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(lambda act, gate, up: act(gate) * up, dynamic=True)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write weights and configuration; the configuration sorted and without the path it was trained from. What began
    from the base's own directions is saved as its difference to that beginning, of twice the rank, so that it fits the
    base as it is."""
    begun = getattr(model, "begun_from", None)
    model.save_pretrained(
        folder, safe_serialization=True, path_initial_model_for_weight_conversion=begun and begun.name
    )
    (folder / "README.md").unlink(missing_ok=True)  # a card that says nothing of this run
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = "models/base"
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set, in another order each time
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapters of `folder` on it, for inference."""
    return PeftModel.from_pretrained(model, folder, is_trainable=False).eval()
