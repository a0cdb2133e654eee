"""Scores of an answer against its reference, and of all answers against the training rows."""

import re
from collections.abc import Iterable

from sacrebleu.metrics import CHRF

# a run of letters and digits is a word; of scripts without spaces between words, each character is one
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

RUN = 6  # words: of quotations by authors not trained on, runs of 6 hold 0.2% of the words, of 4 hold 4%


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one sentence, from 0 to 1 (Popović 2015), as sacrebleu computes it."""
    return CHRF().sentence_score(answer, [reference]).score / 100


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, from 0 to 1.

    Its usual implementation knows the words of ASCII alone, so that every Chinese answer would score 0.
    """
    mine, theirs = WORDS.findall(answer.lower()), WORDS.findall(reference.lower())
    longest = [0] * (len(theirs) + 1)  # with the first so many words of the reference
    for word in mine:
        before = 0
        for place, other in enumerate(theirs, start=1):
            above = longest[place]
            longest[place] = before + 1 if word == other else max(above, longest[place - 1])
            before = above
    return 2 * longest[-1] / max(1, len(mine) + len(theirs))


def length_ratio(answer: str, reference: str) -> float:
    """Characters of the answer to one of the reference, which is not empty."""
    return len(answer) / len(reference)


def memorised(answers: list[str], prompts: list[str], training: Iterable[str]) -> list[float]:
    """The share of each answer's words that lie in a run of at least RUN words which stands in a training text, case
    and marks aside; the words with which an answer repeats its prompt are left out.

    An answer counts as copied where its words stand verbatim in the training data, as n-gram novelty (McCoy et al.
    2023, "RAVEN") and extractable memorisation (Carlini et al. 2022, "Quantifying Memorization") have it. The latter
    asks for 50 tokens, longer than most quotations are.
    """
    own = [_own_words(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    written = {run for words in own for run in _runs(words)}
    # only what some answer holds is kept of the training texts, however many there are
    copied = {run for text in training for run in _runs(WORDS.findall(text.lower())) if run in written}
    return [_covered(words, copied) for words in own]


def _own_words(answer: str, prompt: str) -> list[str]:
    """The answer's words without those at its beginning that stand side by side in the prompt."""
    words, asked = WORDS.findall(answer.lower()), f" {' '.join(WORDS.findall(prompt.lower()))} "
    given = 0
    while given < len(words) and f" {' '.join(words[: given + 1])} " in asked:
        given += 1
    return words[given:]


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]


def _covered(words: list[str], copied: set[tuple[str, ...]]) -> float:
    """The share of the words that lie in one of the runs, from 0 to 1."""
    places: set[int] = set()
    for start, run in enumerate(_runs(words)):
        if run in copied:
            places.update(range(start, start + RUN))
    return len(places) / max(1, len(words))
