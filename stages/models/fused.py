"""A model with adapters in; on the way out the same sums in fewer passes over memory.

PEFT writes an adapted layer as three products and two sums, transformers an MLP as four passes over its widest tensors;
on a GPU those passes take longer than the products.
"""

import functools
import math
import types
from collections.abc import Callable, Sequence

import peft
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers.activations import GELUTanh, SiLUActivation

from stages.models.compiled import any_length, any_weight
from stages.models.families import FAMILIES
from stages.models.quantized import dense


class _FusedLora(torch.autograd.Function):
    """x·Wᵀ + s·(x·Aᵀ)·Bᵀ as two products into one result.

    PEFT's own line makes the product, its scaled copy and the sum one after another, each as large as the result, in
    float32 whatever the model's format, and autograd keeps more of the kind; here x and x·Aᵀ are kept.
    """

    @staticmethod
    def forward(ctx, rows, weight, down, up, scaling: float):
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        inner = rows @ down.T
        out = (rows @ dense(weight, rows.dtype).T).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, down, up, inner = ctx.saved_tensors
        to_inner = (gradient @ up).mul_(ctx.scaling)
        to_x = _to_wide(gradient, to_inner, weight, down) if ctx.needs_input_grad[0] else None
        to_up = _of_tokens(gradient, inner).mul_(ctx.scaling)
        return to_x, None, _of_tokens(to_inner, rows), to_up, None


def _of_tokens(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gradientᵀ·x in float32, as adapters are: [out, in] of [T, out] and [T, in]."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(gradient.T, x, out_dtype=torch.float32)  # which a CPU does not know
    return (gradient.T @ x).float()


class _DroppedLora(torch.autograd.Function):
    """x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ, drop as torch.nn.Dropout.

    PEFT's line keeps of each adapter a copy of x in float32 and which of its elements were dropped; here x, which
    adapters of one input share, and a byte for each element are kept, and drop(x) is made again.
    """

    @staticmethod
    def forward(ctx, rows, weight, down, up, scaling: float, chance: float):
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        dropped, kept = torch.native_dropout(rows, chance, True)
        inner = dropped @ down.T
        out = (rows @ dense(weight, rows.dtype).T).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, inner, kept)
        ctx.scaling, ctx.more = scaling, 1 / (1 - chance)
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, down, up, inner, kept = ctx.saved_tensors
        to_inner = (gradient @ up).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _of(add_kept, rows)(gradient @ dense(weight, gradient.dtype), to_inner @ down, kept, ctx.more)
        to_up = _of_tokens(gradient, inner).mul_(ctx.scaling)
        dropped = _of(kept_of, rows)(rows, kept, ctx.more)
        return to_x, None, _of_tokens(to_inner, dropped), to_up, None, None


def kept_of(x: torch.Tensor, kept: torch.Tensor, more: float) -> torch.Tensor:
    """x where it is kept, so many times; else 0."""
    return x * kept * more


def add_kept(total: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, more: float) -> torch.Tensor:
    return total + x * kept * more


class _WideLora(torch.autograd.Function):
    """The same as one product, [x, x·Aᵀ]·[W, s·B]ᵀ.

    Where a layer widens, adding the adapter's part to the result, as _FusedLora does, costs a pass over the larger
    tensor; here it costs r more columns of the product. W and s·B are copied side by side each time: with the
    thousands of tokens that a GPU takes at once, under a hundredth of the time.
    """

    @staticmethod
    def forward(ctx, rows, weight, down, up, scaling: float):
        down = down.to(rows.dtype)
        inner = rows @ down.T
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return torch.cat((rows, inner), dim=1) @ _beside([weight], [up], [scaling], rows.dtype).T

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, down, up, inner = ctx.saved_tensors
        to_both = gradient @ _beside([weight], [up], [ctx.scaling], gradient.dtype)
        to_inner = to_both[:, rows.shape[1] :]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = to_both[:, : rows.shape[1]].addmm_(to_inner, down)
        to_up = _of_tokens(gradient, inner).mul_(ctx.scaling)
        return to_x, None, _of_tokens(to_inner, rows), to_up, None


def _beside(
    weights: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """beside() of weights as they are held. In tuples: for lists the compiler makes the same code again."""
    held = tuple(dense(weight, dtype) for weight in weights)
    return _of(beside, ups[0], any_weight)(held, tuple(ups), tuple(scalings))


def beside(weights: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scalings: Sequence[float]) -> torch.Tensor:
    """[W, s·B]: [out, in + r]; of several layers one below the other, each s·B in columns of its own, 0 elsewhere."""
    scaled = [(up * scaling).to(weights[0].dtype) for up, scaling in zip(ups, scalings, strict=True)]
    return torch.cat((torch.cat(weights), torch.block_diag(*scaled)), dim=1)


class _GatedLora(torch.autograd.Function):
    """down(act(gate(x))·up(x)) of three adapted layers, gate and up as _WideLora, down as _FusedLora.

    What gate and up share, x and its gradient, is read and written once. act(gate)·up is made again on the way back:
    where it is kept, a layer of Gemma 3 keeps a quarter more.
    """

    @staticmethod
    def forward(ctx, rows, kind, scalings, *factors):
        """scalings: of gate, up and down; factors: of each W, A and B."""
        weights, (gate_a, up_a, down_a), (gate_b, up_b, down_b) = (factors[start::3] for start in range(3))
        both_a, down_a, down_b = (x.to(rows.dtype) for x in (torch.cat((gate_a, up_a)), down_a, down_b))
        inner = rows @ both_a.T
        wide = torch.cat((rows, inner), dim=1)
        both = _beside(weights[:2], (gate_b, up_b), scalings[:2], rows.dtype)
        gate, up = (wide @ part.T for part in both.split(len(gate_b)))
        del both
        hidden = _of(gated, gate)(gate, up, kind)
        narrow = hidden @ down_a.T
        ctx.save_for_backward(rows, inner, gate, up, narrow, both_a, down_a, gate_b, up_b, down_b)
        ctx.weights, ctx.scalings, ctx.kind = weights, scalings, kind
        return (hidden @ dense(weights[2], rows.dtype).T).addmm_(narrow, down_b.T, alpha=scalings[2])

    @staticmethod
    def backward(ctx, gradient):
        rows, inner, gate, up, narrow, both_a, down_a, gate_b, up_b, down_b = ctx.saved_tensors
        weights, scalings, dtype = ctx.weights, ctx.scalings, rows.dtype
        first = gate_b.shape[1]
        to_narrow = (gradient @ down_b).mul_(scalings[2])
        to_down_b = _of_tokens(gradient, narrow).mul_(scalings[2])
        to_gate = _to_wide(gradient, to_narrow, weights[2], down_a)  # at first that of act(gate)·up
        to_up, hidden = _of(gated_again, gradient)(to_gate, gate, up, ctx.kind)
        to_down_a = _of_tokens(to_narrow, hidden)
        del hidden
        of_gate, of_up = _beside(weights[:2], (gate_b, up_b), scalings[:2], dtype).split(len(gate_b))
        to_both = (to_gate @ of_gate).addmm_(to_up, of_up)
        del of_gate, of_up
        to_inner = to_both[:, rows.shape[1] :]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = to_both[:, : rows.shape[1]].addmm_(to_inner, both_a)
        to_both_a = _of_tokens(to_inner, rows)
        to_gate_b = _of_tokens(to_gate, inner[:, :first]).mul_(scalings[0])
        to_up_b = _of_tokens(to_up, inner[:, first:]).mul_(scalings[1])
        to_gate_a, to_up_a = to_both_a[:first], to_both_a[first:]
        return to_x, None, None, None, to_gate_a, to_gate_b, None, to_up_a, to_up_b, None, to_down_a, to_down_b


def _to_wide(gradient: torch.Tensor, to_inner: torch.Tensor, weight: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """gradient·W + to_inner·A, [T, in] of [T, out] and [T, r]: on a GPU one product, as _WideLora."""
    if gradient.is_cuda and gradient.shape[1] < down.shape[1]:
        return torch.cat((gradient, to_inner), dim=1) @ torch.cat((dense(weight, down.dtype), down))
    return (gradient @ dense(weight, gradient.dtype)).addmm_(to_inner, down)


class _GroupedLora(torch.autograd.Function):
    """Several adapted layers of one input as one product: [out of the first, of the second, …] side by side.

    x and its gradient are read and written once, and layers that are too narrow to fill a GPU fill it together.
    """

    @staticmethod
    def forward(ctx, rows, scalings, *factors):
        """scalings: of each layer; factors: of each W, A and B."""
        weights, downs, ups = factors[::3], factors[1::3], factors[2::3]
        down = torch.cat(downs).to(rows.dtype)
        inner = rows @ down.T
        ctx.save_for_backward(rows, inner, down, *weights, *ups)
        ctx.scalings = scalings
        return torch.cat((rows, inner), dim=1) @ _beside(weights, ups, scalings, rows.dtype).T

    @staticmethod
    def backward(ctx, gradient):
        rows, inner, down, *saved = ctx.saved_tensors
        weights, ups = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        to_both = gradient @ _beside(weights, ups, ctx.scalings, gradient.dtype)
        to_inner = to_both[:, rows.shape[1] :]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = to_both[:, : rows.shape[1]].addmm_(to_inner, down)
        to_down = _of_tokens(to_inner, rows)
        to_all_ups = _of_tokens(gradient, inner)
        found, row, column = [], 0, 0
        for up, scaling in zip(ups, ctx.scalings, strict=True):
            out, rank = up.shape
            to_up = to_all_ups[row : row + out, column : column + rank] * scaling
            found += [None, to_down[column : column + rank], to_up]
            row, column = row + out, column + rank
        return to_x, None, *found


class _Group:
    """Adapted layers of one input: whichever is asked first computes all, the others hand out their parts."""

    def __init__(self, layers: list[peft.tuners.lora.LoraLayer]):
        self.layers = layers
        self.x: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x or number not in self.parts:
            factors = [_factors(layer) for layer in self.layers]
            scalings = tuple(layer[3] for layer in factors)
            whole = _GroupedLora.apply(
                x.reshape(-1, x.shape[-1]), scalings, *(f for layer in factors for f in layer[:3])
            )
            whole = whole.reshape(*x.shape[:-1], -1)
            *parts, last = whole.split([layer.out_features for layer in self.layers], dim=-1)
            # values are kept for the way back, and would keep queries and keys with them
            self.x, self.parts = x, dict(enumerate([*parts, last.contiguous()]))
        part = self.parts.pop(number)
        if not self.parts:
            self.x = None
        bias = self.layers[number].get_base_layer().bias
        return part if bias is None else part + bias


class _Gated(torch.autograd.Function):
    """act(gate)·up in one pass over memory each way."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _of(gated, gate)(gate, up, kind)

    @staticmethod
    def backward(ctx, gradient):
        return *_of(gated_backward, gradient)(gradient, *ctx.saved_tensors, ctx.kind), None


# Both activations are x·sigmoid(z): SiLU with z = x; GELU's tanh form (Hendrycks and Gimpel 2016), since
# (1 + tanh(y))/2 = sigmoid(2y), with this one. A GPU computes a sigmoid in a third of tanh's time.
KINDS = {GELUTanh: "gelu", SiLUActivation: "silu"}
SCALE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate)·up; kind: of KINDS."""
    x = gate.float()
    z = x if kind == "silu" else SCALE * x * (1 + CUBE * x * x)
    return (x * torch.sigmoid(z) * up.float()).to(gate.dtype)


def gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, from that of act(gate)·up."""
    x, outer = gate.float(), gradient.float()
    z = x if kind == "silu" else SCALE * x * (1 + CUBE * x * x)
    slope = 1 if kind == "silu" else SCALE * (1 + 3 * CUBE * x * x)
    share = torch.sigmoid(z)
    to_gate = outer * up.float() * share * (1 + x * (1 - share) * slope)
    return to_gate.to(gate.dtype), (outer * x * share).to(up.dtype)


def gated_again(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of up, and act(gate)·up itself; `gradient` becomes that of gate."""
    to_gate, to_up = gated_backward(gradient, gate, up, kind)
    gradient.copy_(to_gate)
    return to_up, gated(gate, up, kind)


def _of(function: Callable, tensor: torch.Tensor, compiled: Callable[[Callable], Callable] = any_length) -> Callable:
    return compiled(function) if tensor.is_cuda else function


def fuse(model: PeftModel) -> None:
    """Let the adapters of plain linear layers train through the functions above, on a GPU an MLP as one where all three
    of its layers have such adapters, and else its act(gate)·up; others (DoRA) keep PEFT's forward."""
    cuda, training = model.device.type == "cuda", model.training
    model.eval()  # dropout would let the trials of _is_gated differ
    # before the functions above are put in: a trial would have kernels compiled for them
    mlps = [module for module in model.modules() if cuda and _is_gated(module, model.device, model.dtype)]
    for layer in model.modules():
        if _is_plain(layer):
            wide = cuda and layer.out_features > layer.in_features
            plain = _wide_forward if wide else _fused_forward
            layer.forward = types.MethodType(_dropped_forward if _chance(layer) else plain, layer)
    for module in model.modules() if cuda else ():
        if model.get_base_model().config.model_type in FAMILIES:  # others may change them in place
            group_projections(module)
    for mlp in mlps:
        plain = all(_takes_part(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        mlp.forward = types.MethodType(_gated_lora_forward if plain else _gated_forward, mlp)
    model.train(training)


def group_projections(attention: torch.nn.Module) -> None:
    """Let an attention's queries, keys and values be one product, where it has them and all have plain adapters."""
    layers = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if all(_is_plain(layer) and not _chance(layer) for layer in layers):
        group = _Group(layers)
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(group.part, number)


def _is_plain(layer: torch.nn.Module | None) -> bool:
    if not isinstance(layer, peft.tuners.lora.LoraLayer) or layer.active_adapters != ["default"]:
        return False
    kinds = (torch.nn.Linear, Linear4bit, Linear8bitLt)
    return type(layer.get_base_layer()) in kinds and not layer.lora_variant


def _takes_part(layer: torch.nn.Module) -> bool:
    """In _GatedLora."""
    return _is_plain(layer) and not _chance(layer) and layer.get_base_layer().bias is None


def _chance(layer: peft.tuners.lora.LoraLayer) -> float:
    """Of an element that goes into the adapter to be dropped, in training."""
    return getattr(layer.lora_dropout["default"], "p", 0.0)


@torch.no_grad()
def _is_gated(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the module computes down(act(gate(x))·up(x)), as most MLPs do, and nothing more: tried on numbers."""
    linear = (torch.nn.Linear, peft.tuners.lora.LoraLayer)
    if not all(isinstance(getattr(module, name, None), linear) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    if type(getattr(module, "act_fn", None)) not in KINDS:
        return False
    x = torch.randn(1, 4, module.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))


def _factors(layer: peft.tuners.lora.LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.get_base_layer().weight, down, up, layer.scaling["default"]


def _by_rows(
    product: type[torch.autograd.Function], layer: peft.tuners.lora.LoraLayer, x: torch.Tensor, *more: float
) -> torch.Tensor:
    """x: [..., in]. Shaped out here, since Gemma 3n scales one such result in place, which autograd forbids where the
    function itself returns a view."""
    out = product.apply(x.reshape(-1, x.shape[-1]), *_factors(layer), *more).reshape(*x.shape[:-1], -1)
    bias = layer.get_base_layer().bias
    return out if bias is None else out + bias


def _fused_forward(layer: peft.tuners.lora.LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return _by_rows(_FusedLora, layer, x)


def _wide_forward(layer: peft.tuners.lora.LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return _by_rows(_WideLora, layer, x)


def _dropped_forward(layer: peft.tuners.lora.LoraLayer, x: torch.Tensor) -> torch.Tensor:
    return _by_rows(_DroppedLora, layer, x, _chance(layer)) if layer.training else _fused_forward(layer, x)


def _gated_forward(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), KINDS[type(mlp.act_fn)]))


def _gated_lora_forward(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = [_factors(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    factors = [factor for layer in layers for factor in layer[:3]]
    scalings = tuple(layer[3] for layer in layers)
    out = _GatedLora.apply(x.reshape(-1, x.shape[-1]), KINDS[type(mlp.act_fn)], scalings, *factors)
    return out.reshape(*x.shape[:-1], -1)
