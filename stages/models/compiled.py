"""A model's small pieces, its norms and rotary embedding, on a GPU: one pass over memory each way, where PyTorch's own
operations make up to eight."""

import functools
import inspect
import sys
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

# the norms of a model are one function to the compiler, which by default gives up at the ninth shape or surrounding
torch._dynamo.config.recompile_limit = 64


@functools.cache
def any_length(function: Callable) -> Callable:
    """The function compiled for tensors [1, T, C], [T, C] or [1, T, heads, C] of any T, whose other sizes it knows:
    where a kernel does not, it reads numbers one by one, at a third of the speed."""
    # Whole rows at a time: by itself the compiler reads rows of more than 1,024 numbers twice. 3 is what its code takes
    # for that, where its comment says 2 (PyTorch 2.11 to 2.13).
    compiled = torch.compile(function, options={"triton.multi_kernel": 3})

    def called(*arguments, **options):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                leading = argument.shape[:-1]
                torch._dynamo.maybe_mark_dynamic(argument, leading.index(max(leading)))
        return compiled(*arguments, **options)

    return called


@functools.cache
def any_weight(function: Callable) -> Callable:
    """The function compiled for weights, anew for each shape: a model has few."""
    return torch.compile(function, dynamic=False)


def compile_pieces(model: PreTrainedModel) -> None:
    """Have the model's norms and rotary embedding compiled, for any number of tokens."""
    for module in model.modules():
        forward = type(module).forward
        if type(module).__name__.endswith("RMSNorm"):
            alone = len(inspect.signature(forward).parameters) == 2  # of nothing but x
            frozen = not any(weight.requires_grad for weight in module.parameters())
            compiled = functools.partial(_normed, forward) if alone and frozen else any_length(forward)
            module.forward = types.MethodType(compiled, module)
    modeling = sys.modules[type(model).__module__]
    rotary = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotary is not None and rotary.__module__ != __name__:
        compiled = by_token(rotary, any_length(rotary))

        # the module's function is also that of models that answer meanwhile (lora.twin), whose shapes are others
        def apply_rotary_pos_emb(*arguments, **options):
            return (rotary if torch.is_inference_mode_enabled() else compiled)(*arguments, **options)

        modeling.apply_rotary_pos_emb = apply_rotary_pos_emb


class Norm(torch.autograd.Function):
    """A norm whose weight is not trained. Autograd's own compiled pass first copies a gradient whose rows do not lie
    one behind the other, as those of layers with adapters do."""

    @staticmethod
    def forward(ctx, x, norm, forward):
        ctx.save_for_backward(x)
        ctx.norm, ctx.norm_forward = norm, forward
        # detached: for a tensor that needs a gradient, and for a view, the compiler would make the same code again
        return any_length(forward)(norm, x.detach())

    @staticmethod
    def backward(ctx, gradient):
        return any_length(to_normed)(ctx.norm_forward, ctx.norm, ctx.saved_tensors[0], gradient), None, None


def to_normed(forward: Callable, norm: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of x, from that of forward(norm, x)."""
    return torch.func.vjp(functools.partial(forward, norm), x)[1](gradient)[0]


def _normed(forward: Callable, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _heads_first(x):
        return Norm.apply(x, norm, forward)
    return Norm.apply(x.transpose(1, 2), norm, forward).transpose(1, 2)


def _heads_first(x: torch.Tensor) -> bool:
    """Whether x is [1, heads, T, C] and lies in memory as [1, T, heads, C]."""
    return x.dim() == 4 and x.stride(1) <= x.stride(2)


def by_token(rotary: Callable, compiled: Callable) -> Callable:
    """The rotary embedding of queries and keys [1, heads, T, C] that lie in memory as [1, T, heads, C], done and given
    back in that order, which attention wants too; others as they come."""
    signature = inspect.signature(rotary)
    axis = signature.parameters.get("unsqueeze_dim")

    def called(*arguments, **options):
        heads = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim() == 4]
        told = "unsqueeze_dim" in signature.bind(*arguments, **options).arguments
        if axis is None or axis.default != 1 or told or not heads or not all(map(_heads_first, heads)):
            return compiled(*arguments, **options)
        turned = (x.transpose(1, 2) if any(x is one for one in heads) else x for x in arguments)
        out = compiled(*turned, **options, unsqueeze_dim=2)
        return out.transpose(1, 2) if isinstance(out, torch.Tensor) else tuple(x.transpose(1, 2) for x in out)

    return called
