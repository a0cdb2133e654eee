"""Base and adapter in; one model out, in the base's format, after a check that it still is the one that was trained.

python -m stages.merge models/base models/adapter data/tokens/test.parquet models/merged metrics/merge.json
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import shutil
import sys
import time
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from stages import timing
from stages.models.load import load_model, packed_logits, round_to_nf4
from stages.models.lora import load_adapter
from stages.models.machine import resolve
from stages.models.merging import Uncovered, plan, write_merged
from stages.models.packs import pack
from stages.outputs import new_folder, write_json
from stages.params import load
from stages.refusal import Refusal, run

BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@torch.inference_mode()
def answers_logits(model: PreTrainedModel, rows: list[dict], device: str) -> list[torch.Tensor]:
    """For each row, the logits of the tokens from the end of its prompt on: [tokens, vocabulary], float32."""
    found = []
    for row in rows:
        (piece,) = pack([row], len(row["input_ids"]))
        found.append(packed_logits(model, piece.to(device), slice(row["prompt_tokens"] - 1, None)).float().cpu())
    return found


def compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Kullback-Leibler divergence of `after` from `before` in nats a token, largest and mean, and the share of
    tokens on which both would choose the same."""
    divergences, agreements = [], []
    for old, new in zip(before, after, strict=True):
        p, q = old.log_softmax(-1), new.log_softmax(-1)
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
        round_to_nf4(model)
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
    except Uncovered as reason:
        print(f"merging in memory, the whole model at once: {reason}", file=sys.stderr)
        merged = merge(load_model(base, device, stored), adapter, quantize)
        merged.generation_config = generation
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        print(f"merging {len(planned.layers)} of {len(planned.base)} tensors, a block at a time", file=sys.stderr)
        write_merged(planned, folder, max_shard_size, device, quantize, generation)
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
    tuned = load_adapter(load_model(base, machine.device, machine.dtype, quantize=quantize), adapter)
    before = answers_logits(tuned.get_base_model(), rows, machine.device)
    del tuned
    onto = quantize if params.merge.onto == "trained" else None
    with new_folder(out) as folder:
        write_model(base, adapter, folder, params.merge.max_shard_size, machine.device, onto)
        after = answers_logits(load_model(folder, machine.device, machine.dtype), rows, machine.device)
        found = compare(before, after)
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
