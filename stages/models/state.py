"""What training holds in memory, as tensors by name, and those tensors back in their places.

The adapters' values are copied into the tensors that there are, since CUDA graphs and optimizer refer to those.
"""

import torch
from torch.optim import Optimizer


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapters."""
    return {f"adapter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trained(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in trained(model).items():
        parameter.copy_(tensors[name])


def moments(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of each parameter; Adam: how many steps, and two moments."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": value for number, state in states.items() for name, value in state.items()}


def restore_moments(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in tensors.items():
        kind, _, rest = path.partition(".")
        if kind == "optimizer":
            number, name = rest.split(".")
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's random numbers stand; dropout draws from them, and training from no other."""
    found = {"generator.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["generator.cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_generators(device: torch.device, tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["generator.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)
