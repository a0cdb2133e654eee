"""Attention over packed rows, in which no row sees another: `attn_implementation="packed"`.

Registered with transformers on import. What sees what comes as the keyword `segments` of the model's forward pass
(packs.Pack.segments); no mask is built for the pack as a whole.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from stages.models.packs import Segment, Sight

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch 2.9, on which torch-xla runs
    varlen_attn = None

PACKED = "packed"
# PyTorch 2.11 takes grouped queries without being told
GROUPED = {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Spread(NamedTuple):
    """What each token of several packs, all as long, sees: those before it in its own segment, and the segment that it
    shares, -1 for none. [packs, T] each; positions count from each row's beginning."""

    positions: torch.Tensor
    own: torch.Tensor
    shared: torch.Tensor

    def seen(self, window: int | None) -> torch.Tensor:
        """[packs, 1, T, T], True where the query sees the key."""
        apart = self.positions[:, :, None] - self.positions[:, None, :]
        same = self.own[:, :, None] == self.own[:, None, :]
        mask = (same & (apart >= 0)) | (self.shared[:, :, None] == self.own[:, None, :])
        return (mask if window is None else mask & (apart < window))[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: tuple[Segment, ...] | None = None,
    sight: Sight | None = None,
    spread: Spread | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment and over what it shares. query: [1, H, T, D]; key, value: [1, G, T, D],
    G a divisor of H.

    Returns [1, T, H, D]; with `spread` for as many packs as it has. `sliding_window` counts the tokens that one sees,
    itself among them; `softcap` bounds the scores by c·tanh(s/c) before the softmax, as Gemma 2 does.
    """
    assert attention_mask is None, "packed rows know what they see and take no mask"
    if sight is not None:
        assert softcap is None, "flash attention does not bound its scores"
        return _flash(query, key, value, sight, scaling, sliding_window)[None], None
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True)
    if softcap is not None:
        attend = functools.partial(_softcapped, dropout_p=dropout, scale=scaling, softcap=softcap)
    if spread is not None:
        return attend(query, key, value, attn_mask=spread.seen(sliding_window)).transpose(1, 2), None
    dtype = query.dtype
    if query.device.type == "cpu":  # whose kernels take twice as long for bfloat16, backward, as for float32
        query, key, value = query.float(), key.float(), value.float()
    parts = []
    for start, end, shared_start, shared_end in segments:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if shared_end > shared_start:
            k, v = (torch.cat((x[:, :, shared_start:shared_end], own), dim=2) for x, own in ((key, k), (value, v)))
        queries, keys = q.shape[2], k.shape[2]
        if softcap is None and queries == keys and (sliding_window is None or keys <= sliding_window):
            parts.append(attend(q, k, v, is_causal=True))
        else:
            parts.append(attend(q, k, v, attn_mask=seen(queries, keys, sliding_window, q.device)))
    return torch.cat(parts, dim=2).to(dtype).transpose(1, 2), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same by PyTorch's flash attention over rows of different lengths: one kernel for all segments."""
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if sight.index is not None:
        # of keys that no segment sees the kernel leaves the gradient as it finds the memory
        seen = (torch.arange(len(sight.index), device=key.device) < sight.keys[-1])[:, None, None]
        key, value = (torch.where(seen, x.index_select(0, sight.index), 0) for x in (key, value))
    return varlen_attn(
        query,
        key,
        value,
        sight.queries,
        sight.keys,
        sight.most_queries,
        sight.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED,
    )


def takes_flash(model: PreTrainedModel) -> bool:
    """Whether the kernel serves this model here: on a GPU from Ampere on, in a 16-bit format, heads of at most 256,
    and scores that nothing bounds, as Gemma 2 bounds its own."""
    config = model.config.get_text_config()
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return model.dtype in (torch.bfloat16, torch.float16) and size <= 256 and not capped


def seen(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], True where the query sees the key, the last query standing at the last key: a part of a larger
    mask, which all lengths share, since there may be as many lengths as rows."""
    mask = _square(1 << (keys - 1).bit_length(), window, device)
    return mask[keys - queries : keys, :keys]


@functools.lru_cache(maxsize=32)  # sizes are powers of two, so that all are no more than a third above the largest
def _square(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[tokens, tokens], True where a token sees another: itself and those before it, `window` of them at most."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor,
    dropout_p: float,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), dropout_p)
    return weights @ v


AttentionInterface.register(PACKED, packed_attention)
