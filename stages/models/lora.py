"""params.yaml's lora section in; a model with fresh, seeded adapters out, and adapters saved the same bytes twice."""

import json
import tempfile
from pathlib import Path

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
