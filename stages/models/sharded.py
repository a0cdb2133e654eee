"""A model's folder in; on each of several processes the model out, which keeps a share of its decoder layers' bytes.

Before a layer computes, all processes gather its bytes (packed ones stay packed) into one of two buffers, which its
parameters are views of, always; meanwhile the next layer's bytes come into the other. On the way back each layer is
gathered and computed again, so that between the layers only what goes into them is kept. Adapters, embedding and head
stay whole on every process. No CUDA graphs are recorded then: the gathering would have to be recorded with them.

Not by torch's fully_shard (FSDP2), which makes new parameters out of those that it is given: packed ones lose the
scales that they carry (axolotl-ai-cloud/axolotl#2992), bytes shown to it as bytes end in a trace
(huggingface/accelerate#3983), and of bytes shown to it as bfloat16 it is reported that those come back changed which
look like no number (bitsandbytes-foundation/bitsandbytes#1945). Frozen weights need no more of it than the gathering:
they have no gradients to scatter and no optimizer.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from stages.models.families import adaptable, family
from stages.models.quantized import hold_packed
from stages.models.ranks import Ranks
from stages.models.recomputed import recomputed
from stages.models.unloaded import Uncovered, give_buffers, unloaded
from stages.refusal import Refusal

gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
ALIGNED = 256  # bytes: what PyTorch's own allocator begins a tensor at, or a divisor of that


def load_sharded(
    folder: Path, device: str, dtype: torch.dtype, quantize: str | None, ranks: Ranks
) -> tuple[PreTrainedModel, "Sharded"]:
    """The model in `folder`, in evaluation mode, a layer read at a time: of the files' bytes a process holds in memory
    what it looks at. With `quantize` the layers are packed, on a CPU too. Raises Refusal where its layers cannot be
    gathered one by one, or its files not be read so."""
    try:
        found = unloaded(folder, dtype)
        if not family(found.model).sharded:
            raise Uncovered(f"no test has tried it with {found.model.config.model_type}")
        give_buffers(found.model, set(found.sources), folder, device)
    except Uncovered as reason:
        raise Refusal(
            f"params.yaml: machine.shard_base: the base cannot be shared out over devices ({reason}); set it to false"
        ) from None
    if hasattr(found.model, "hf_device_map"):
        del found.model.hf_device_map  # which says that there are no weights
    return found.model, Sharded(
        found.model, lambda name: found.sources[name].mapped().to(device, dtype), quantize, ranks
    )


class Sharded:
    """The decoder layers of a model, of which each process holds its share of the bytes."""

    def __init__(self, model: PreTrainedModel, read: Callable[[str], torch.Tensor], quantize: str | None, ranks: Ranks):
        """Give `model`, whose parameters are on the meta device, its weights: `read` returns one by name, on its device
        and in its format."""
        self.ranks = ranks
        self.layers = list(model.get_decoder().layers)
        names = {module: name for name, module in model.named_modules()}
        packed = set(adaptable(model).values()) if quantize else set()
        self.shares: list[torch.Tensor] = []
        places = []
        for layer in self.layers:
            held = _given(layer, names[layer], read, quantize, packed)
            share, place = _own_share(held, ranks)
            self.shares.append(share)
            places.append(place)
        _give_rest(model, read)
        device, most = self.shares[0].device, max(map(len, self.shares)) * ranks.count
        self.buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        for number, place in enumerate(places):
            for holder, name, start, like in place:
                part = self.buffers[number % 2][start : start + like.nbytes]
                setattr(holder, name, part.view(like.dtype).view(like.shape))
        self.holds: list[int | None] = [None, None]  # whose bytes are in a buffer, or on the way there
        self.pending: list[dist.Work | None] = [None, None]
        self.last = -1
        self._pass(backward=False)  # from here on the buffers hold numbers
        for number, layer in enumerate(self.layers):
            layer.forward = self._in_turn(number, layer.forward)

    def _in_turn(self, number: int, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
            def run(hidden: torch.Tensor) -> torch.Tensor:
                self._bring(number)
                return plain(hidden, *more, **options)

            if not torch.is_grad_enabled():
                return run(hidden)
            # packed layers would otherwise take what is in the buffer by then
            return recomputed(run, hidden)

        return forward

    def _bring(self, number: int) -> None:
        """Have the layer's bytes in its buffer; begin to fetch those of the layer after it, or, on the way back, before
        it. All that reads the other buffer has been asked for by then, and fetching waits for it."""
        self._fetch(number)
        self._arrive(number % 2)
        following = number + (1 if number > self.last or number == 0 else -1)
        self.last = number
        if following < len(self.layers):
            self._fetch(following)

    def _fetch(self, number: int) -> None:
        place, share = number % 2, self.shares[number]
        if self.holds[place] != number:
            self._arrive(place)
            whole = self.buffers[place][: len(share) * self.ranks.count]
            self.pending[place] = gather(whole, share, async_op=True)
            self.holds[place] = number

    def _arrive(self, place: int) -> None:
        if (work := self.pending[place]) is not None:
            work.wait()
            self.pending[place] = None

    @contextlib.contextmanager
    def passes(self, own: int, backward: bool) -> Iterator[None]:
        """What every process does its passes through the model in, `own` of them, each one there and, if so, back. At
        the end it does its part in those that others have more."""
        more = max(self.ranks.of_all(own)) - own
        yield
        for _ in range(more):
            self._pass(backward)

    def _pass(self, backward: bool) -> None:
        numbers = range(len(self.layers))
        for number in [*numbers, *(reversed(numbers) if backward else ())]:
            self._bring(number)


def _given(
    layer: torch.nn.Module,
    name: str,
    read: Callable[[str], torch.Tensor],
    quantize: str | None,
    packed: set[torch.nn.Module],
) -> list[tuple[Any, str]]:
    """Give the layer its weights. What holds their bytes: objects, and what the tensor is called there."""
    held: list[tuple[Any, str]] = []
    for path, module in layer.named_modules(prefix=name):
        for leaf, _ in list(module.named_parameters(recurse=False)):
            weight = read(f"{path}.{leaf}")
            if leaf == "weight" and module in packed:
                hold_packed(module, weight, quantize)
            else:
                module.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))
            parameter = getattr(module, leaf)
            held.append((parameter, "data"))
            if (state := getattr(parameter, "quant_state", None)) is not None:
                held.append((state, "absmax"))  # 8 bits for each 64 weights; the scales of these are few
    return held


def _own_share(held: list[tuple[Any, str]], ranks: Ranks) -> tuple[torch.Tensor, list[tuple]]:
    """A process's part of the bytes, laid end to end; and for each tensor who holds it, where it begins, and an empty
    one like it."""
    parts, place, end = [], [], 0
    for holder, name in held:
        tensor = getattr(holder, name).detach()
        place.append((holder, name, end, torch.empty_like(tensor, device="meta")))
        parts += [tensor.flatten().view(torch.uint8), tensor.new_zeros(-tensor.nbytes % ALIGNED, dtype=torch.uint8)]
        end += tensor.nbytes + -tensor.nbytes % ALIGNED
        setattr(holder, name, tensor.new_empty(0))  # the bytes go when this function returns
    parts.append(parts[0].new_zeros(-end % (ranks.count * ALIGNED)))
    whole = torch.cat(parts)
    return whole.chunk(ranks.count)[ranks.number].clone(), place


def _give_rest(model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> None:
    """Give what is outside of the layers its weights. What training does not run, an image tower, gets one number that
    stands for all of a tensor's."""
    used = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    made: dict[int, torch.nn.Parameter] = {}  # tied ones are one
    for path, module in model.named_modules():
        for leaf, empty in list(module.named_parameters(recurse=False)):
            if empty.device.type != "meta":
                continue
            if id(empty) not in made:
                name = f"{path}.{leaf}"
                weight = read(name) if id(empty) in used else read(name).flatten()[:1].clone().expand(empty.shape)
                made[id(empty)] = torch.nn.Parameter(weight, requires_grad=False)
            module.register_parameter(leaf, made[id(empty)])
