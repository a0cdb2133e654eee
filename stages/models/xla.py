"""A model with adapters and rows in; the model in parts on all TPU cores of this machine, and the rows' losses, out.

One process computes as if there were one large device, and XLA cuts the program by how its tensors lie ("single
program, multiple data"): of the base's weights every core holds a part (fully sharded data parallel), of a step's rows
every core computes its own. Adapters, which are small, lie whole on each.

A program is compiled for its shapes, so that all packs of a run are filled up to one shape.
"""

import os
from collections.abc import Iterable
from itertools import zip_longest

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from stages.models.attention import Spread
from stages.models.loss import losses_in_one
from stages.models.packs import IGNORED, Pack, deal, pack
from stages.refusal import Refusal

# to multiples of which a pack's tokens and its supervised tokens are filled up: a TPU's registers are 128 wide
TOKENS, PLACES = 128, 32
AT_ONCE = 128  # supervised tokens of each core whose scores of the whole vocabulary are there at once
TRIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "llama")  # tests/tpu
NOTHING = -1  # the segment that a token shares, where it shares none


class _HeadLoss(torch.autograd.Function):
    """loss._HeadLoss for [cores, K, H]: a part of every core's tokens at a time, so that none waits for another."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None):
        losses, gradients = [], []
        for part, wanted in zip(hidden.split(AT_ONCE, 1), targets.split(AT_ONCE, 1), strict=True):
            product = (part @ weight.T).flatten(0, 1)
            losses.append(losses_in_one(product, wanted.flatten()[:, None], softcap).view(wanted.shape))
            gradients.append((product @ weight).view(part.shape))
        ctx.save_for_backward(torch.cat(gradients, 1))
        return torch.cat(losses, 1)

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[..., None]).to(gradient.dtype), None, None, None


class Pod:
    """The TPU cores of this machine, with a model on them."""

    def __init__(self, model: PeftModel):
        """Move the model there, its base in parts. XLA must not have been used before in this process."""
        asked = os.environ.get("PJRT_DEVICE")  # torch-xla, where it finds no TPU, sets it to CPU
        import torch_xla
        import torch_xla.distributed.spmd as spmd

        if asked is None and torch_xla.runtime.device_type() != "TPU":
            raise Refusal("params.yaml: machine.device is xla, but torch-xla sees no TPU here; set it to auto")
        self.model: PreTrainedModel = model.get_base_model()
        kind = self.model.config.model_type
        if kind not in TRIED:
            raise Refusal(
                f"params.yaml: machine.device is xla, and a model of type {kind} was never tried there; tried "
                f"are {', '.join(TRIED)}"
            )
        torch_xla.runtime.use_spmd()
        self.xla, self.spmd = torch_xla, spmd
        self.count = torch_xla.runtime.global_runtime_device_count()
        self.mesh = spmd.Mesh(range(self.count), (self.count,), ("fsdp",))
        self.tokens = self.places = 0
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = embedding.weight is head.weight
        model.to("xla")
        if tied:
            head.weight = embedding.weight  # which moving has made two
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() > 1:
                self._lay(parameter, parameter.shape.index(max(parameter.shape)))
        for layer in self.model.get_decoder().layers:
            layer.register_forward_hook(self._rows_apart)
        torch_xla.sync()

    def _lay(self, tensor: torch.Tensor, dimension: int = 0) -> torch.Tensor:
        """Let every core hold a part of the tensor: cut along that dimension."""
        spec = tuple("fsdp" if number == dimension else None for number in range(tensor.dim()))
        self.spmd.mark_sharding(tensor, self.mesh, spec)
        return tensor

    def _rows_apart(self, layer: torch.nn.Module, inputs: tuple, hidden: torch.Tensor) -> torch.Tensor:
        """What goes from layer to layer stays with the core that has the rows, on the way back too: it is the weights
        that are gathered."""
        return self.spmd.mark_sharding_with_gradients(hidden, self.mesh, ("fsdp", None, None))

    def fit(self, steps: Iterable[list[dict]], tokens_per_pack: int) -> None:
        """Find the shape that all packs of these steps, each a list of rows, can be filled up to."""
        for rows in steps:
            for packs in self._shares(rows, tokens_per_pack):
                for piece in packs:
                    self.tokens = max(self.tokens, -(-len(piece) // TOKENS) * TOKENS)
                    self.places = max(self.places, -(-piece.supervised // PLACES) * PLACES)

    def _shares(self, rows: list[dict], tokens_per_pack: int) -> list[list[Pack]]:
        return [pack(share, tokens_per_pack) for share in deal(rows, self.count, tokens_per_pack)]

    def rounds(self, rows: list[dict], tokens_per_pack: int) -> list[list[Pack | None]]:
        """The rows in packs, one for each core at a time, or None where a core has none left."""
        return [list(packs) for packs in zip_longest(*self._shares(rows, tokens_per_pack))]

    def begin_step(self, seed: int, step: int) -> None:
        """Let dropout draw from numbers that are this step's own, so that no checkpoint need hold them."""
        self.xla.manual_seed(seed * 1_000_003 + step)

    def losses(self, packs: list[Pack | None]) -> torch.Tensor:
        """[cores, places], each supervised token's cross-entropy in nats, float32; 0 where a pack is filled up."""
        laid = [pad_sequence(rows, batch_first=True) for rows in zip(*map(self._filled, packs), strict=True)]
        ids, positions, own, shared, places, targets = (self._lay(tensor.to("xla")) for tensor in laid)
        hidden = self.model.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None,
            spread=Spread(positions, own, shared),
            use_cache=False,
        ).last_hidden_state
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        losses = _HeadLoss.apply(hidden, self.model.get_output_embeddings().weight, targets.clamp(min=0), softcap)
        return torch.where(targets == IGNORED, 0.0, losses)

    def _filled(self, piece: Pack | None) -> tuple[torch.Tensor, ...]:
        """input_ids, position_ids, each token's segment and the one that it shares: [tokens]; places, targets:
        [places]. What fills up is a segment of its own."""
        if piece is None:
            nothing = torch.zeros(self.tokens, dtype=torch.long)
            places = torch.zeros(self.places, dtype=torch.long)
            return nothing, torch.arange(self.tokens), nothing, nothing + NOTHING, places, places + IGNORED
        more = self.tokens - len(piece)
        own, shared = (torch.full((self.tokens,), value) for value in (len(piece.segments), NOTHING))
        starts = {segment.start: number for number, segment in enumerate(piece.segments)}
        for number, segment in enumerate(piece.segments):
            own[segment.start : segment.end] = number
            if segment.shared_end > segment.shared_start:
                shared[segment.start : segment.end] = starts[segment.shared_start]
        ids = torch.nn.functional.pad(piece.input_ids[0], (0, more))
        positions = torch.cat((piece.position_ids[0], torch.arange(more)))
        unused = self.places - piece.supervised
        places = torch.nn.functional.pad(piece.places, (0, unused))
        return ids, positions, own, shared, places, torch.nn.functional.pad(piece.targets, (0, unused), value=IGNORED)

    @torch.no_grad()
    def row_losses(self, rows: list[dict], tokens_per_pack: int) -> dict[str, tuple[float, int]]:
        """load.row_losses, on these cores."""
        found = {}
        for packs in self.rounds(rows, tokens_per_pack):
            losses = self.losses(packs).cpu().double()
            for piece, own in zip(packs, losses, strict=True):
                for name, start, end in piece.rows if piece else ():
                    first, last = torch.searchsorted(piece.places, torch.tensor([start, end])).tolist()
                    found[name] = float(own[first:last].sum()), last - first
        return found

    def compute(self) -> None:
        """Start computing what has been asked for so far."""
        self.xla.sync()
