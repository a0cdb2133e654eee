"""A part of a model that keeps what goes into it alone, and is computed again on its way back."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """run(hidden), with gradients of the parameters in it whether or not what comes before needs any.

    Reentrant: the part comes again as a whole, and before anything of it goes back. PyTorch's other kind comes again
    when a kept tensor is asked for, and a packed layer's product keeps none; what it keeps comes back as another
    tensor, without its scales.
    """
    if not hidden.requires_grad:  # the first layer's
        hidden = hidden.detach().requires_grad_()
    return checkpoint(run, hidden, use_reentrant=True)
