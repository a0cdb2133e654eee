"""The decoder's forward and backward pass as CUDA graphs: a few sizes of pack, recorded once, replayed for every pack.

A decoder makes thousands of short kernels, and a processor needs longer to launch them than a GPU to run them; a
graph is launched whole. Its shapes are fixed, so packs are padded to the next of a few sizes.
"""

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.packs import Pack, Sight, moved, padded
from stages.models.recomputed import recomputed

KEYS = 4  # keys to a query, at most, where packs share beginnings
MOST = 12  # sizes; each keeps a copy of the adapters' gradients
STEP = 256  # tokens, of which each size is a multiple
# Tokens that a GPU could have trained on while a size is recorded: at the shape of Gemma 3 1B, 27 million weights a
# layer, an H200 takes 0.25 s, and trains on 110,000 a second (bench/README.md). Both go by the layers, and what is
# trained on in a time by the weights; of small models, whose kernels wait for one another, by less.
RECORDING, A_LAYER = 30_000, 27_000_000
MOST_RECORDING = 50_000


def size_of(tokens: int) -> int:
    """The next size up."""
    return -(-tokens // STEP) * STEP


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
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad = lambda set_to_none=False: torch._foreach_zero_(gradients)


class Graphs:
    """The model's decoder, recorded at each size when a pack first needs it.

    All graphs share one pool of memory, and nothing else can use what is free there. So the largest of a kind comes
    first: what the others need is found in what it leaves. And what passes without a graph (the pass before a
    recording, in which kernels are compiled and chosen, and a pack that no graph fits) keeps only what goes into each
    layer (recomputed.py): there is no room for a second pack's whole pass beside the pool. None is given up before the
    training ends: with one goes what products of the others work in (pytorch/pytorch#193402).
    """

    def __init__(self, model: PreTrainedModel, rows: list[dict], coming: Iterable[tuple[int, bool]]):
        """rows: all that packs will be made of ({input_ids}); their lengths decide what a graph must have room for.
        coming: packs.sizes of all packs that will come. A run that goes on must be told of those that came, too:
        recorded or not, and by the size that it is padded to, a pack's sums are rounded in another way."""
        lengths = [len(row["input_ids"]) for row in rows]
        self.model = model
        self.longest = max(lengths)
        self.mean = sum(lengths) / len(lengths)
        layer = model.get_decoder().layers[0]
        weights = sum(part.in_features * part.out_features for part in layer.modules() if isinstance(part, nn.Linear))
        self.sizes = chosen(coming, min(MOST_RECORDING, RECORDING * A_LAYER // weights))
        self.recorded: dict[tuple[int, bool], nn.Module] = {}
        self.pool = torch.cuda.graph_pool_handle()
        for layer in model.get_decoder().layers:
            layer.forward = functools.partial(self._layer, layer.forward)
        # recording makes the nodes that add gradients on a stream of its own, and replaying waits for both
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def hidden(self, piece: Pack) -> torch.Tensor | None:
        """[T or more, H] of the pack, padding at its end; None where no graph fits it.

        The backward pass writes the adapters' gradients to the graph's own memory, where the next pack of that size
        overwrites them: they must be added to others (`own_gradients`).
        """
        shared = any(segment.shared_end for segment in piece.segments)
        kind = [size for size, also in self.sizes if also == shared]
        size = min((size for size in kind if size >= len(piece)), default=None)
        if size is None or (inputs := self._inputs(piece, size, shared)) is None:
            return None
        for each in (max(kind), size):
            if (each, shared) not in self.recorded:
                self._record(piece, each, shared)
        return self.recorded[size, shared](*inputs)

    def _inputs(self, piece: Pack, size: int, shared: bool) -> tuple[torch.Tensor, ...] | None:
        """What the graph of that size takes; None where the pack does not fit it."""
        segments = 8 + int((KEYS if shared else 1.5) * size / self.mean)
        inputs = padded(piece, size, segments, KEYS * size, self.longest)
        return inputs and tuple(moved(tensor, self.model.device) for tensor in inputs)

    def _record(self, piece: Pack, size: int, shared: bool) -> None:
        if (inputs := self._inputs(piece, size, shared)) is None:
            return  # the largest has no place for as many segments as its padding makes of this one: another will do
        decoder = _Decoder(self.model, self.longest).train()
        # a run that goes on after a kill records again: dropout must not see that in its random numbers
        with torch.random.fork_rng(devices=[self.model.device]):
            self._try(decoder, inputs)
            with uncollected():
                self.recorded[size, shared] = torch.cuda.make_graphed_callables(
                    decoder, inputs, num_warmup_iters=0, allow_unused_input=True, pool=self.pool
                )

    def _try(self, decoder: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """One pass there and back that leaves nothing behind, through a layer of each kind after the first."""
        layers = decoder.decoder.layers
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        try:
            decoder.decoder.layers = layers[: layers_to_try(decoder.decoder)]
            hidden = decoder(*inputs)
            hidden.backward(torch.zeros_like(hidden))
        finally:
            decoder.decoder.layers = layers
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient

    def _layer(self, plain: Callable[..., torch.Tensor], hidden: torch.Tensor, *more, **options) -> torch.Tensor:
        """The first layer, into which nothing goes that needs a gradient, as it is: kernels compiled for one that does
        would have to be compiled again while it is recorded, which is forbidden."""
        if torch.cuda.is_current_stream_capturing() or not hidden.requires_grad or not torch.is_grad_enabled():
            return plain(hidden, *more, **options)
        return recomputed(lambda hidden: plain(hidden, *more, **options), hidden)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector at rest: among what it finds may be a graph that nobody holds, or a kernel that was
    tried and not taken, and a GPU that is told to give up either while it records gives up the recording
    (pytorch/pytorch#161037)."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def layers_to_try(decoder: nn.Module) -> int:
    """How many of the first layers have one of each kind after the first layer, whose kernels all others use too: all,
    where adapters are not the same in each."""
    adapters = [{name: p.shape for name, p in one.named_parameters() if p.requires_grad} for one in decoder.layers]
    if any(one != adapters[0] for one in adapters):
        return len(adapters)
    kinds = getattr(decoder.config, "layer_types", None) or [None] * len(adapters)
    return 1 + max((kinds.index(kind, 1) for kind in set(kinds[1:])), default=0)


def chosen(coming: Iterable[tuple[int, bool]], recording: int) -> list[tuple[int, bool]]:
    """At most MOST sizes, each with whether rows share beginnings, with which padding takes least beside recordings, of
    which each takes the time of `recording` tokens: for the first n sizes that packs have, the best last one from what
    is best for fewer (as in optimal quantization, Bruce 1965). The largest of both kinds are always among them."""
    counts = sorted(Counter((shared, size_of(tokens)) for tokens, shared in coming).items())
    best: dict[tuple[int, int], tuple[int, list]] = {(0, 0): (0, [])}  # of the first n with m sizes: tokens, sizes
    for n, ((shared, size), _) in enumerate(counts, 1):
        for m in range(1, min(n, MOST) + 1):
            plans, packs = [], 0
            for before in reversed(range(n)):
                if counts[before][0][0] != shared:
                    break
                packs += counts[before][1]
                if (before, m - 1) in best:
                    tokens, sizes = best[before, m - 1]
                    plans.append((tokens + packs * size + recording, [*sizes, (size, shared)]))
            if plans:
                best[n, m] = min(plans)
    return min((plan for (n, _), plan in best.items() if n == len(counts)), default=(0, []))[1]
