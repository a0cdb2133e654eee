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

from stages.models.families import FAMILIES

# The norms of a model are one function to the compiler, which by default gives up at the ninth shape or surrounding.
# Since PyTorch 2.12 a setting is its thread's own, and the way back has another thread: there the limit goes with the
# function.
LIMIT = {"recompile_limit": 64}
torch._dynamo.config.recompile_limit = LIMIT["recompile_limit"]
OWN_LIMIT = LIMIT if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


@functools.cache
def any_length(function: Callable) -> Callable:
    """The function compiled for tensors [1, T, C], [T, C] or [1, T, heads, C] of any T, whose other sizes it knows:
    where a kernel does not, it reads numbers one by one, at a third of the speed."""
    # Whole rows at a time: by itself the compiler reads rows of more than 1,024 numbers twice. 3 is what its code takes
    # for that, where its comment says 2 (PyTorch 2.11 to 2.13).
    compiled = torch.compile(function, options={"triton.multi_kernel": 3}, **OWN_LIMIT)

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
    return torch.compile(function, dynamic=False, **OWN_LIMIT)


def compile_pieces(model: PreTrainedModel) -> None:
    """Have the model's norms and rotary embedding compiled, for any number of tokens."""
    for module in model.modules():
        forward = type(module).forward
        if type(module).__name__.endswith("RMSNorm"):
            added = added_to_weight(module)
            own = added is not None and not module.weight.requires_grad
            normed = functools.partial(_normed, forward, added) if own else any_length(forward)
            module.forward = types.MethodType(normed, module)
    modeling = sys.modules[type(model).__module__]
    rotary = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotary is not None and rotary.__module__ != __name__:
        # in all families that the tests try the two numbers of a pair are turned by one angle
        compiled = by_token(rotary, any_length(rotary), turned_back=model.config.model_type in FAMILIES)

        # the module's function is also that of models that answer meanwhile (lora.twin), whose shapes are others
        def apply_rotary_pos_emb(*arguments, **options):
            return (rotary if torch.is_inference_mode_enabled() else compiled)(*arguments, **options)

        modeling.apply_rotary_pos_emb = apply_rotary_pos_emb


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "eps", getattr(norm, "variance_epsilon", None))


@torch.no_grad()
def added_to_weight(norm: nn.Module) -> float | None:
    """What an RMS norm (Zhang and Sennrich 2019) of x alone adds to its weight before it multiplies by it: Gemma's 1,
    Llama's 0. None of any other, as it shows on numbers."""
    weight, epsilon = getattr(norm, "weight", None), _epsilon(norm)
    if weight is None or weight.dim() != 1 or epsilon is None:
        return None
    if len(inspect.signature(type(norm).forward).parameters) != 2:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    found, right = norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    for more in (0.0, 1.0):
        if torch.allclose(found, right * (weight.float() + more), rtol=1e-4, atol=1e-5):
            return more
    return None


class Norm(torch.autograd.Function):
    """An RMS norm of x [..., C] whose weight [C] is not trained. Autograd's own compiled pass first copies a gradient
    whose rows do not lie one behind the other, as those of layers with adapters do."""

    @staticmethod
    def forward(ctx, x, norm, forward, added):
        ctx.save_for_backward(x)
        ctx.norm, ctx.added = norm, added
        # detached: for a tensor that needs a gradient, and for a view, the compiler would make the same code again
        return any_length(forward)(norm, x.detach())

    @staticmethod
    def backward(ctx, gradient):
        return any_length(to_normed)(ctx.norm, ctx.added, ctx.saved_tensors[0], gradient), None, None, None


def to_normed(norm: nn.Module, added: float, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of x [..., C], from that of norm(x) = x·r·w, where r = 1/√(mean(x²) + ε) and w is the weight and
    what is `added` to it: with n = x·r, and g the gradient times w, (g - n·mean(g·n))·r."""
    wide = x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + _epsilon(norm))
    n, g = wide * r, gradient.float() * (norm.weight.float() + added)
    return ((g - n * (g * n).mean(-1, keepdim=True)) * r).to(x.dtype)


def _normed(forward: Callable, added: float, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _heads_first(x):
        return Norm.apply(x, norm, forward, added)
    return Norm.apply(x.transpose(1, 2), norm, forward, added).transpose(1, 2)


def _heads_first(x: torch.Tensor) -> bool:
    """Whether x is [1, heads, T, C] and lies in memory as [1, T, heads, C]."""
    return x.dim() == 4 and x.stride(1) <= x.stride(2)


class Rotary(torch.autograd.Function):
    """The rotary embedding (Su et al. 2021) of queries and keys, each [1, heads, T, C] or as `turn` takes them: each
    pair of their numbers turned by an angle, its cos and sin [1, T, C]. Their gradients are turned back, by the same
    code; autograd's own way back would be compiled apart."""

    @staticmethod
    def forward(ctx, turn, cos, sin, *heads):
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(*(x.detach() for x in heads), cos, sin)

    @staticmethod
    def backward(ctx, *gradients):
        cos, sin = ctx.saved_tensors
        found = ctx.turn(*gradients, cos, -sin)
        return None, None, None, *((found,) if isinstance(found, torch.Tensor) else found)


def by_token(rotary: Callable, compiled: Callable, turned_back: bool) -> Callable:
    """The rotary embedding of queries and keys [1, heads, T, C] that lie in memory as [1, T, heads, C], done and given
    back in that order, which attention wants too; others as they come. turned_back: whether cos and sin of the two
    numbers of a pair are the same, so that its gradients come of the angle's opposite."""
    signature = inspect.signature(rotary)
    axis = signature.parameters.get("unsqueeze_dim")

    def turn(*arguments, **options):
        heads = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim() == 4]
        told = "unsqueeze_dim" in signature.bind(*arguments, **options).arguments
        if axis is None or axis.default != 1 or told or not heads or not all(map(_heads_first, heads)):
            return compiled(*arguments, **options)
        laid = (x.transpose(1, 2) if any(x is one for one in heads) else x for x in arguments)
        out = compiled(*laid, **options, unsqueeze_dim=2)
        return out.transpose(1, 2) if isinstance(out, torch.Tensor) else tuple(x.transpose(1, 2) for x in out)

    if not turned_back:
        return turn
    count = list(signature.parameters).index("cos")

    def turned(*arguments, **options):
        if len(arguments) != count + 2:  # more than heads, cos and sin, or these by name
            return turn(*arguments, **options)
        *heads, cos, sin = arguments
        return Rotary.apply(functools.partial(turn, **options), cos, sin, *heads)

    return turned
