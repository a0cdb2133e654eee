"""params.yaml's lora section in; a model with fresh, seeded adapters out, and adapters saved the same bytes twice."""

import copy
import json
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from stages.models.families import adaptable
from stages.params import Lora
from stages.refusal import Refusal

CONFIG = "adapter_config.json"
# params.yaml's names, as PEFT calls them; PiSSA's decomposition by 16 rounds of subspace iteration, in seconds
INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa_niter_16", "olora": "olora"}


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """Adapters in float32, whatever the base's format: AdamW's small steps vanish in bfloat16.

    tokens: whose rows of the embedding and of the head are trained too, those of `lora.trainable_tokens`.

    Where embedding and head are one matrix, they stay one: what is trained of one is trained of the other.

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
        **_words(model, lora.modules_to_save, tokens),
    )
    set_seed(seed)  # before the adapters are drawn: the Trainer seeds too late
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.forward = types.MethodType(_in_format, module)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.init in ("pissa", "olora"):  # which took out of the base what they put into the adapters
        adapted.begun_from = tempfile.TemporaryDirectory()
        adapted.save_pretrained(adapted.begun_from.name)
    return adapted


def twin(model: PeftModel) -> PreTrainedModel:
    """The model and its adapters once more, on the same weights: to be run while the one is trained, whatever is then
    changed of its layers' functions and of its configuration."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    states = [getattr(module, "quant_state", None) for module in model.modules()]  # with nf4's scales
    shared |= {id(state): state for state in states if state is not None}
    return copy.deepcopy(model, shared).get_base_model().eval()


def _words(model: PreTrainedModel, whole: Sequence[str], tokens: Sequence[int]) -> dict:
    """What PEFT's configuration says of embedding and head, by their whole names: others are called alike."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = embedding.weight is head.weight
    if whole:
        chosen = [embedding] if tied else [embedding] * ("embed_tokens" in whole) + [head] * ("lm_head" in whole)
        return {"modules_to_save": [names[module] for module in chosen], "ensure_weight_tying": tied}
    if tokens:
        return {
            "trainable_token_indices": {
                names[one]: list(tokens) for one in ([embedding] if tied else [embedding, head])
            }
        }
    return {}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The numbers of tokens, each once, in order; raises Refusal where a text is not one token."""
    vocabulary = tokenizer.get_vocab()
    for text in texts:
        if text not in vocabulary:
            pieces = ", ".join(map(repr, tokenizer.tokenize(text)))
            raise Refusal(
                f"params.yaml: lora.trainable_tokens {text!r} is no token of this model, but {pieces}; name those"
            )
    return sorted({vocabulary[text] for text in texts})


def _in_format(wrapper: ModulesToSaveWrapper, x: torch.Tensor) -> torch.Tensor:
    """Compute with the trained weight as it will be merged, in the base's format."""
    module = wrapper.modules_to_save["default"]
    weight = module.weight.to(wrapper.original_module.weight.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def embedding_trained(model: PeftModel) -> bool:
    """Whether the embedding is trained, or some of its rows: PEFT then does what no CUDA graph can record."""
    return isinstance(model.get_base_model().get_input_embeddings(), AuxiliaryTrainingWrapper)


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
