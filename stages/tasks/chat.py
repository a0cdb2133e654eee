"""Bring your own conversations: rows of `messages`, each a role and a content, the last one the assistant's."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from stages.conversation import Conversation, Message, conversation
from stages.params import Section
from stages.refusal import Refusal
from stages.rows import NUL, Record
from stages.scores import chrf, memorised

HEADLINE = "chrf"
TRAINING = True  # score is given the training rows' answers


class Options(Section):
    name: Literal["chat"]
    rows: str

    def files(self) -> dict[str, str]:
        return {"rows": self.rows}


class Row(BaseModel):
    messages: list[Message] = Field(min_length=2)


def conversations(files: dict[str, Iterator[Record]], _options: Options) -> Iterator[Conversation]:
    """Yield each row's conversation; a system message may come first, then user and assistant take turns."""
    for record in files["rows"]:
        messages = record.as_row(Row).messages
        turns = [message.role for message in messages if message.role != "system"]
        expected = ["user", "assistant"] * (len(turns) // 2)
        if turns != expected or any(message.role == "system" for message in messages[1:]):
            roles = ", ".join(message.role for message in messages)
            raise Refusal(f"{record.where}: messages: the roles are {roles}; user and assistant must take turns")
        for number, message in enumerate(messages):
            if not message.content.strip():
                raise Refusal(f"{record.where}: messages.{number}.content is empty; write it or leave the row out")
            if NUL in message.content:
                raise Refusal(f"{record.where}: messages.{number}.content holds a NUL character; mend it")
        opening = next(message.content for message in messages if message.role == "user")
        groups = {"opening": " ".join(opening.lower().split())}
        yield conversation(record.where, messages[:-1], messages[-1].content, groups)


def scores(answer: str, reference: str) -> dict[str, float]:
    """chrF, and whether the answer is the reference, spaces at its ends aside."""
    answer, reference = answer.strip(), reference.strip()
    return {"chrf": chrf(answer, reference), "exact_match": answer == reference}


def score(
    conversations: list[Conversation], answers: list[str], _options: Options, training: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of each answer, and how much of it stands in the training rows' answers."""
    copied = memorised(answers, [row.prompt[-1].content for row in conversations], training)
    for row, answer, share in zip(conversations, answers, copied, strict=True):
        yield {**scores(answer, row.reference), "memorised": share}
