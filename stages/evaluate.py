"""A model and the test rows in; every answer beside its reference out, and its scores.

    python -m stages.evaluate models/merged data/conversations/test.jsonl data/conversations/learned.jsonl \
        data/tokens/test.parquet data/answers/tuned.jsonl metrics/tuned.json
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import importlib
import json
import math
import sys
import time
from pathlib import Path

import pyarrow.parquet
from tqdm import tqdm
from transformers import AutoTokenizer

from stages import conversation, timing
from stages.models.generate import attention_for_generation, generate
from stages.models.load import load_model, mean_loss, row_losses
from stages.models.machine import resolve
from stages.outputs import write_json, write_jsonl
from stages.params import load
from stages.refusal import run


def main(arguments: list[str]) -> None:
    folder, conversations, learned, tokens, answers_file, metrics = (Path(argument) for argument in arguments)
    params = load()
    began = time.monotonic()
    machine = resolve(params.machine)
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    facets = getattr(task, "facets", lambda row: {})
    complete = getattr(task, "complete", lambda text: False)
    encoded = {row["id"]: row for row in pyarrow.parquet.read_table(tokens).to_pylist()}
    # ids are hashes, so that the first of them are an even sample and stay the same when rows are added
    rows = sorted(conversation.read(conversations), key=lambda row: row.id)[: params.evaluate.rows]
    model = load_model(folder, machine.device, machine.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    losses = row_losses(model, [encoded[row.id] for row in rows], machine.tokens_per_pack)
    stops = model.generation_config.eos_token_id
    model.set_attn_implementation(attention_for_generation(model))
    generating = time.monotonic()
    with tqdm(total=len(rows), unit="answer", file=sys.stderr, mininterval=1.0) as bar:
        found = generate(
            model,
            [encoded[row.id]["input_ids"][: encoded[row.id]["prompt_tokens"]] for row in rows],
            {stops} if isinstance(stops, int) else set(stops),
            params.evaluate.max_new_tokens,
            machine.rows_per_batch,
            complete=lambda tokens: complete(tokenizer.decode(tokens, skip_special_tokens=True)),
            on_batch=bar.update,
        )
    generated = time.monotonic()
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in found]
    with learned.open(encoding="utf-8") as file:
        training = [map(json.loads, file)] if getattr(task, "TRAINING", False) else []
        if hasattr(task, "score_and_show"):
            scores, shown = zip(*task.score_and_show(rows, texts, params.task, *training), strict=True)
            shown = [{"shown": one} for one in shown]
        else:
            scores = list(task.score(rows, texts, params.task, *training))
            shown = [{}] * len(rows)
    write_jsonl(
        answers_file,
        (
            {
                "id": row.id,
                "where": row.where,
                "prompt": row.prompt[-1].content,
                "reference": row.reference,
                "answer": text,
                "stopped": answer.stopped,
                "scores": score,
                "facets": facets(row),
                "group": row.groups[params.prepare.group_by],
                "nats": losses[row.id][0],
                "tokens": losses[row.id][1],
                **more,
            }
            for row, text, answer, score, more in zip(rows, texts, found, scores, shown, strict=True)
        ),
    )
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    means["stop_rate"] = sum(answer.stopped for answer in found) / len(found)
    means["loss"] = mean_loss(losses.values())
    means["perplexity"] = math.exp(means["loss"])
    write_json(metrics, {"rows": len(rows), **{name: round(value, 6) for name, value in means.items()}})
    timing.record(
        f"evaluate_{metrics.stem}",
        seconds=round(time.monotonic() - began, 1),
        generation_seconds=round(generated - generating, 1),
        scoring_seconds=round(time.monotonic() - generated, 1),
        tokens_per_second=round(sum(len(answer.tokens) for answer in found) / (generated - generating), 1),
        peak_gib=timing.peak_gib(),
    )
    print(", ".join(f"{name} {value:.4g}" for name, value in means.items()), file=sys.stderr)


if __name__ == "__main__":
    run(main)
