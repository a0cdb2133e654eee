"""The chat templates in stages/models/templates, rendered as transformers renders them."""

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stages.download import TEMPLATES

GEMMA3 = (TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8")


def render(*turns: tuple[str, str], **options) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    texts, _ = render_jinja_template([messages], chat_template=GEMMA3, bos_token="<bos>", **options)
    return texts[0]


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


@pytest.mark.parametrize("before", [(), (("system", "Be brief."),)])
def test_a_prompt_is_how_the_whole_conversation_begins(before):
    prompt = render(*before, ("user", "Hi"), add_generation_prompt=True)
    assert prompt.endswith("<start_of_turn>model\n")
    assert render(*before, ("user", "Hi"), ("assistant", "Yes?")).startswith(prompt)


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
def test_turns_out_of_order_are_refused_by_their_number(roles, said):
    with pytest.raises(jinja2.TemplateError, match=said):
        render(*((role, "text") for role in roles))
