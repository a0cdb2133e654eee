"""The way back of an adapted MLP's act(gate)·up: its gradients and those of the adapters around it, in one pass.

The tensors here are a model's widest. The gradients of gate and up and, for the adapters, three products with them over
all tokens take six passes over memory by PyTorch's own operations; on a GPU one kernel, by Triton, makes one of them,
and makes act(gate)·up again on the way, so that nobody need keep it.
"""

import math
from typing import NamedTuple

import torch
from transformers.activations import GELUTanh, SiLUActivation

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch for a CPU come without
    triton = None

# Both activations are x·sigmoid(z): SiLU with z = x; GELU's tanh form (Hendrycks and Gimpel 2016), since
# (1 + tanh(y))/2 = sigmoid(2y), with this one. A GPU computes a sigmoid in a third of tanh's time.
KINDS = {GELUTanh: "gelu", SiLUActivation: "silu"}
SCALE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
MOST_RANK = 32  # of an adapter in the kernel, which holds three such strips of sums in registers
TOKENS, COLUMNS, WARPS, STAGES = 32, 128, 4, 3  # of a tile
PARTS = 8  # in which the tokens are summed, side by side


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


class Sums(NamedTuple):
    """What `gated_backward_sums` gives: the gradients of gate and up, [T, I]; and, float32, the sums over all tokens
    of to_gateᵀ·inner_gate and to_upᵀ·inner_up, [I, r] each, and of to_downᵀ·(act(gate)·up), [r, I]."""

    to_gate: torch.Tensor
    to_up: torch.Tensor
    gate_sums: torch.Tensor
    up_sums: torch.Tensor
    down_sums: torch.Tensor


def gated_backward_sums(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    inner_gate: torch.Tensor,
    inner_up: torch.Tensor,
    to_down: torch.Tensor,
) -> Sums:
    """gradient: of act(gate)·up, [T, I], contiguous, as gate and up are; it may be overwritten. inner_gate, inner_up,
    to_down: [T, r], each with an r of its own, of at most MOST_RANK. On a GPU."""
    tokens, columns = gate.shape
    inner = (inner_gate, inner_up, to_down)
    ranks = [x.shape[1] for x in inner]
    to_up = torch.empty_like(up)
    partial = [gate.new_empty(PARTS, rank, columns, dtype=torch.float32) for rank in ranks]
    grid = (triton.cdiv(columns, COLUMNS), PARTS)
    strides = [stride for x in inner for stride in x.stride()]
    _kernel[grid](
        *(gradient, gate, up, to_up, *inner, *partial, tokens, columns, *strides, *ranks),
        RANK=max(16, triton.next_power_of_2(max(ranks))),
        GELU=kind == "gelu",
        SCALE=SCALE,
        CUBE=CUBE,
        TOKENS=TOKENS,
        COLUMNS=COLUMNS,
        PARTS=PARTS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    to_gate_up, to_up_up, to_down_down = (sums.sum(0) for sums in partial)
    return Sums(gradient, to_up, to_gate_up.T, to_up_up.T, to_down_down)


if triton:

    @triton.jit
    def _strip(pointer, rows, tokens, by_token, by_rank, rank, RANK: tl.constexpr):
        """[RANK, TOKENS] of a [T, rank] tensor, 0 past its ends."""
        ranks = tl.arange(0, RANK)
        inside = (ranks[:, None] < rank) & (rows[None, :] < tokens)
        return tl.load(pointer + rows[None, :] * by_token + ranks[:, None] * by_rank, mask=inside, other=0.0)

    @triton.jit
    def _keep(pointer, sums, part, place, columns, rank, RANK: tl.constexpr):
        ranks = tl.arange(0, RANK)
        inside = (ranks[:, None] < rank) & (place[None, :] < columns)
        tl.store(pointer + (part * rank + ranks[:, None]) * columns + place[None, :], sums, mask=inside)

    @triton.jit
    def _kernel(
        gradient, gate, up, to_up, inner_gate, inner_up, to_down, gate_sums, up_sums, down_sums, tokens, columns,
        gate_by_token, gate_by_rank, up_by_token, up_by_rank, down_by_token, down_by_rank, gate_rank, up_rank,
        down_rank, RANK: tl.constexpr, GELU: tl.constexpr, SCALE: tl.constexpr, CUBE: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """A strip of columns over one part of the tokens. The gradient of gate takes the place of `gradient`."""
        part = tl.program_id(1)
        place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        a_part = tl.cdiv(tl.cdiv(tokens, TOKENS), PARTS) * TOKENS
        gate_sum = tl.zeros((RANK, COLUMNS), tl.float32)
        up_sum = tl.zeros((RANK, COLUMNS), tl.float32)
        down_sum = tl.zeros((RANK, COLUMNS), tl.float32)
        for start in range(part * a_part, tl.minimum((part + 1) * a_part, tokens), TOKENS):
            rows = start + tl.arange(0, TOKENS)
            inside = (rows[:, None] < tokens) & (place[None, :] < columns)
            there = rows[:, None].to(tl.int64) * columns + place[None, :]
            outer = tl.load(gradient + there, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(gate + there, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(up + there, mask=inside, other=0.0).to(tl.float32)
            z = x
            slope = 1.0
            if GELU:
                z = SCALE * x * (1 + CUBE * x * x)
                slope = SCALE * (1 + 3 * CUBE * x * x)
            share = tl.sigmoid(z)
            to_gate = (outer * y * share * (1 + x * (1 - share) * slope)).to(gate.dtype.element_ty)
            x = x * share
            to_this_up = (outer * x).to(gate.dtype.element_ty)
            hidden = (x * y).to(gate.dtype.element_ty)
            tl.store(gradient + there, to_gate, mask=inside)
            tl.store(to_up + there, to_this_up, mask=inside)
            gate_sum += tl.dot(_strip(inner_gate, rows, tokens, gate_by_token, gate_by_rank, gate_rank, RANK), to_gate)
            up_sum += tl.dot(_strip(inner_up, rows, tokens, up_by_token, up_by_rank, up_rank, RANK), to_this_up)
            down_sum += tl.dot(_strip(to_down, rows, tokens, down_by_token, down_by_rank, down_rank, RANK), hidden)
        _keep(gate_sums, gate_sum, part, place, columns, gate_rank, RANK)
        _keep(up_sums, up_sum, part, place, columns, up_rank, RANK)
        _keep(down_sums, down_sum, part, place, columns, down_rank, RANK)
