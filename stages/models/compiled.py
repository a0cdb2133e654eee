"""A function of tensors in; on a GPU, the same as one pass over memory out, for any number of tokens."""

import functools
from collections.abc import Callable

import torch

# the norms of a model are one function to the compiler, which by default gives up at the ninth shape or surrounding
torch._dynamo.config.recompile_limit = 64


@functools.cache
def any_length(function: Callable) -> Callable:
    """The function compiled for tensors [1, T, C], [T, C] or [1, heads, T, C] of any T, whose other sizes it knows:
    where a kernel does not, it reads numbers one by one, at a third of the speed."""
    compiled = torch.compile(function)

    def called(*arguments, **options):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                leading = argument.shape[:-1]
                torch._dynamo.maybe_mark_dynamic(argument, leading.index(max(leading)))
        return compiled(*arguments, **options)

    return called
