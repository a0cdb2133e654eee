"""A prompt, a file or a conversation in; what the base model, the adapter on it, or the merged model answers, out.

    python -m tools.chat                                        a conversation with the tuned model
    python -m tools.chat "How many singers are there?"
    python -m tools.chat --file prompt.txt --models base tuned  before and after, side by side
    python -m tools.chat --test --models base tuned             a random test row, with its reference

The prompt goes through the chat template that training used. In a conversation, an empty line or Ctrl-D ends it, and
/new begins another.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import argparse
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from stages import conversation
from stages.models.generate import attention_for_generation
from stages.models.load import load_model
from stages.models.lora import load_adapter
from stages.models.machine import resolve
from stages.params import Params, Quantize, load
from stages.refusal import Refusal, run
from tools.repository import ADAPTER, BASE, MERGED

MODELS = ("base", "adapter", "tuned")
FOLDERS = {"base": BASE, "adapter": BASE, "tuned": MERGED}
TEST_ROWS = Path("data/conversations/test.jsonl")


@dataclass
class Speaker:
    """A model and what was said to it and by it so far."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, max_new_tokens: int, temperature: float, streamed: bool) -> str:
        """What the model says to `text`, greedily at temperature 0; written as it comes where `streamed`."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if streamed else None
        found = self.model.generate(**prompt, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        answer = self.tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def speaker(name: str, quantize: str | None, params: Params) -> Speaker:
    """Load the model. Raises Refusal where the pipeline has not made it yet."""
    for folder in (FOLDERS[name], ADAPTER) if name == "adapter" else (FOLDERS[name],):
        if not any(folder.glob("*.safetensors")):
            raise Refusal(f"{folder}: holds no model yet; make it with dvc repro, or fetch it with dvc pull")
    machine = resolve(params.machine)
    model = load_model(FOLDERS[name], machine.device, machine.dtype, quantize=quantize)
    model.set_attn_implementation(attention_for_generation(model))
    if name == "adapter":
        model = load_adapter(model, ADAPTER)
    return Speaker(name, model, AutoTokenizer.from_pretrained(FOLDERS[name], local_files_only=True))


def say(speakers: list[Speaker], text: str, options: argparse.Namespace, console: Console) -> None:
    """One model's answer as it comes; those of several in a column each."""
    set_seed(options.seed)
    if len(speakers) == 1:
        speakers[0].answer(text, options.max_new_tokens, options.temperature, streamed=True)
        return
    table = Table(box=rich.box.SIMPLE_HEAD)
    for one in speakers:
        table.add_column(one.name, ratio=1, overflow="fold")
    # Text, since a model may write what rich would take for markup
    answers = [one.answer(text, options.max_new_tokens, options.temperature, streamed=False) for one in speakers]
    table.add_row(*map(Text, answers))
    console.print(table)


def converse(speakers: list[Speaker], options: argparse.Namespace, console: Console) -> None:
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            for one in speakers:
                one.messages.clear()
            continue
        say(speakers, text, options, console)


def show_test_row(speakers: list[Speaker], identity: str, options: argparse.Namespace, console: Console) -> None:
    """A test row's prompt, its reference and the answers; `identity` names it, "" takes one at random."""
    if not TEST_ROWS.is_file():
        raise Refusal(f"{TEST_ROWS}: is not there yet; make it with: dvc repro prepare")
    rows = {row.id: row for row in conversation.read(TEST_ROWS)}
    if identity and identity not in rows:
        raise Refusal(f"{TEST_ROWS}: holds no row {identity}; data/answers/tuned.jsonl names them")
    row = rows[identity or random.SystemRandom().choice(sorted(rows))]
    console.print(Text(f"row {row.id}, {row.where}\n", style="bold"))
    console.print(Text("\n\n".join(message.content for message in row.prompt)))
    console.print(Text("\nreference", style="bold"))
    console.print(Text(f"{row.reference}\n"))
    for one in speakers:
        one.messages = [message.model_dump() for message in row.prompt[:-1]]
    if len(speakers) == 1:
        console.print(Text(speakers[0].name, style="bold"))
    say(speakers, row.prompt[-1].content, options, console)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description="Ask the models that the pipeline made.")
    parser.add_argument("prompt", nargs="?", help="one question; left out, a conversation begins")
    parser.add_argument("--file", type=Path, help="a text file that holds the prompt")
    parser.add_argument("--test", nargs="?", const="", metavar="ID", help="ask a test row, one at random or this one")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tuned"], help="several are set side by side")
    parser.add_argument("--quantize", choices=get_args(Quantize), help="round the weights to 4 or 8 bits")
    parser.add_argument("--max-new-tokens", type=int, help="evaluate.max_new_tokens of params.yaml, if left out")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, if left out: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    options = parser.parse_args(arguments)
    if sum(given is not None for given in (options.prompt, options.file, options.test)) > 1:
        raise Refusal("give one of a prompt, --file and --test")
    params = load()
    options.max_new_tokens = options.max_new_tokens or params.evaluate.max_new_tokens
    if options.temperature < 0 or options.max_new_tokens < 1:
        raise Refusal("--temperature should be at least 0, and --max-new-tokens at least 1")
    if options.file:
        try:
            options.prompt = options.file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(
                f"{options.file}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}"
            ) from None
    if options.prompt == "":
        raise Refusal("the prompt is empty; write one")
    console = Console(highlight=False)
    speakers = [speaker(name, options.quantize, params) for name in dict.fromkeys(options.models)]
    if options.test is not None:
        show_test_row(speakers, options.test, options, console)
    elif options.prompt is not None:
        say(speakers, options.prompt, options, console)
    else:
        print("an empty line or Ctrl-D ends the conversation; /new begins another", file=sys.stderr)
        converse(speakers, options, console)


if __name__ == "__main__":
    run(main)
