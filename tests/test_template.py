"""The chat templates in stages/models/templates, rendered as transformers renders them."""

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stages.download import TEMPLATES

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# how a prompt ends whose answer is next
OPENING = {"gemma3": "<start_of_turn>model\n", "llama2": " [/INST]", "llama3": "assistant<|end_header_id|>\n\n"}


def render(*turns: tuple[str, str], name: str = "gemma3", **options) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    texts, _ = render_jinja_template(
        [messages], chat_template=template, bos_token="<bos>", eos_token="<eos>", **options
    )
    return texts[0]


TALK = ("system", " Be brief. "), ("user", "Hi "), ("assistant", " Yes?"), ("user", "Go")


def test_llama_2_writes_instructions_with_the_system_message_in_the_first():
    assert render(*TALK, name="llama2") == (
        "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? <eos><bos>[INST] Go [/INST]"
    )


def test_llama_3_writes_each_role_in_a_header():
    assert render(*TALK, name="llama3", add_generation_prompt=True) == (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_turns_are_written_with_the_assistant_called_model():
    assert render(("user", "How many?"), ("assistant", "Four."), ("user", "Sure?")) == (
        "<bos><start_of_turn>user\nHow many?<end_of_turn>\n"
        "<start_of_turn>model\nFour.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n"
    )


def test_a_system_message_is_folded_into_the_first_user_turn_alone():
    assert render(("system", " Be brief. "), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Go")) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nGo<end_of_turn>\n"
    )


def test_blanks_around_a_text_are_taken_off_and_those_inside_are_kept():
    assert "user\na  b\n\n c<end_of_turn>" in render(("user", " \n a  b\n\n c \n"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [(), (("system", "Be brief."),)])
def test_a_prompt_is_how_the_whole_conversation_begins(before, name):
    prompt = render(*before, ("user", "Hi"), name=name, add_generation_prompt=True)
    assert prompt.endswith(OPENING[name])
    assert render(*before, ("user", "Hi"), ("assistant", "Yes?"), name=name).startswith(prompt)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["assistant"], "message 1 is the assistant's where the user's belongs"),
        (["user", "user"], "message 2 is the user's where the assistant's belongs"),
        (["system", "assistant"], "message 2 is the assistant's where the user's belongs"),
        (["user", "system"], "message 2 is the system's where the assistant's belongs"),
        (["system", "system"], "message 2 is the system's where the user's belongs"),
    ],
)
def test_turns_out_of_order_are_refused_by_their_number(roles, said, name):
    with pytest.raises(jinja2.TemplateError, match=said):
        render(*((role, "text") for role in roles), name=name)
