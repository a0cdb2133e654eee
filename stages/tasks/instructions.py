"""Alpaca's form: instruction, an input that may be empty, output; under English or Chinese headings."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel

from stages.conversation import Conversation, Message, conversation
from stages.params import Section
from stages.rows import Record, Text, Words
from stages.scores import chrf, length_ratio, memorised, rouge_l

HEADLINE = "rouge_l"
TRAINING = True  # score is given the training rows' answers
HEADINGS = {
    "english": ("### Instruction:", "### Input:", "### Response:"),
    "chinese": ("### 指令:", "### 输入:", "### 回答:"),
}


class Options(Section):
    name: Literal["instructions"]
    rows: str
    headings: Literal["english", "chinese"]

    def files(self) -> dict[str, str]:
        return {"rows": self.rows}


class Row(BaseModel):
    instruction: Text
    input: Words = ""
    output: Text


def conversations(files: dict[str, Iterator[Record]], options: Options) -> Iterator[Conversation]:
    """Yield a conversation for each row; the input's heading is left out where the input is empty."""
    instruction, given, response = HEADINGS[options.headings]
    for record in files["rows"]:
        row = record.as_row(Row)
        parts = [f"{instruction}\n{row.instruction.strip()}"]
        if row.input.strip():
            parts.append(f"{given}\n{row.input.strip()}")
        prompt = [Message(role="user", content="\n\n".join([*parts, response]))]
        yield conversation(record.where, prompt, row.output.strip(), {"instruction": row.instruction.strip().lower()})


def scores(answer: str, reference: str) -> dict[str, float]:
    """ROUGE-L, chrF, the answer's length to the reference's, and whether they are the same."""
    answer, reference = answer.strip(), reference.strip()
    return {
        "rouge_l": rouge_l(answer, reference),
        "chrf": chrf(answer, reference),
        "length_ratio": length_ratio(answer, reference),
        "exact_match": answer == reference,
    }


def score(
    conversations: list[Conversation], answers: list[str], _options: Options, training: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of each answer, and how much of it stands in the training rows' answers."""
    copied = memorised(answers, [row.prompt[-1].content for row in conversations], training)
    for row, answer, share in zip(conversations, answers, copied, strict=True):
        yield {**scores(answer, row.reference), "memorised": share}
