"""The decoder's forward and backward pass as CUDA graphs: a few sizes of pack, recorded once, replayed for every pack.

A decoder makes thousands of short kernels, and a processor needs longer to launch them than a GPU to run them; a
graph is launched whole. Its shapes are fixed, so packs are padded to the next of a few sizes.
"""

import functools

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.packs import Pack, Sight, moved, padded

KEYS = 4  # keys to a query, at most, where packs share beginnings
MOST = 12  # sizes; each keeps a copy of the adapters' gradients


def size_of(tokens: int) -> int:
    """The next size up, in steps of 256 tokens and, from 2,048 on, of an eighth of the power of two below."""
    step = max(256, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


class _Decoder(nn.Module):
    """[T, H] out of tensors alone, as recording wants it."""

    def __init__(self, model: PreTrainedModel, longest: int):
        super().__init__()
        self.decoder = model.get_decoder()
        self.longest = longest

    def forward(self, input_ids, position_ids, queries, keys, index=None) -> torch.Tensor:
        return self.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            sight=Sight(queries, keys, index, self.longest, self.longest),
            use_cache=False,
        ).last_hidden_state[0]


def own_gradients(model: nn.Module) -> None:
    """Give each trained parameter a gradient to which others are added: without one, autograd would take the first
    pack's tensor for it, a graph's memory (pytorch/pytorch#181723)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model.zero_grad = functools.partial(type(model).zero_grad, model, set_to_none=False)


class Graphs:
    """The model's decoder, recorded at each size when a pack first needs it."""

    def __init__(self, model: PreTrainedModel, rows: list[dict]):
        """rows: all that packs will be made of ({input_ids}); their lengths decide what a graph must have room for."""
        lengths = [len(row["input_ids"]) for row in rows]
        self.model = model
        self.longest = max(lengths)
        self.mean = sum(lengths) / len(lengths)
        self.recorded: dict[tuple[int, bool], nn.Module | None] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # recording makes the nodes that add gradients on a stream of its own, and replaying waits for both
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def keep_to(self, keys: list) -> None:
        """Have these sizes recorded, when they come, before others: those that a run had which now goes on. Recorded
        or not, a pack's sums are rounded in another way."""
        self.recorded = dict.fromkeys((size, shared) for size, shared in keys)

    def hidden(self, piece: Pack) -> torch.Tensor | None:
        """[size, H] of the pack, padding at its end; None where it does not fit a graph, or there are MOST already.

        The backward pass writes the adapters' gradients to the graph's own memory, where the next pack of that size
        overwrites them: they must be added to others (`own_gradients`).
        """
        size = size_of(len(piece))
        shared = any(segment.shared_end for segment in piece.segments)
        segments = 8 + int((KEYS if shared else 1.5) * size / self.mean)
        inputs = padded(piece, size, segments, KEYS * size, self.longest)
        key = size, shared
        if inputs is None or (key not in self.recorded and len(self.recorded) == MOST):
            return None
        inputs = tuple(moved(tensor, self.model.device) for tensor in inputs)
        if self.recorded.get(key) is None:
            decoder = _Decoder(self.model, self.longest).train()
            # a run that goes on after a kill records again: dropout must not see that in its random numbers
            with torch.random.fork_rng(devices=[self.model.device]):
                self.recorded[key] = torch.cuda.make_graphed_callables(
                    decoder, inputs, num_warmup_iters=1, allow_unused_input=True, pool=self.pool
                )
        return self.recorded[key](*inputs)
