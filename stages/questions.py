"""A model in training in; the task's own score of its answers to validation rows out."""

import importlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from stages import conversation
from stages.answers import answer
from stages.models.machine import Resolved
from stages.models.ranks import Ranks
from stages.params import Params
from stages.refusal import Refusal


class Questions:
    """The validation rows that a model answers, again and again."""

    def __init__(self, folder: Path, validation_rows: list[dict], base: Path, params: Params, machine: Resolved):
        """folder: what the validation stage has made; validation_rows: as tokens.read_rows gives them."""
        self.folder, self.base, self.params, self.machine = folder, base, params, machine
        encoded = {row["id"]: row for row in validation_rows}
        self.rows, self.prompts = [], []
        for row in conversation.read(folder / "rows.jsonl"):
            found = encoded.get(row.id)
            if found and found["prompt_tokens"] <= len(found["input_ids"]):  # else encode has cut into the prompt
                self.rows.append(row)
                self.prompts.append(found["input_ids"][: found["prompt_tokens"]].tolist())
        if not self.rows:
            raise Refusal("params.yaml: train.metric is score, but no validation row is whole; raise encode.max_length")
        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    def score(self, model: PreTrainedModel, ranks: Ranks) -> float:
        """The mean of the task's score that decides, 0 to 1, of `model`'s answers; each process gives its share."""
        task = importlib.import_module(f"stages.tasks.{self.params.task.name}")
        own = range(ranks.number, len(self.rows), ranks.count)
        found = answer(model, self.base, self.params, self.machine, [self.prompts[i] for i in own])
        tokens = dict(zip(own, (one.tokens for one in found), strict=True))
        tokens = {number: answer for share in ranks.of_all(tokens) for number, answer in share.items()}
        if not ranks.first:
            return ranks.of_first(None)
        texts = [self.tokenizer.decode(tokens[i], skip_special_tokens=True).strip() for i in range(len(self.rows))]
        with (self.folder / "learned.jsonl").open(encoding="utf-8") as file:
            training = [map(json.loads, file)] if getattr(task, "TRAINING", False) else []
            scores = [score[task.HEADLINE] for score in task.score(self.rows, texts, self.params.task, *training)]
        return ranks.of_first(sum(scores) / len(scores))
