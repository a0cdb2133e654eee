"""A model and prompts in; its answers out, each as far as the task reads it."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.generate import Answer, attention_for_generation, generate
from stages.models.machine import Resolved
from stages.params import Params


def stops_of(folder: Path) -> set[int]:
    stops = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return {stops} if isinstance(stops, int) else set(stops)


def completeness(folder: Path, params: Params) -> Callable[[list[int]], bool]:
    """Whether the task says of an answer's tokens that more of them would not count."""
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    if not hasattr(task, "complete"):
        return lambda tokens: False
    tokenizer = _tokenizer(folder.resolve())
    return lambda tokens: task.complete(tokenizer.decode(tokens, skip_special_tokens=True))


@functools.cache  # opening it takes a second, and a model in training answers again and again
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def answer(
    model: PreTrainedModel,
    folder: Path,
    params: Params,
    machine: Resolved,
    prompts: list[list[int]],
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    model.set_attn_implementation(attention_for_generation(model))
    return generate(
        model,
        prompts,
        stops_of(folder),
        params.evaluate.max_new_tokens,
        machine.rows_per_batch,
        complete=completeness(folder, params),
        on_batch=on_batch,
    )
