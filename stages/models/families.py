"""What is known of a model's family and does not stand in its configuration; whatever can be asked of the model is."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """left_alone: parts of the decoder that are neither adapted nor quantized; recorded: whether its decoder can be a
    CUDA graph; sharded: whether its layers can be gathered, and computed again, one by one."""

    left_alone: tuple[str, ...] = ()
    recorded: bool = True
    sharded: bool = True


# Of Gemma 3n, AltUp clamps one of its matrices in place while it trains, which 4-bit values do not survive, and reads
# another's weight past any adapter; its decoder makes tensors on the CPU, for which recording would have to wait; and
# some layers take keys and values of others, beside what these return.
_GEMMA3N = Family(("altup", "altup_projections", "altup_unembed_projections"), recorded=False, sharded=False)
FAMILIES = {
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3": Family(),
    "gemma3_text": Family(),
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "llama": Family(),
}


def family(model: PreTrainedModel) -> Family:
    """The model's; of one that no test has tried, what is safe."""
    return FAMILIES.get(model.config.model_type, Family(recorded=False, sharded=False))


def recordable(model: PreTrainedModel) -> bool:
    """Whether the model's decoder can be a CUDA graph: not where the rotary embedding chooses its frequencies by the
    longest row of each pass, for which transformers waits for the GPU."""
    kinds = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rope_type", "default")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]  # one, or one for each kind of layer
    return family(model).recorded and not any("dynamic" in kind or kind == "longrope" for kind in kinds)


def adaptable(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers of the language model, by their names in the whole: not the head, not what sees or hears."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    left_alone = set(family(model).left_alone)
    return {
        f"{prefix}.{name}": module
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and not left_alone & set(name.split("."))
    }
