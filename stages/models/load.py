"""A model's folder in; the model ready for training or generation out, and the loss of packed rows through it."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stages.models.attention import PACKED
from stages.models.loss import head_loss
from stages.models.packs import IGNORED, Pack, pack

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_model(folder: Path, device: str, dtype: torch.dtype, attention: str = PACKED) -> PreTrainedModel:
    """The model in `folder`, in evaluation mode. Only safetensors are read and no code of the folder is run."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        device_map={"": device},
    )
    return model.eval()


def _hidden(model: PreTrainedModel, piece: Pack) -> torch.Tensor:
    """[T, H], what the decoder makes of the pack's tokens; `model` must attend with PACKED."""
    return model.get_decoder()(
        input_ids=piece.input_ids,
        position_ids=piece.position_ids,
        attention_mask=None,  # nor is one built for PACKED: `segments` says all there is to say
        segments=piece.segments,
        use_cache=False,
    ).last_hidden_state[0]


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def pack_loss(model: PreTrainedModel, piece: Pack) -> torch.Tensor:
    """Sum of the cross-entropy of the pack's supervised tokens, in nats."""
    supervised = piece.targets != IGNORED  # the head is the costliest layer: only these tokens need it
    hidden = _hidden(model, piece)[supervised]
    return head_loss(hidden, model.get_output_embeddings(), piece.targets[supervised], _softcap(model)).sum()


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: list[dict], tokens_per_pack: int) -> dict[str, tuple[float, int]]:
    """For each row ({id, input_ids, labels}), by its id: the sum of the cross-entropy of its supervised tokens, in
    nats, and how many there are."""
    found = {}
    for piece in pack(rows, tokens_per_pack):
        supervised = piece.targets != IGNORED
        on_device = piece.to(model.device)
        hidden = _hidden(model, on_device)[supervised.to(model.device)]
        targets = on_device.targets[supervised.to(model.device)]
        losses = torch.zeros(len(supervised))
        losses[supervised] = head_loss(hidden, model.get_output_embeddings(), targets, _softcap(model)).cpu()
        for name, start, end in piece.rows:
            found[name] = float(losses[start:end].double().sum()), int(supervised[start:end].sum())
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
