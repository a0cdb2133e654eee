"""Quotations completed in the form `Quote: …` newline `Author: …`, from rows with a quote and its author.

The rows are {quote, author} or, as in fortune files, {text} whose last line is `-- Author`; texts that name no author
are left out. The prompt gives the quotation's first words; the answer completes it and names the author.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from stages.conversation import Conversation, Message, conversation
from stages.params import Section
from stages.rows import Record, Text, Words
from stages.scores import chrf, memorised

HEADLINE = "right_author"
TRAINING = True  # score is given the training rows' answers
SIGNED = re.compile(r"\A(?P<quote>.+?)\s*\n\s*--\s*(?P<author>[^\n]+)\s*\Z", re.DOTALL)
FORM = re.compile(r"\AQuote: (?P<quote>.+)\nAuthor: (?P<author>[^\n]+)\Z", re.DOTALL)


class Options(Section):
    name: Literal["quotes"]
    rows: str
    given_words: int = Field(ge=1, le=100)
    longest: int = Field(ge=20)

    def files(self) -> dict[str, str]:
        return {"rows": self.rows}


class Row(BaseModel):
    quote: Text
    author: Text


class Fortune(BaseModel):
    text: Words


def conversations(files: dict[str, Iterator[Record]], options: Options) -> Iterator[Conversation]:
    """Yield a conversation for each quotation of at most `options.longest` characters that names its author."""
    for record in files["rows"]:
        row = _row(record)
        if row is None or len(row.quote) > options.longest:
            continue
        quote, author = " ".join(row.quote.split()), _author(row.author)
        given = " ".join(quote.split()[: options.given_words])
        prompt = [Message(role="user", content=f"Quote: {given}")]
        groups = {"author": author.lower(), "quote": quote.lower()}
        yield conversation(record.where, prompt, f"Quote: {quote}\nAuthor: {author}", groups)


def scores(answer: str, reference: str) -> dict[str, float]:
    """Whether the answer has the right form, and names the right author (case and spaces aside); chrF of the
    quotation, and whether all is the reference."""
    form, wanted = FORM.match(answer.strip()), FORM.match(reference)
    right = bool(form) and _author(form["author"]).lower() == _author(wanted["author"]).lower()
    quote = form["quote"] if form else answer.strip()
    exact = answer.strip() == reference
    return {
        "right_form": bool(form),
        "right_author": right,
        "chrf": chrf(quote, wanted["quote"]),
        "exact_match": exact,
    }


def score(
    conversations: list[Conversation], answers: list[str], _options: Options, training: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of each answer, and how much of it stands in the training rows' answers."""
    copied = memorised(answers, [row.prompt[-1].content for row in conversations], training)
    for row, answer, share in zip(conversations, answers, copied, strict=True):
        yield {**scores(answer, row.reference), "memorised": share}


def _row(record: Record) -> Row | None:
    if "text" not in record.fields:
        return record.as_row(Row)
    signed = SIGNED.match(record.as_row(Fortune).text)
    if not signed or not signed["quote"].strip() or not signed["author"].strip():
        return None
    return Row(quote=signed["quote"], author=signed["author"])


def _author(text: str) -> str:
    """A signature without the work it comes from: `Mark Twain, "Pudd'nhead Wilson"` is Mark Twain."""
    return re.split(r'[,("\[]', " ".join(text.split()))[0].strip(" .-") or text.strip()
