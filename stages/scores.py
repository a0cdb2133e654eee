"""Scores of an answer against its reference, a row at a time."""

import re

from sacrebleu.metrics import CHRF

# a run of letters and digits is a word; of scripts without spaces between words, each character is one
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


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
