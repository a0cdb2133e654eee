"""A model's folder in; the model without its weights out, and where in the files each of them lies."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from stages.models import towers
from stages.models.load import load_model
from stages.models.shards import DTYPES, Stored, stored_model


class Uncovered(Exception):
    """Why this model must be read, or merged, whole."""


@dataclass(frozen=True)
class Unloaded:
    """A model without its weights, and where they are.

    tensors: its own, by their names on the disk, which are those in the files; files: the places of these; on_disk: the
    name there of each in the model, of tied ones once; sources: all places, by all names in the model.
    """

    model: PreTrainedModel
    tensors: dict[str, torch.Tensor]
    files: dict[str, Stored]
    on_disk: dict[str, str]
    sources: dict[str, Stored]


def unloaded(folder: Path, dtype: torch.dtype) -> Unloaded:
    """Look at names and shapes alone; raises Uncovered."""
    model = load_model(folder, "meta", dtype)
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    names = {id(tensor): name for name, tensor in state.items()}
    tensors = revert_weight_conversion(model, state)
    files = stored_model(folder)
    if any(id(tensor) not in names for tensor in tensors.values()):
        raise Uncovered("the base's files hold its tensors in another form")
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {n: p.shape for n, p in files.items()}:
        raise Uncovered("the base's files hold other tensors than the model")
    if strange := {place.dtype for place in files.values()} - set(DTYPES):
        raise Uncovered(f"the base's files hold {min(strange)}")
    on_disk = {names[id(tensor)]: name for name, tensor in tensors.items()}
    sources = {name: files[found] for name, found in on_disk.items()}
    for same in uses(model).values():
        (found,) = [on_disk[name] for name in same if name in on_disk]
        sources |= dict.fromkeys(same, files[found])
    return Unloaded(model, tensors, files, on_disk, sources)


def uses(model: torch.nn.Module) -> dict[int, list[str]]:
    """Of each weight, by its id, all its names."""
    found = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        found[id(weight)].append(name)
    return found


def give_buffers(model: PreTrainedModel, parameters: set[str], folder: Path, device: str) -> None:
    """Compute what no file holds, as the angles of rotary embeddings, on the model without weights. parameters: the
    names of what the files hold; raises Uncovered where a buffer is among them."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with towers.unseen(folder, config), init_empty_weights(include_buffers=False):
        whole = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    for name, buffer in whole.named_buffers():
        if name in parameters:
            raise Uncovered(f"{name} is no parameter")
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_buffer(leaf, buffer.to(device), persistent=False)
