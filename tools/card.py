"""What made a model in; the card that goes with it on a hub (README.md, with the hub's metadata) out.

All of it is read: params.yaml, metrics, and where base and data came from. The data set's rows are not quoted; the
example in the card was written for it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoTokenizer

from stages.conversation import Conversation
from stages.models.families import FAMILIES, Family
from stages.page import score
from stages.params import Params, Section, load
from stages.rows import Record
from tools.licence import Licence
from tools.repository import BASE, PROVENANCE

# What a task trains a model to do, and a row of its form.
TASKS = {
    "chat": (
        "answers in a conversation",
        {
            "messages": [
                {"role": "user", "content": "How long does an egg boil?"},
                {"role": "assistant", "content": "Seven minutes, for a soft yolk."},
            ]
        },
    ),
    "instructions": (
        "follows an instruction",
        {"instruction": "Name the largest planet of the solar system.", "output": "Jupiter."},
    ),
    "quotes": (
        "completes a quotation and names its author",
        {"quote": "If I have seen further, it is by standing on the shoulders of giants.", "author": "Isaac Newton"},
    ),
    "text_to_sql": (
        "answers a question about a database with an SQL query",
        {
            "question": "Which singers are older than 30?",
            "query": "SELECT name FROM singer WHERE age > 30",
            "schema": "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER)",
        },
    ),
}
MEANINGS = {
    "execution_accuracy": "share of answers whose result equals the reference's on every instance of the database",
    "valid_sql": "share of answers that run on every instance of the database",
    "exact_match": "share of answers that are the reference",
    "empty_results": "share of references that show nothing on every instance, so that a wrong answer can equal them",
    "right_form": "share of answers in the form asked for",
    "right_author": "share of answers that name the right author",
    "chrf": "likeness to the reference in characters (chrF2)",
    "rouge_l": "likeness to the reference in words (ROUGE-L)",
    "length_ratio": "length of the answer to that of the reference",
    "memorised": "share of an answer's words in runs of six or more that stand in one training row's answer; "
    "lower is better",
    "stop_rate": "share of answers that the model ended itself",
    "loss": "mean negative log-likelihood of the reference answers, in nats a token; lower is better",
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def base_name(origin: dict[str, Any]) -> str:
    """What to call the model that `origin`, its provenance, tells of."""
    if origin["source"] in ("hub", "modelscope"):
        return origin["origin"][0].partition("@")[0]
    weights = [name for name in origin["files"] if name.endswith((".gguf", ".safetensors"))]
    return Path(weights[0]).stem if origin["source"] == "wheel" and weights else Path(origin["origin"][0]).name


def example(task: Section, tokenizer: Any) -> tuple[Conversation, str] | None:
    """A conversation of the task's form, and what the chat template makes of its prompt; None for a task of one's
    own."""
    if task.name not in TASKS:
        return None
    fields = TASKS[task.name][1]
    if task.name == "text_to_sql":
        task = task.model_copy(update={"schemas": None})
        fields = {getattr(task.columns, f"{name}_" if name == "schema" else name): fields[name] for name in fields}
    module = importlib.import_module(f"stages.tasks.{task.name}")
    (row,) = module.conversations({"rows": iter([Record("the card's example", fields)])}, task)
    messages = [message.model_dump() for message in row.prompt]
    return row, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def interval(of: dict[str, float], name: str, signed: bool = False) -> str:
    """The ends of the score's interval, in the unit of `score`, which is left out."""
    low, high = (score(of[end], name, signed).removesuffix(" points").removesuffix("%") for end in ("low", "high"))
    return f"{low} to {high}"


def metadata(
    kind: str, name: str, asked: Licence, params: Params, base: dict[str, Any], data: dict[str, Any], comparison: dict
) -> ModelCardData:
    """What the hub reads of the card (huggingface/hub-docs, modelcard.md). A base or a data set that did not come from
    the hub has no name there: it is told of in the text alone."""
    named = base["source"] == "hub" and base["origin"][0].partition("@")[0]
    known, _, revision = data["origin"][0].partition("@") if data["source"] == "hub" else ("", "", "")
    known = known.removeprefix("datasets/")
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=params.task.name.replace("_", " "),
            dataset_type=known or Path(data["origin"][0].partition("==")[0]).stem,
            dataset_name=known or f"{', '.join(data['files'])} of {', '.join(data['origin'])}",
            dataset_split="test",
            dataset_revision=revision or None,
            metric_type=metric,
            metric_value=one["tuned"]["mean"],
            metric_name=f"{metric.replace('_', ' ')} (95% interval {low:.3f} to {high:.3f})",
        )
        for metric, one in comparison.items()
        for low, high in [(one["tuned"]["low"], one["tuned"]["high"])]
    ]
    other = {"license_name": asked.file.stem.lower(), "license_link": asked.file.name} if asked.hub == "other" else {}
    return ModelCardData(
        model_name=name.partition("/")[2],
        base_model=named or None,
        datasets=[known] if known else None,
        library_name={"adapter": "peft", "merged": "transformers"}[kind],
        license=asked.hub,
        pipeline_tag="text-generation",
        tags=["lora", "lorepro", params.task.name.replace("_", "-")],
        eval_results=results,
        **other,
    )


def write(
    out: Path, kind: str, name: str, asked: Licence, commit: str, remote: str | None, made: dict[str, Any]
) -> None:
    """Write the card of `kind`, adapter or merged, that `commit` of the repository at `remote` makes, for the hub's
    repository `name`; `made` is the output's entry in dvc.lock."""
    params = load()
    base, rows = map(read, PROVENANCE)
    metrics = {of: read(Path(f"metrics/{of}.json")) for of in ("data", "train", "merge", "comparison", "tuned")}
    family = read(BASE / "config.json")["model_type"]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(
        score=score,
        interval=interval,
        words=lambda text: text.replace("_", " "),
        python=lambda text: json.dumps(text, ensure_ascii=False),
        count="{:,}".format,
    )
    text = templates.get_template("card.md.jinja").render(
        metrics,
        metadata=metadata(kind, name, asked, params, base, rows, metrics["comparison"]).to_yaml(),
        kind=kind,
        name=name,
        asked=asked,
        commit=commit,
        remote=remote,
        made=made,
        params=params,
        does=TASKS[params.task.name][0] if params.task.name in TASKS else f"was trained on the task {params.task.name}",
        headline=importlib.import_module(f"stages.tasks.{params.task.name}").HEADLINE,
        meanings=MEANINGS,
        base=base,
        base_name=base_name(base),
        rows=rows,
        example=example(params.task, AutoTokenizer.from_pretrained(BASE, local_files_only=True)),
        left_alone=FAMILIES.get(family, Family()).left_alone,
    )
    out.write_text(text, encoding="utf-8")
