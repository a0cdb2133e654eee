"""The image tower of a Gemma 3n checkpoint: its weights, to be saved again as they are, without the code to run it.

transformers takes that code from timm, which brings torchvision, a package per build of torch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.models.gemma3n import modeling_gemma3n

PREFIX = "model.vision_tower."


class Tower(nn.Module):
    """Parameters of those names and shapes."""

    def __init__(self, shapes: dict[str, list[int]]):
        super().__init__()
        for name, shape in shapes.items():
            holder: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder._modules[part]
            holder.register_parameter(last, nn.Parameter(torch.empty(shape), requires_grad=False))


def shapes(folder: Path) -> dict[str, list[int]]:
    """Of the image tower's tensors in the safetensors of `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
            found |= {name.removeprefix(PREFIX): file.get_slice(name).get_shape() for name in names}
    return found


@contextlib.contextmanager
def unseen(folder: Path, config: PretrainedConfig) -> Iterator[None]:
    """While the block runs, the model of `folder`, if it is a Gemma 3n, gets a Tower for its image tower."""
    if config.model_type != "gemma3n":
        yield
        return
    with instead(shapes(folder)):
        yield


@contextlib.contextmanager
def instead(shapes: dict[str, list[int]]) -> Iterator[None]:
    """While the block runs, every Gemma 3n gets a Tower for its image tower."""

    def from_config(config, **options) -> nn.Module:
        return Tower(shapes) if config.model_type == "gemma3n_vision" else original.from_config(config, **options)

    original = modeling_gemma3n.AutoModel
    modeling_gemma3n.AutoModel = SimpleNamespace(from_config=from_config)
    try:
        yield
    finally:
        modeling_gemma3n.AutoModel = original
