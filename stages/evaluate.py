"""A model and the test rows in; every answer beside its reference out, and its scores.

    python -m stages.evaluate models/merged data/conversations/test.jsonl data/conversations/learned.jsonl \
        data/tokens/test.parquet data/answers/tuned.jsonl metrics/tuned.json
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pyarrow.parquet
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from stages import conversation, timing
from stages.answers import answer, completeness, stops_of
from stages.models import vllm_engine
from stages.models.generate import Answer
from stages.models.load import load_model, mean_loss, row_losses
from stages.models.machine import Resolved, add_in_one_order, resolve
from stages.outputs import refuse_without_room, write_json, write_jsonl
from stages.params import Params, load
from stages.refusal import Refusal, die_with_parent, run

TOKEN_BYTES = 16  # of an answer's text, with what a task shows of it


def answer_on(device: str, folder: Path, params: Params, machine: Resolved, prompts: list[list[int]]) -> list[Answer]:
    """What a process of its own does: load the model on its device and answer its share."""
    if machine.deterministic:
        add_in_one_order()
    if machine.engine == "batches":
        return answer(load_model(folder, device, machine.dtype), folder, params, machine, prompts)
    return vllm_engine.answer(
        folder,
        device,
        str(machine.dtype).removeprefix("torch."),
        prompts,
        stops_of(folder),
        params.evaluate.max_new_tokens,
        completeness(folder, params),
    )


def answer_on_all(
    folder: Path, params: Params, machine: Resolved, prompts: list[list[int]], on_batch: Callable[[int], None]
) -> list[Answer]:
    """Answers in the order of the prompts, each device with as many of each length as the others."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shares = [order[number :: len(machine.devices)] for number in range(len(machine.devices))]
    answers: dict[int, Answer] = {}
    workers = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), workers, initializer=die_with_parent, initargs=(os.getpid(),)) as pool:
        work = {
            pool.submit(answer_on, device, folder, params, machine, [prompts[i] for i in share]): share
            for device, share in zip(machine.devices, shares, strict=True)
            if share
        }
        for done in as_completed(work):
            answers.update(zip(work[done], done.result(), strict=True))
            on_batch(len(work[done]))
    return [answers[i] for i in range(len(prompts))]


def main(arguments: list[str]) -> None:
    folder, conversations, learned, tokens, answers_file, metrics = (Path(argument) for argument in arguments)
    params = load()
    began = time.monotonic()
    machine = resolve(params.machine)
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    facets = getattr(task, "facets", lambda row: {})
    encoded = {row["id"]: row for row in pyarrow.parquet.read_table(tokens).to_pylist()}
    # ids are hashes, so that the first of them are an even sample and stay the same when rows are added
    rows = sorted(conversation.read(conversations), key=lambda row: row.id)[: params.evaluate.rows]
    answers_bytes = TOKEN_BYTES * params.evaluate.max_new_tokens * len(rows)
    refuse_without_room(answers_file, conversations.stat().st_size + answers_bytes)
    model = load_model(folder, machine.device, machine.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    losses = row_losses(model, [encoded[row.id] for row in rows], machine.tokens_per_pack)
    wrong = [row.where for row in rows if not math.isfinite(losses[row.id][0])]
    if wrong:
        raise Refusal(f"{folder}: the loss on {wrong[0]} is not finite; see to the weights")
    prompts = [encoded[row.id]["input_ids"][: encoded[row.id]["prompt_tokens"]] for row in rows]
    generating = time.monotonic()
    with tqdm(total=len(rows), unit="answer", file=sys.stderr, mininterval=1.0) as bar:
        if len(machine.devices) == 1 and machine.engine == "batches":
            found = answer(model, folder, params, machine, prompts, bar.update)
        else:
            del model
            torch.cuda.empty_cache()  # the worker of this GPU needs the room
            found = answer_on_all(folder, params, machine, prompts, bar.update)
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
