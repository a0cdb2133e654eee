"""What training holds in memory, as tensors by name, and those tensors back in their places.

The adapters' values are copied into the tensors that there are, since CUDA graphs and optimizer refer to those.
"""

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.optim import Optimizer

CODES = ("qmap1", "qmap2")  # what bitsandbytes' bytes stand for: the same for all, always


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapters."""
    return {f"adapter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trained(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in trained(model).items():
        parameter.copy_(tensors[name])


def best(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a checkpoint's tensors the adapters at the best validation, called as `trained` calls them."""
    return {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}


def moments(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of each parameter; Adam: how many steps, and two moments."""
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)  # bitsandbytes counts steps in Python
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if name not in CODES
    }


def restore_moments(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in tensors.items():
        kind, _, rest = path.partition(".")
        if kind == "optimizer":
            number, name = rest.split(".")
            states.setdefault(int(number), {})[name] = value
    bare = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if isinstance(bare, Optimizer8bit):
        _restore_8bit(bare, states)
    else:
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore_8bit(optimizer: Optimizer8bit, states: dict[int, dict[str, torch.Tensor]]) -> None:
    """Fill tensors that bitsandbytes has made: its `load_state_dict` would not page them."""
    optimizer.check_overrides()  # of some parameters it keeps 32 bits
    numbers = iter(range(len(_parameters(optimizer))))
    for place, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            saved = states.get(next(numbers))
            if saved:
                optimizer.init_state(group, parameter, place, index)
                optimizer.state[parameter]["step"] = int(saved.pop("step"))
                for name, value in saved.items():
                    optimizer.state[parameter][name].copy_(value)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
