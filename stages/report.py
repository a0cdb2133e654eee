"""Metrics, loss curve and answers in; what is progress and what is noise out, and one HTML page that a person reads.

    python -m stages.report metrics/data.json metrics/tokens.json metrics/train.json metrics/loss.csv \\
        metrics/merge.json data/answers/base.jsonl data/answers/few_shot.jsonl data/answers/tuned.jsonl \\
        models/base/provenance.json data/raw/provenance.json metrics/report.html \\
        metrics/comparison.json metrics/facets.csv

The page has no script, loads nothing and bears no date: the same inputs give the same bytes. What varies from run to
run therefore stands on a page of its own, run.html beside it, which stages/last_run.py writes.
"""

import csv
import importlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages import last_run, noise, page
from stages.conversation import SIDES
from stages.outputs import new_file, write_json
from stages.params import Params, load
from stages.refusal import Refusal, run

MODELS = ("base", "few_shot", "tuned")
EXAMPLES = 4  # of each kind
RIGHT = "Right before and after"  # of which none is shown
INK = "#808081"  # stands for the page's own text colour, light or dark, until the SVG is written
BLUE, ORANGE = "#3987e5", "#d95926"  # seen on a light page and on a dark one
TELEMETRY = {
    "tokens_per_second": "tokens a second",
    "memory_gib": "memory, GiB",
    "utilisation_percent": "GPU busy, %",
    "temperature_celsius": "GPU, °C",
}


@dataclass(frozen=True)
class Example:
    """One test row with the base model's answer and the tuned model's, both as evaluate wrote them."""

    base: dict[str, Any]
    tuned: dict[str, Any]

    @property
    def question(self) -> str:
        """The prompt's last paragraph that is more than a heading: context such as a schema stands before it."""
        paragraphs = [part for part in self.base["prompt"].split("\n\n") if part.strip()]
        told = [part for part in paragraphs if "\n" in part.strip() or not part.lstrip().startswith("#")]
        return (told or paragraphs or [""])[-1].strip()


@dataclass(frozen=True)
class Kind:
    """Test rows on which tuning had one effect, and how many there are; `examples` holds the first few."""

    title: str
    count: int
    examples: list[Example]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_answers(paths: list[Path]) -> list[list[dict[str, Any]]]:
    """Each model's answers, by their ids; raises Refusal when they are not to the same rows."""
    found = [sorted(map(json.loads, path.open(encoding="utf-8")), key=lambda row: row["id"]) for path in paths]
    for path, rows in zip(paths, found, strict=True):
        if [row["id"] for row in rows] != [row["id"] for row in found[0]]:
            raise Refusal(f"{paths[0]} and {path}: answer different rows; run both again: dvc repro -f {paths[0]}")
    return found


def compare(base: list[dict], few_shot: list[dict], tuned: list[dict]) -> dict[str, dict[str, Any]]:
    """For each score: what the three have, each with its 95% interval, and what `tuned` has over each of the others,
    with interval, exact p, and a verdict: better, worse, or noise."""
    scores = {"base": noise.read(base), "few_shot": noise.read(few_shot), "tuned": noise.read(tuned)}
    found: dict[str, dict[str, Any]] = {}
    for name, after in scores["tuned"].items():
        one: dict[str, Any] = {}
        for model, of in scores.items():
            low, high = noise.interval(of[name])
            one[model] = {"mean": of[name].mean, "low": low, "high": high}
        for model in ("base", "few_shot"):
            gain = noise.difference(scores[model][name], after)
            one[f"over_{model}"] = {**vars(gain), "verdict": noise.verdict(name, gain)}
        found[name] = {
            key: {k: round(v, 6) if isinstance(v, float) else v for k, v in part.items()} for key, part in one.items()
        }
    return found


def kinds(examples: list[Example], headline: str) -> list[Kind]:
    """Every test row under what tuning did to its `headline` score: 0 is wrong, 1 is right; of scores between, more
    is better."""
    scores = [(row.base["scores"][headline], row.tuned["scores"][headline]) for row in examples]
    fixed, broken, wrong = "Fixed", "Broken", "Still wrong"
    if any(0 < value < 1 for pair in scores for value in pair):
        fixed, broken, wrong = "Better", "Worse", "Neither better nor worse"
    rows: dict[str, list[Example]] = {fixed: [], broken: [], wrong: [], RIGHT: []}
    for example, (before, after) in zip(examples, scores, strict=True):
        if after != before:
            rows[fixed if after > before else broken].append(example)
        else:
            rows[wrong if after < 1 else RIGHT].append(example)
    return [Kind(title, len(found), found[:EXAMPLES]) for title, found in rows.items()]


def by_facet(answers: dict[str, list[dict]], headline: str, facets: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """For all rows, and for each class of each facet that has rows: how many there are, and each model's mean
    `headline` score on them."""
    first = next(iter(answers.values()))
    classes = {("", "all"): list(range(len(first)))}
    for facet, names in facets.items():
        for name in names:
            classes[facet, name] = [i for i, row in enumerate(first) if row["facets"].get(facet) == name]
    found = []
    for (facet, name), places in classes.items():
        if places:
            means = {model: sum(rows[i]["scores"][headline] for i in places) for model, rows in answers.items()}
            means = {model: round(total / len(places), 6) for model, total in means.items()}
            found.append({"facet": facet, "class": name, "rows": len(places), **means})
    return found


def read_curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    """The steps at which `column` has a finite number, and the numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        points = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def smoothed(values: list[float], reach: int) -> list[float]:
    """At each place the mean of the values at most `reach` places away."""
    return [sum(near) / len(near) for i in range(len(values)) for near in [values[max(0, i - reach) : i + reach + 1]]]


def draw(plot: Callable[[Axes], None], height: float) -> Markup:
    """What `plot` draws as an SVG element in the page's colours: the same bytes for the same numbers."""
    matplotlib.rcdefaults()  # whatever a matplotlibrc on this machine says
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**ink, "svg.hashsalt": plot.__name__, "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(5, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        plot(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Markup(re.sub(r' id="[\w.]+_\d+"', "", svg))  # unescaped: drawn here out of numbers alone


def draw_losses(curve: Path) -> Markup:
    """The loss over the optimizer steps."""
    steps, losses = read_curve(curve, "loss")
    reach = len(losses) // 40

    def loss(axes: Axes) -> None:
        axes.plot(steps, losses, color=BLUE, alpha=0.45, linewidth=0.8, label="training, each step")
        axes.plot(steps, smoothed(losses, reach), color=BLUE, label=f"training, mean of {2 * reach + 1}")
        axes.plot(*read_curve(curve, "validation_loss"), "o-", color=ORANGE, markersize=5, label="validation")
        axes.set(xlabel="optimizer step", ylabel="loss, nats a supervised token", ylim=(0, None))
        axes.legend(frameon=False)

    return draw(loss, height=3)


def draw_headline(models: dict[str, dict[str, float]], shots: int) -> Markup:
    """The three models' score that decides, each with its interval, in percent."""
    names = {"base": "base", "few_shot": f"base, {shots} example{'s' * (shots > 1)}", "tuned": "tuned"}

    def headline(axes: Axes) -> None:
        for model, name in names.items():
            mean, low, high = (100 * models[model][key] for key in ("mean", "low", "high"))
            colour = ORANGE if model == "tuned" else BLUE
            axes.plot([low, high], [name, name], color=colour, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot([mean], [name], "o", color=colour, markersize=8, clip_on=False)
        axes.invert_yaxis()
        axes.margins(y=0.3)
        axes.set(xlabel="percent, with its 95% interval", xlim=(0, None))

    return draw(headline, height=1.5)


def draw_telemetry(moments: list[dict[str, float]]) -> dict[str, Markup]:
    """A chart for each thing that was measured more than once, by its title."""
    charts = {}
    for name, title in TELEMETRY.items():
        points = [(moment["seconds"] / 60, moment[name]) for moment in moments if name in moment]

        def went(axes: Axes, points=points, title=title) -> None:
            minutes, values = zip(*points, strict=True)
            axes.plot(minutes, values, color=BLUE, linewidth=1.2)
            top = 1.08 * max(values) or 1  # a line along the edge would be cut
            axes.set(xlabel="minutes of training", ylabel=title, xlim=(0, None), ylim=(0, top))

        if len(points) > 1:
            went.__name__ = name  # or the charts would share their ids
            charts[title] = draw(went, height=1.8)
    return charts


def parameters(params: Params) -> Iterator[tuple[str, Any]]:
    """Every parameter that decides the result, as `-S` names it; what was fetched is told by the provenance."""
    for name in Params.model_fields:
        if name != "machine":  # the same result, faster or slower
            exclude = {"fetch"} if name in ("model", "data") else None
            yield from last_run.flat(name, getattr(params, name).model_dump(by_alias=True, exclude=exclude))


def main(arguments: list[str]) -> None:
    *inputs, out, comparison_out, facets_out = (Path(argument) for argument in arguments)
    data, tokens, train, curve, merge, *answers, model_origin, data_origin = inputs
    params = load()
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    headline = task.HEADLINE
    base, few_shot, tuned = read_answers(answers)
    comparison = compare(base, few_shot, tuned)
    classes = getattr(task, "FACETS", {})
    facets = by_facet(dict(zip(MODELS, (base, few_shot, tuned), strict=True)), headline, classes)
    page.write(
        out,
        "report.html.jinja",
        **{path.stem: read(path) for path in (data, tokens, train, merge)},
        comparison=comparison,
        facets=facets,
        rows=len(tuned),
        groups=len({row["group"] for row in tuned}),
        shots=params.evaluate.shots,
        task=params.task.name,
        headline=headline,
        loss_chart=draw_losses(curve),
        headline_chart=draw_headline(comparison[headline], params.evaluate.shots),
        right=RIGHT,
        shown="shown" in tuned[0],
        kinds=kinds(list(map(Example, base, tuned)), headline),
        sides=SIDES,
        model_origin=read(model_origin),
        data_origin=read(data_origin),
        max_kl=params.merge.max_kl,
        parameters=list(parameters(params)),
    )
    write_json(comparison_out, comparison)
    with new_file(facets_out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["facet", "class", "rows", "model", "score"])
        for one in facets:
            writer.writerows([one["facet"], one["class"], one["rows"], model, one[model]] for model in MODELS)
    charts = draw_telemetry(last_run.telemetry())
    last_run.write(out.with_name("run.html"), read(train)["steps"], charts)


if __name__ == "__main__":
    run(main)
