"""The form between prepare, encode and evaluate: a conversation that ends with the answer to learn, one a line."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SIDES = ("train", "validation", "test")
Role = Literal["system", "user", "assistant"]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    content: str


class Conversation(BaseModel):
    """Messages of which the last is the assistant's, and what the task needs to score another answer in its place.

    `groups` names, for each way to group, the group that the row belongs to: rows of one group stay on one side of
    the split. `where` is the row's place in its source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    where: str
    messages: list[Message]
    groups: dict[str, str]
    context: dict[str, Any]

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        return self.messages[-1].content

    @property
    def prompt_key(self) -> str:
        """What the prompt asks, for finding the same prompt again."""
        return json.dumps([(m.role, m.content) for m in self.prompt], ensure_ascii=False)


def conversation(
    where: str, prompt: list[Message], answer: str, groups: dict[str, str], **context: Any
) -> Conversation:
    """A conversation whose id depends on its texts alone, so that exact duplicates share it."""
    messages = [*prompt, Message(role="assistant", content=answer)]
    texts = json.dumps([(m.role, m.content) for m in messages], ensure_ascii=False)
    identity = hashlib.sha256(texts.encode()).hexdigest()[:16]
    return Conversation(id=identity, where=where, messages=messages, groups=groups, context=context)


def read(path: Path) -> Iterator[Conversation]:
    """Yield the conversations of a JSONL file that prepare wrote."""
    with path.open("rb") as file:
        for line in file:
            yield Conversation.model_validate_json(line)


@dataclass(frozen=True)
class Stored:
    """The conversations of a file that prepare wrote, read anew whenever they are asked for."""

    path: Path

    def __iter__(self) -> Iterator[Conversation]:
        return read(self.path)
