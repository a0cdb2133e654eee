"""A model's folder in; the model ready for training or generation out, and the loss of packed rows through it."""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from stages.models import towers
from stages.models.attention import PACKED, takes_flash
from stages.models.families import FAMILIES
from stages.models.loss import head_loss
from stages.models.packs import IGNORED, SHARED_AT_LEAST, Pack, moved, pack
from stages.models.quantized import multiply_restored, packing, restore_scales, round_weights
from stages.refusal import Refusal

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_model(
    folder: Path, device: str, dtype: torch.dtype, attention: str = PACKED, quantize: str | None = None
) -> PreTrainedModel:
    """The model in `folder`, of the class that its configuration names, in evaluation mode. Only safetensors are read
    and no code of the folder is run.

    quantize: one of params.Quantize lets the language model's linear layers, the head apart, hold the values that are
    kept of them in so few bits: on a GPU packed, in 4.5 or 8 bits each, restored layer by layer; on a CPU, which has
    the room and not the speed, restored once.

    Raises Refusal where the model is of a family that no test has tried and packed rows are not right in it.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    packed = bool(quantize) and device.startswith("cuda")
    with towers.unseen(folder, config):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            device_map={"": device},
            quantization_config=packing(config, quantize, dtype) if packed else None,
        )
    if packed:
        multiply_restored(model)
        restore_scales(model)
    elif quantize:
        round_weights(model, quantize)
    if attention == PACKED and device != "meta" and config.model_type not in FAMILIES:
        check_packing(model)
    return model.eval()


# How far two logits may be apart, as a share of their length: rounding in bfloat16 makes 0.03, a bound on attention's
# scores, a sink in it or a scaled head that are passed over make 0.3 and more (tests/test_families.py).
MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.inference_mode()
def check_packing(model: PreTrainedModel) -> None:
    """Say on stderr that no test tries this family, and that packed rows are right in it all the same: as transformers
    computes them one at a time with its plain attention. Raises Refusal where they are not."""
    draw = torch.Generator().manual_seed(0)
    words = min(1000, model.config.get_text_config().vocab_size)
    start, *ends = (torch.randint(words, (n,), generator=draw).tolist() for n in (SHARED_AT_LEAST + 8, 30, 20))
    rows = [
        {"id": str(n), "input_ids": start + end, "labels": [IGNORED] * len(start + end)} for n, end in enumerate(ends)
    ]
    (piece,) = pack(rows, 1000)
    there = piece.to(model.device, flash=takes_flash(model))
    last = 4  # tokens of each row: a large vocabulary's logits are what takes the time
    found = {name: packed_logits(model, there, slice(end - last, end)).float() for name, _, end in piece.rows}
    model.set_attn_implementation("eager")
    apart = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        expected = model(input_ids=ids, logits_to_keep=last).logits[0].float()
        apart = max(apart, float((found[row["id"]] - expected).norm() / expected.norm()))
    model.set_attn_implementation(PACKED)
    said = f"{model.config.model_type} is not a family that the tests try"
    if not apart <= MOST_APART[model.dtype]:
        raise Refusal(
            f"{said}, and packed rows are not right in it: logits {apart:.1g} of their length "
            f"away from those of one row at a time; take a model of one of these: {', '.join(FAMILIES)}"
        )
    print(f"warning: {said}; packed rows are right in it, as tried here: logits {apart:.0e} apart", file=sys.stderr)


def _hidden(model: PreTrainedModel, piece: Pack) -> torch.Tensor:
    """[T, H], what the decoder makes of the pack's tokens; `model` must attend with PACKED."""
    return model.get_decoder()(
        input_ids=piece.input_ids,
        position_ids=piece.position_ids,
        attention_mask=None,  # nor is one built for PACKED: `segments` says all there is to say
        segments=None if piece.sight else piece.segments,
        sight=piece.sight,
        use_cache=False,
    ).last_hidden_state[0]


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def pack_loss(
    model: PreTrainedModel, piece: Pack, recorded: Callable[[Pack], torch.Tensor | None] = lambda piece: None
) -> torch.Tensor:
    """Sum of the cross-entropy of the pack's supervised tokens, in nats. `recorded` gives the hidden states where it
    has a faster way to them."""
    hidden = recorded(piece)
    if hidden is None:
        hidden = _hidden(model, piece.to(model.device, flash=takes_flash(model)))
    places, targets = (moved(tensor, model.device) for tensor in (piece.places, piece.targets))
    hidden = hidden.index_select(0, places)  # the head is the costliest layer
    return head_loss(hidden, model.get_output_embeddings(), targets, _softcap(model)).sum()


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: list[dict], tokens_per_pack: int) -> dict[str, tuple[float, int]]:
    """For each row ({id, input_ids, labels}), by its id: the sum of the cross-entropy of its supervised tokens, in
    nats, and how many there are."""
    found = {}
    for piece in pack(rows, tokens_per_pack):
        on_device = piece.to(model.device, flash=takes_flash(model))
        hidden = _hidden(model, on_device).index_select(0, on_device.places)
        losses = head_loss(hidden, model.get_output_embeddings(), on_device.targets, _softcap(model)).double().cpu()
        for name, start, end in piece.rows:
            own = slice(*torch.searchsorted(piece.places, torch.tensor([start, end])).tolist())
            found[name] = float(losses[own].sum()), own.stop - own.start
    return found


def mean_loss(losses: Iterable[tuple[float, int]]) -> float:
    """Mean cross-entropy of a supervised token, in nats, over what `row_losses` gives for each row."""
    sums, tokens = zip(*losses, strict=True)
    return math.fsum(sums) / sum(tokens)


def packed_logits(model: PreTrainedModel, piece: Pack, tokens: slice) -> torch.Tensor:
    """[tokens, vocabulary], the logits at those places of the pack."""
    logits = model.get_output_embeddings()(_hidden(model, piece)[tokens])
    softcap = _softcap(model)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
