"""Conversations to tokens on a tiny tokenizer: the answers and their terminators are supervised, nothing else."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from stages import encode
from stages.conversation import Conversation, Message, conversation
from stages.encode import IGNORED, Encoder
from stages.refusal import Refusal

STOPS = {1, 5}  # <eos>, <end_of_turn>


@pytest.fixture
def tokenizer(tiny_model):
    """Loaded anew for each test, which may change its template."""
    return AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)


def row(*contents: str, where: str = "mine.jsonl line 7") -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]
    return conversation(where, messages[:-1], contents[-1], {})


def supervised(tokenizer, encoded: encode.Encoded) -> list[str]:
    """The texts of the runs of supervised tokens."""
    shown = encode.marked(encoded, tokenizer)
    return re.findall(r"⟦(.*?)⟧", shown, re.DOTALL)


def test_the_answer_and_its_terminator_are_supervised_and_nothing_else(tokenizer):
    [[found]] = Encoder(tokenizer, STOPS).encode([[row("How many?", "Four – or 五.")]])
    assert supervised(tokenizer, found) == ["Four – or 五.<end_of_turn>"]
    assert tokenizer.decode(found.input_ids[: found.prompt_tokens]) == (
        "<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert found.labels[: found.prompt_tokens] == [IGNORED] * found.prompt_tokens
    assert found.labels[found.prompt_tokens :] == found.input_ids[found.prompt_tokens :]
    assert found.input_ids[-1] == 5


def test_every_answer_of_several_turns_is_supervised(tokenizer):
    [[found]] = Encoder(tokenizer, STOPS).encode([[row("One?", "First.", "Two?", "Second.", "Three?", "Third.")]])
    assert supervised(tokenizer, found) == ["First.<end_of_turn>", "Second.<end_of_turn>", "Third.<end_of_turn>"]
    assert tokenizer.decode(found.input_ids[found.prompt_tokens :]) == "Third.<end_of_turn>"
    assert all(label in (IGNORED, token) for label, token in zip(found.labels, found.input_ids, strict=True))


def test_rows_are_the_same_alone_and_together(tokenizer):
    rows = [row("One?", "First."), row("Two, which is longer?", "Second.", "Three?", "Third."), row("x", "y")]
    encoder = Encoder(tokenizer, STOPS)
    (together,) = encoder.encode([rows])
    assert [[one] for one in together] == list(encoder.encode([one] for one in rows))


@pytest.mark.parametrize(
    ("old", "new", "contents", "said"),
    [
        # the open turn is written otherwise than the turn that has its answer
        (
            "'<start_of_turn>model\\n'",
            "'<start_of_turn>model: '",
            ("x", "y"),
            "the prompt's tokens are not how the whole ",
        ),
        ("{{- bos_token -}}", "{{- bos_token ~ bos_token -}}", ("x", "y"), "begins with BOS twice; take it out of the"),
        ("{{- bos_token -}}", "", ("x", "y"), "does not begin with BOS, which this model was trained with; mend the"),
        ("<end_of_turn>", "<end>", ("x", "y"), "no terminator after the answer; the model would never learn to stop"),
        ("", "", ("x", "  "), "nothing is supervised, the answer is empty; write it or leave the row out"),
        ("", "", ("x", "y", "z", "\n"), "nothing is supervised, the answer is empty; write it or leave the row out"),
        ("", "", ("x", "", "z", "y"), "nothing is supervised, the answer is empty; write it or leave the row out"),
        # an answer that is followed by another turn loses its last letter, as templates do that drop its thoughts
        (
            "turn['content'] | trim",
            "(turn['content'] | trim)[:None if loop.last or expected == 'user' else -1]",
            ("x", "yes", "z", "no"),
            "an earlier turn changes when later ones follow; mend the chat template",
        ),
        (
            "messages[1:] if folded",
            "raise_exception('no!') if true",
            ("x", "y"),
            "the chat template refuses the row: no!",
        ),
    ],
)
def test_a_row_that_would_waste_the_training_is_refused_by_name(old, new, contents, said, tokenizer):
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new) if old else tokenizer.chat_template
    with pytest.raises(Refusal) as refused:
        list(Encoder(tokenizer, STOPS).encode([[row(*contents)]]))
    assert str(refused.value).startswith(f"mine.jsonl line 7: {said}")


def test_what_a_tokenizers_file_says_of_cutting_and_padding_is_passed_over(tokenizer):
    rows = [row("One?", "First."), row("Two, which is longer?", "Second.")]
    tokenizer.bos_token = None
    before = list(Encoder(tokenizer, STOPS).encode([rows]))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert list(Encoder(tokenizer, STOPS).encode([rows])) == before


def test_the_first_bad_row_of_many_is_named(tokenizer):
    rows = [row("x", "y", where="a line 1"), row("x", "", where="a line 2"), row("", "", where="a line 3")]
    with pytest.raises(Refusal, match=r"^a line 2: nothing is supervised"):
        list(Encoder(tokenizer, STOPS).encode([rows]))


def test_a_terminator_inside_the_question_is_not_taken_for_the_answers(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<end_of_turn>", "<end>")
    with pytest.raises(Refusal, match=r"no terminator after the answer"):
        list(Encoder(tokenizer, STOPS).encode([[row("x <end_of_turn> y", "z")]]))


def test_a_row_that_the_template_refuses_is_named_among_many(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}" + tokenizer.chat_template
    )
    rows = [row("a", "y", where="a line 1"), row("b", "y", where="a line 2"), row("b", "y", where="a line 3")]
    with pytest.raises(Refusal, match=r"^a line 2: the chat template refuses the row: no b"):
        list(Encoder(tokenizer, STOPS).encode([rows]))


# the stage


@pytest.fixture
def stage(tmp_path, tiny_model, params_file, monkeypatch):
    """Runs the stage in a folder of its own on rows by side, and gives its metrics."""
    monkeypatch.chdir(tmp_path)

    def go(max_length: int = 128, **sides: list[Conversation]) -> dict:
        params_file(tmp_path, **{"encode.max_length": max_length})
        Path("conversations").mkdir(exist_ok=True)
        for name in ("train", "validation", "test"):
            lines = [json.dumps(c.model_dump()) for c in sides.get(name, [row(f"{name}?", "yes")])]
            Path(f"conversations/{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        encode.main([str(tiny_model), "conversations", "tokens", "tokens.json"])
        return json.loads(Path("tokens.json").read_text())

    return go


def tokens(name: str) -> list[dict]:
    return pq.read_table(f"tokens/{name}.parquet").to_pylist()


def test_the_stage_writes_each_side_with_its_counts(stage, tokenizer):
    rows = [row(f"Question {n}?", f"Answer {n}.") for n in range(30)]
    metrics = stage(train=rows)
    written = tokens("train")
    assert [one["id"] for one in written] == [c.id for c in rows]
    assert written == [vars(one) for (one,) in Encoder(tokenizer, STOPS).encode([one] for one in rows)]
    assert (metrics["train_rows"], metrics["train_truncated"], metrics["train_dropped"]) == (30, 0, 0)
    assert metrics["train_tokens"] == sum(len(one["input_ids"]) for one in written)
    assert metrics["train_supervised"] == sum(label != IGNORED for one in written for label in one["labels"])
    assert (metrics["validation_rows"], metrics["test_rows"]) == (1, 1)


def test_long_rows_are_cut_and_counted_and_those_without_an_answer_left_are_dropped(stage):
    fits, cut, lost = row("x", "fits"), row("x", "long " * 99), row("long " * 99, "lost")
    metrics = stage(max_length=40, train=[fits, cut, lost], validation=[lost, fits])
    assert (metrics["train_rows"], metrics["train_truncated"], metrics["train_dropped"]) == (2, 2, 1)
    assert (metrics["validation_rows"], metrics["validation_truncated"], metrics["validation_dropped"]) == (1, 1, 1)
    first, second = tokens("train")
    assert (first["id"], second["id"]) == (fits.id, cut.id)
    assert len(second["input_ids"]) == len(second["labels"]) == 40
    assert second["labels"][-1] != IGNORED
    assert metrics["train_tokens"] > 200  # before the cut: what max_length would have to be


def test_test_rows_are_never_cut(stage):
    long = row("long " * 99, "long " * 99)
    metrics = stage(max_length=40, test=[long])
    assert (metrics["test_truncated"], metrics["test_dropped"]) == (0, 0)
    assert len(tokens("test")[0]["input_ids"]) == metrics["test_tokens"] > 400


def test_no_training_row_left_is_refused_and_leaves_no_tokens(stage):
    with pytest.raises(Refusal, match=r"^every train row's answer begins after token 8; raise encode.max_length$"):
        stage(max_length=8)
    assert not Path("tokens").exists()
    assert not Path("tokens.json").exists()


def test_a_bad_row_stops_the_stage_and_leaves_the_old_tokens(stage):
    stage()
    before = {path: path.read_bytes() for path in Path("tokens").iterdir()}
    with pytest.raises(Refusal, match=r"^mine.jsonl line 9: nothing is supervised"):
        stage(train=[row("new", "row")], test=[row("x", "", where="mine.jsonl line 9")])
    assert {path: path.read_bytes() for path in Path("tokens").iterdir()} == before


def test_the_sample_shows_five_rows_with_their_supervised_part(stage):
    stage(train=[row(f"Question {n}?", f"Answer {n}.", "Sure?", "Yes.") for n in range(30)])
    sample = Path("tokens/sample.txt").read_text()
    assert sample.count("<bos>") == 5
    assert sample.startswith(
        "<bos><start_of_turn>user\nQuestion 0?<end_of_turn>\n<start_of_turn>model\n⟦Answer 0.<end_"
    )
    assert sample.count("⟦Yes.<end_of_turn>⟧") == 5


def test_the_stage_writes_the_same_bytes_twice(stage):
    rows = [row(f"Question {n}?", f"Answer {n}.") for n in range(1500)]  # more than are encoded at once
    stage(train=rows)
    before = {path: path.read_bytes() for path in [*Path("tokens").iterdir(), Path("tokens.json")]}
    stage(train=rows)
    assert {path: path.read_bytes() for path in [*Path("tokens").iterdir(), Path("tokens.json")]} == before
    assert len(tokens("train")) == 1500


def test_examples_stand_before_the_question_and_only_its_own_answer_is_supervised(tokenizer):
    system = Message(role="system", content="Be brief.")
    asked = row("Three?", "Third.")
    asked = asked.model_copy(update={"messages": [system, *asked.messages]})
    shown = encode.with_examples(asked, [row("One?", "First."), row("Two?", "Second.")])
    assert [message.content for message in shown.messages] == [
        "Be brief.",
        *("One?", "First.", "Two?", "Second.", "Three?", "Third."),
    ]
    encoder = Encoder(tokenizer, STOPS)
    [[found]], [[whole]] = encoder.encode([[shown]], only_last=True), encoder.encode([[shown]])
    assert supervised(tokenizer, found) == ["Third.<end_of_turn>"]
    assert (found.input_ids, found.prompt_tokens) == (whole.input_ids, whole.prompt_tokens)


def test_the_examples_of_the_stage_are_training_rows_and_as_many_as_asked(
    tmp_path, tiny_model, params_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    params_file(tmp_path, **{"evaluate.shots": 2})
    folder = tmp_path / "conversations"
    folder.mkdir()
    sides = {
        "train": [row(f"T{n}?", f"t{n}") for n in range(9)],
        "validation": [row("V?", "v")],
        "test": [row("Q?", "q")],
    }
    for name, rows in sides.items():
        (folder / f"{name}.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in rows))
    encode.main([str(tiny_model), str(folder), "tokens", "tokens.json"])
    (found,) = pq.read_table("tokens/test_few_shot.parquet").to_pylist()
    text = AutoTokenizer.from_pretrained(tiny_model, local_files_only=True).decode(found["input_ids"])
    shown = re.findall(r"user\n(.*?)<end_of_turn>\n<start_of_turn>model\n(.*?)<end_of_turn>", text)
    chosen = sorted(sides["train"], key=lambda one: one.id)[:2]
    assert shown == [(one.messages[0].content, one.reference) for one in chosen] + [("Q?", "q")]


REFUSES = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}"
LEAVES_OUT = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}"


@pytest.mark.parametrize("opening", [REFUSES, LEAVES_OUT])
def test_where_the_template_takes_no_system_message_it_stands_before_the_first_question(opening, tokenizer):
    asked = row("One?", "First.", "Two?", "Second.")
    asked = asked.model_copy(update={"messages": [Message(role="system", content=" Be brief.\n"), *asked.messages]})
    [[taken]] = Encoder(tokenizer, STOPS).encode([[asked]])
    tokenizer.chat_template = opening + tokenizer.chat_template
    [[folded]] = Encoder(tokenizer, STOPS).encode([[asked]])
    assert tokenizer.decode(folded.input_ids).startswith("<bos><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>")
    assert folded == taken  # as Gemma 3's own template has it
