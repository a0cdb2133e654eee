"""Base and adapter in; one model out, in the base's format, after a check that it still is the one that was trained.

python -m stages.merge models/base models/adapter data/tokens/test.parquet models/merged metrics/merge.json
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import functools
import math
import shutil
import sys
import time
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from stages import timing
from stages.models.load import load_model, packed_logits
from stages.models.lora import load_adapter
from stages.models.machine import Resolved, resolve
from stages.models.merging import plan, read_weights, write_merged
from stages.models.packs import pack
from stages.models.quantized import round_weights
from stages.models.streamed import in_step
from stages.models.unloaded import Uncovered, give_buffers
from stages.outputs import new_folder, refuse_without_room, write_json
from stages.params import load
from stages.refusal import Refusal, run

BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "processor_config.json",  # of images and sound, which a multimodal model still understands
    "preprocessor_config.json",
)
AT_ONCE = 16  # tokens compared: each takes a few times its vocabulary in float32


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, row: dict, device: str) -> torch.Tensor:
    """The logits of the row's tokens from the end of its prompt on: [tokens, vocabulary], on the CPU."""
    (piece,) = pack([row], len(row["input_ids"]))
    return packed_logits(model, piece.to(device), slice(row["prompt_tokens"] - 1, None)).cpu()


def answers_logits(
    folder: Path, adapter: Path | None, rows: list[dict], machine: Resolved, quantize: str | None = None
) -> list[torch.Tensor]:
    """Those of each row, from the model in `folder`, with the adapter on it. Where its files can be read a layer at a
    time, memory holds no more than a layer; the figures are the same."""
    device = machine.device
    try:
        planned = plan(folder, adapter, machine.dtype)
        give_buffers(planned.model, set(planned.sources), folder, device)
    except Uncovered:
        model = load_model(folder, device, machine.dtype, quantize=quantize)
        model = load_adapter(model, adapter).get_base_model() if adapter else model
        return [answer_logits(model, row, device) for row in rows]
    calls = [functools.partial(answer_logits, planned.model, row, device) for row in rows]
    return in_step(planned.model, read_weights(planned, device, quantize), calls)


def compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Kullback-Leibler divergence of `after` from `before` in nats a token, largest and mean, and the share of
    tokens on which both would choose the same."""
    divergences, agreements = [], []
    for before_row, after_row in zip(before, after, strict=True):
        for old, new in zip(before_row.split(AT_ONCE), after_row.split(AT_ONCE), strict=True):
            p, q = old.float().log_softmax(-1), new.float().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
            agreements.append(old.argmax(-1) == new.argmax(-1))
    divergence, agreement = torch.cat(divergences), torch.cat(agreements).float()
    return {
        "greedy_agreement": round(float(agreement.mean()), 6),
        "max_kl": round(float(divergence.max().clamp(min=0)), 6),
        "mean_kl": round(float(divergence.mean().clamp(min=0)), 6),
    }


def merge(model: PreTrainedModel, adapter: Path, quantize: str | None) -> PreTrainedModel:
    """The plain model with the adapter's product added to its weights; with `quantize`, to the values that these had
    while the adapter was trained on them quantized."""
    if quantize:
        round_weights(model, quantize)
    return load_adapter(model, adapter).merge_and_unload(safe_merge=True)


def repair(generation: GenerationConfig) -> GenerationConfig:
    """Sampling values of a model that does not sample make transformers refuse to save it: let it sample."""
    sampling = ("temperature", "top_p", "top_k", "min_p", "typical_p")
    plain = GenerationConfig()
    if not generation.do_sample and any(getattr(generation, k) not in (None, getattr(plain, k)) for k in sampling):
        generation.do_sample = True
    return generation


def write_model(
    base: Path, adapter: Path, folder: Path, max_shard_size: str, device: str, quantize: str | None
) -> None:
    """Fill `folder` with the merged model in the base's own format, whatever this machine computes fastest: a block of
    a tensor at a time, or, where that is not sure to give the same bytes, in memory by PEFT."""
    stored = AutoConfig.from_pretrained(base, local_files_only=True).dtype or torch.bfloat16
    generation = repair(GenerationConfig.from_pretrained(base, local_files_only=True))
    try:
        planned = plan(base, adapter, stored)
        write_merged(planned, folder, max_shard_size, device, quantize, generation)
        print(f"merged {len(planned.layers)} of {len(planned.files)} tensors, a block at a time", file=sys.stderr)
    except Uncovered as reason:
        print(f"merging in memory, the whole model at once: {reason}", file=sys.stderr)
        merged = merge(load_model(base, device, stored), adapter, quantize)
        merged.generation_config = generation
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in BESIDE:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)


def main(arguments: list[str]) -> None:
    base, adapter, tokens, out, metrics = (Path(argument) for argument in arguments)
    params = load()
    began = time.monotonic()
    machine = resolve(params.machine)
    rows = pyarrow.parquet.read_table(tokens).slice(0, params.merge.rows).to_pylist()
    quantize = params.lora.quantize
    refuse_without_room(out, sum(path.stat().st_size for path in base.glob("*.safetensors")))
    before = answers_logits(base, adapter, rows, machine, quantize)
    onto = quantize if params.merge.onto == "trained" else None
    with new_folder(out) as folder:
        write_model(base, adapter, folder, params.merge.max_shard_size, machine.device, onto)
        after = answers_logits(folder, None, rows, machine)
        found = compare(before, after)
        if not math.isfinite(found["max_kl"]):
            raise Refusal(
                f"{base}: gives what is no number on a test row, with the adapter or merged; see to its weights"
            )
        if found["max_kl"] > params.merge.max_kl:
            raise Refusal(
                f"the merged model is not the one that was trained: KL {found['max_kl']} nats a token at worst, "
                f"over merge.max_kl = {params.merge.max_kl}; a lower train.learning_rate or lora.alpha makes smaller "
                "adapters, which the base's format rounds less"
            )
    write_json(metrics, {"rows": len(rows), **found})
    timing.record("merge", seconds=round(time.monotonic() - began, 1), peak_gib=timing.peak_gib())
    print(f"adapter and merged model agree on {found['greedy_agreement']:.1%} of tokens", file=sys.stderr)


if __name__ == "__main__":
    run(main)
