"""Conversations in; tokens out, with the supervised ones marked: each answer and its terminator, nothing else.

    python -m stages.encode models/base data/conversations data/tokens metrics/tokens.json

What would waste hours of training unseen stops here in seconds, in one line that names the row.
"""

import itertools
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages import conversation
from stages.conversation import SIDES, Conversation
from stages.outputs import new_folder, refuse_without_room, write_json
from stages.params import load
from stages.refusal import Refusal, run

TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)
IGNORED = -100  # the label of a token that the loss leaves out; torch's own default
ROWS_AT_ONCE = 1000
TOKENS_SHARE = 0.1  # of the conversations' bytes, at least: the default run's, whose rows carry their tables
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("prompt_tokens", pyarrow.int32()),
    ]
)


@dataclass(frozen=True)
class Encoded:
    """One row's tokens; `labels` repeats the supervised ones and is IGNORED elsewhere.

    `prompt_tokens` is the number of tokens before the last answer, which is what generation starts from.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int


class Encoder:
    """A model's tokenizer and chat template, turned on conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, terminators: set[int]):
        self.tokenizer = tokenizer
        self.terminators = terminators
        if tokenizer.is_fast:
            # a tokenizer.json can ask for both, and transformers lifts them at its own calls alone
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self.takes_system = takes_system(tokenizer)
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id

    def encode(self, batches: Iterable[list[Conversation]], only_last: bool = False) -> Iterator[list[Encoded]]:
        """Encode batches of rows, with each answer supervised or `only_last` the last one; raises Refusal naming a
        row that cannot be right. The tokenizer, which needs no interpreter, has one batch while the next one's
        texts are written."""
        waiting: deque[tuple[list[Conversation], list[list[int]], Future]] = deque()
        with ThreadPoolExecutor(1) as tokenizing:
            for rows in batches:
                # each answer needs two texts: what stands before it, and the same with the answer
                turns = [[i for i, m in enumerate(row.messages) if m.role == "assistant"] for row in rows]
                if only_last:
                    turns = [answers[-1:] for answers in turns]
                texts = self._texts([(row, i) for row, answers in zip(rows, turns, strict=True) for i in answers])
                waiting.append((rows, turns, tokenizing.submit(self._tokens, texts)))
                if len(waiting) == 2:
                    yield self._rows(*waiting.popleft())
            while waiting:
                yield self._rows(*waiting.popleft())

    def _rows(self, rows: list[Conversation], turns: list[list[int]], tokens: Future) -> list[Encoded]:
        found = iter(tokens.result())
        return [
            self._row(row, [(next(found), next(found)) for _ in answers])
            for row, answers in zip(rows, turns, strict=True)
        ]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Every text's tokens, on all cores; by the tokenizer's backend where it has one, whose call through
        transformers takes three times as long for masks that nobody reads."""
        if not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False).input_ids
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _texts(self, answers: list[tuple[Conversation, int]]) -> list[str]:
        """For each answer, given by its row and place, the text before it and the text with it, one after another.
        Written in two calls, since one for each text takes twice as long."""
        before = [self._turns(row, i) for row, i in answers]
        with_it = [self._turns(row, i + 1) for row, i in answers]
        try:
            pairs = zip(self._render(before, open_turn=True), self._render(with_it, open_turn=False), strict=True)
        except TEMPLATE_ERRORS:  # then one after another, to name the first
            pairs = []
            for (row, _), *turns in zip(answers, before, with_it, strict=True):
                try:
                    pairs.append((*self._render(turns[:1], open_turn=True), *self._render(turns[1:], open_turn=False)))
                except TEMPLATE_ERRORS as error:
                    raise Refusal(f"{row.where}: the chat template refuses the row: {error}") from None
        return [text for pair in pairs for text in pair]

    def _turns(self, row: Conversation, until: int) -> list[dict[str, str]]:
        messages = [{"role": message.role, "content": message.content} for message in row.messages[:until]]
        if not self.takes_system and messages[0]["role"] == "system" and until > 1:
            system, first, *others = messages
            messages = [first | {"content": f"{system['content'].strip()}\n\n{first['content']}"}, *others]
        return messages

    def _render(self, turns: list[list[dict[str, str]]], open_turn: bool) -> list[str]:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn)

    def _row(self, row: Conversation, turns: list[tuple[list[int], list[int]]]) -> Encoded:
        bos = self.tokenizer.bos_token_id
        input_ids = turns[-1][1]
        if bos is not None and input_ids[:2] == [bos, bos]:
            raise Refusal(f"{row.where}: begins with BOS twice; take it out of the chat template or the text")
        if self.adds_bos and input_ids[0] != bos:
            raise Refusal(
                f"{row.where}: does not begin with BOS, which this model was trained with; mend the chat template"
            )
        labels = [IGNORED] * len(input_ids)
        for prompt, whole in turns:
            if whole[: len(prompt)] != prompt or (whole is not input_ids and input_ids[: len(prompt)] != prompt):
                raise Refusal(
                    f"{row.where}: the prompt's tokens are not how the whole row begins; mend the chat template"
                )
            end = next((i for i in range(len(whole), 0, -1) if whole[i - 1] in self.terminators), 0)
            if end <= len(prompt):
                raise Refusal(f"{row.where}: no terminator after the answer; the model would never learn to stop")
            if end == len(prompt) + 1:
                raise Refusal(f"{row.where}: nothing is supervised, the answer is empty; write it or leave the row out")
            if input_ids[:end] != whole[:end]:
                raise Refusal(f"{row.where}: an earlier turn changes when later ones follow; mend the chat template")
            labels[len(prompt) : end] = whole[len(prompt) : end]
        # nothing after the last terminator is learned or read
        return Encoded(row.id, input_ids[:end], labels[:end], len(turns[-1][0]))


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a system message; those of Gemma 1 and 2 refuse it, and some leave it out. Where
    it does not, the message goes before the first user's, as Gemma 3's own template has it."""
    turns = [{"role": "system", "content": "system text"}, {"role": "user", "content": "x"}]
    try:
        return "system text" in tokenizer.apply_chat_template(turns, tokenize=False)
    except TEMPLATE_ERRORS:
        return False


def with_examples(row: Conversation, examples: list[Conversation]) -> Conversation:
    """The row with the examples as earlier turns of its conversation, after its own system message."""
    opening = [message for message in row.messages[:1] if message.role == "system"]
    turns = [message for example in examples for message in example.messages if message.role != "system"]
    return row.model_copy(update={"messages": [*opening, *turns, *row.messages[len(opening) :]]})


def write(path: Path, rows: Iterator[list[Encoded]]) -> None:
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as file:
        for batch in rows:
            columns = {name: [getattr(row, name) for row in batch] for name in SCHEMA.names}
            file.write_table(pyarrow.Table.from_pydict(columns, SCHEMA))


def cut(rows: Iterable[Encoded], max_length: int, counts: Counter) -> Iterator[Encoded]:
    """Cut rows to `max_length` tokens, counting them; one with no supervised token left is dropped and counted."""
    for row in rows:
        counts["tokens"] += len(row.input_ids)
        if len(row.input_ids) <= max_length:
            yield row
            continue
        counts["truncated"] += 1
        labels = row.labels[:max_length]
        if all(label == IGNORED for label in labels):
            counts["dropped"] += 1
        else:
            yield Encoded(row.id, row.input_ids[:max_length], labels, row.prompt_tokens)


def marked(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's text with its supervised parts between ⟦ and ⟧."""
    pieces = []
    for supervised, group in itertools.groupby(range(len(row.labels)), key=lambda i: row.labels[i] != IGNORED):
        text = tokenizer.decode([row.input_ids[i] for i in group], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if supervised else text)
    return "".join(pieces)


def terminators(base: Path) -> set[int]:
    """The tokens that end an answer, as the model's generation_config.json names them."""
    file = base / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    if stops is None:
        raise Refusal(f"{file}: names no eos_token_id, so no answer could end; write one, as the model's card says it")
    return {stops} if isinstance(stops, int) else set(stops)


def main(arguments: list[str]) -> None:
    base, conversations, out, metrics = (Path(argument) for argument in arguments)
    params = load()
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    encoder = Encoder(tokenizer, terminators(base))
    totals: dict[str, Counter] = {}
    sample: list[str] = []
    examples: list[Conversation] = []

    def read(name: str) -> Iterator[Conversation]:
        """The rows of one side; of the training rows those with the first ids are kept as examples: ids are hashes, so
        that these are an even sample, and few rows that are added later come before."""
        for row in conversation.read(conversations / f"{name}.jsonl"):
            yield row
            if name == "train" and (len(examples) < params.evaluate.shots or row.id < examples[-1].id):
                examples[:] = sorted([*examples, row], key=lambda row: row.id)[: params.evaluate.shots]

    def encoded(name: str) -> Iterator[list[Encoded]]:
        """The rows of one side, batch by batch, counted and a few of them kept for the sample."""
        counts = totals[name] = Counter()
        # test rows are generated from, whatever their length
        limit = params.encode.max_length if name != "test" else sys.maxsize
        for batch in encoder.encode(batches(read(name))):
            kept = list(cut(batch, limit, counts))
            counts["rows"] += len(kept)
            counts["supervised"] += sum(len(row.labels) - row.labels.count(IGNORED) for row in kept)
            sample.extend(marked(row, tokenizer) for row in kept[: 5 - len(sample)])
            yield kept

    texts = sum(path.stat().st_size for path in conversations.glob("*.jsonl"))
    refuse_without_room(out, int(TOKENS_SHARE * texts))
    with new_folder(out) as folder:
        for name in SIDES:
            write(folder / f"{name}.parquet", encoded(name))
            if name != "test" and not totals[name]["rows"]:
                raise Refusal(
                    f"every {name} row's answer begins after token {params.encode.max_length}; raise encode.max_length"
                )
        shown = (with_examples(row, examples) for row in conversation.read(conversations / "test.jsonl"))
        write(folder / "test_few_shot.parquet", encoder.encode(batches(shown), only_last=True))
        (folder / "sample.txt").write_text(("\n" + "-" * 80 + "\n").join(sample) + "\n", encoding="utf-8")
    kinds = ("rows", "tokens", "supervised", "truncated", "dropped")
    write_json(metrics, {f"{name}_{kind}": totals[name][kind] for name in SIDES for kind in kinds})
    for name in SIDES:
        print(f"{name}: " + ", ".join(f"{totals[name][kind]} {kind}" for kind in kinds), file=sys.stderr)


def batches(rows: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield batch


if __name__ == "__main__":
    run(main)
