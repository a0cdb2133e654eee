"""params.yaml's lora section in; a model with fresh, seeded adapters out, and adapters saved the same bytes twice."""

import functools
import json
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from stages.params import Lora
from stages.refusal import Refusal

CONFIG = "adapter_config.json"


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Adapters in float32, whatever the base's format: AdamW's small steps vanish in bfloat16.

    Raises Refusal where no module has a name of `lora.target_modules`.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    set_seed(seed)  # before the adapters are drawn: the Trainer seeds too late
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if "arget module" not in str(error):
            raise
        names = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        wanted = lora.target_modules
        raise Refusal(
            f"params.yaml: lora.target_modules {wanted} match nothing; there are: {', '.join(names)}"
        ) from None


class _FusedLora(torch.autograd.Function):
    """x·Wᵀ + s·(x·Aᵀ)·Bᵀ as two products into one result.

    PEFT's own line makes the product, its scaled copy and the sum one after another, each as large as the result, in
    float32 whatever the model's format, and autograd keeps more of the kind; here x and x·Aᵀ are kept.
    """

    @staticmethod
    def forward(ctx, x, weight, down, up, scaling: float):
        rows = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), up.to(x.dtype)
        inner = rows @ down.T
        out = (rows @ weight.T).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, outer):
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = outer.reshape(-1, outer.shape[-1])
        to_inner = (gradient @ up).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(to_inner, down).reshape(*outer.shape[:-1], -1)
        to_up = (gradient.T @ inner).mul_(ctx.scaling)
        return to_x, None, (to_inner.T @ rows).float(), to_up.float(), None


def fuse(model: PeftModel) -> None:
    """Let the adapters of plain linear layers train through _FusedLora; others (dropout, bias, quantized weights)
    keep PEFT's forward."""
    for layer in model.modules():
        if not isinstance(layer, peft.tuners.lora.Linear) or layer.active_adapters != ["default"]:
            continue
        base, plain = layer.get_base_layer(), isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        if type(base) is torch.nn.Linear and base.bias is None and plain and not layer.lora_variant:
            layer.forward = functools.partial(_fused_forward, layer)


def _fused_forward(layer: peft.tuners.lora.Linear, x: torch.Tensor) -> torch.Tensor:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _FusedLora.apply(x, layer.get_base_layer().weight, down, up, layer.scaling["default"])


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write weights and configuration; the configuration sorted and without the path it was trained from."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # a card that says nothing of this run
    config = json.loads((folder / CONFIG).read_text())
    config["base_model_name_or_path"] = "models/base"
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set, in another order each time
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapters of `folder` on it, for inference."""
    return PeftModel.from_pretrained(model, folder, is_trainable=False).eval()
