"""A sweep's experiments in; one HTML page out: which is best, how much of its lead is noise, and what each cost.

Which experiments those are is for tools/sweep.py to say, which writes this page when it ends.
"""

import importlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stages import noise, page, report
from stages.params import Params
from stages.refusal import Refusal
from stages.timing import TIMING
from tools import compare
from tools.repository import git

NEEDED = ("group", "scores", "stopped", "tokens", "nats")  # of an answer, what noise.read reads
LONGEST_LABEL = 14
SPREAD = 0.25  # of the distance from one value to the next: over it the lines through a value lie side by side


@dataclass(frozen=True)
class Experiment:
    """One that is done: its swept values by their keys, its answers by their row's id, the seconds of each stage that
    ran in it."""

    name: str
    values: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def scores(self, ids: list[str]) -> dict[str, noise.Score]:
        return noise.read([self.rows[one] for one in ids])


@dataclass(frozen=True)
class Place:
    """An experiment among the others. `lead`: what the best has over it, None for the best itself and where they share
    no test row; `first`: in what share of the draws of test rows it is the best, None where not all share rows."""

    experiment: Experiment
    mean: float
    low: float
    high: float
    loss: float
    lead: noise.Difference | None
    first: float | None

    @property
    def close(self) -> bool:
        """Whether chance alone may have put it behind the best."""
        return self.lead is not None and self.lead.is_noise


def headline(params: Params) -> str:
    """The score that decides for the task."""
    return importlib.import_module(f"stages.tasks.{params.task.name}").HEADLINE


def read(revision: str) -> dict[str, dict[str, Any]]:
    """The answers that a commit has, by their row's id; raises Refusal where they cannot be had."""
    found = compare.answers(revision, compare.ANSWERS)
    return {one: {key: row[key] for key in NEEDED} for one, row in found.items()}


def timings(revision: str) -> dict[str, dict[str, Any]]:
    """Each stage's figures as a commit has them; empty where it has none."""
    try:
        return json.loads(git("show", f"{revision}:{TIMING}"))
    except Refusal:
        return {}


def read_experiment(name: str, values: dict[str, Any], revision: str, before: dict[str, dict]) -> Experiment:
    """`before`: the figures of the commit that it started from, which stages that did not run in it still have."""
    ran = {stage: figures for stage, figures in timings(revision).items() if figures != before.get(stage)}
    try:
        rows = read(revision)
    except Refusal as refusal:
        mend = f"dvc exp remove {name}, then type the sweep again"
        raise Refusal(f"{name}: its answers are not in the cache ({refusal}); {mend}") from None
    return Experiment(name, values, rows, {stage: figures.get("seconds", 0.0) for stage, figures in ran.items()})


def shared(experiments: list[Experiment]) -> list[str]:
    """The ids of the test rows that all have answered."""
    return sorted(set.intersection(*(set(one.rows) for one in experiments)))


def over(before: Experiment, after: Experiment, metric: str) -> noise.Difference | None:
    """What `after` has over `before` on the rows that both answered; None where there is none."""
    ids = shared([before, after])
    return noise.difference(before.scores(ids)[metric], after.scores(ids)[metric]) if ids else None


def ranked(experiments: list[Experiment], metric: str) -> list[Place]:
    """Each with its score, its interval, and what the first has over it; the best first."""
    scores = [one.scores(sorted(one.rows)) for one in experiments]
    order = sorted(range(len(experiments)), key=lambda i: -scores[i][metric].mean)
    best = experiments[order[0]]
    common = shared(experiments)
    firsts = noise.firsts([one.scores(common)[metric] for one in experiments]) if common else [None] * len(scores)
    return [
        Place(
            experiment=experiments[i],
            mean=scores[i][metric].mean,
            low=low,
            high=high,
            loss=scores[i]["loss"].mean,
            lead=None if i == order[0] else over(experiments[i], best, metric),
            first=firsts[i],
        )
        for i in order
        for low, high in [noise.interval(scores[i][metric])]
    ]


def label(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def heights(places: list[Place], key: str) -> tuple[dict[str, float], list[float]]:
    """Where on a parameter's axis each value stands, from 0 to 1, and where each experiment's line crosses it: beside
    the others of the same value, the better the higher."""
    given = list(dict.fromkeys(place.experiment.values[key] for place in places))
    if all(isinstance(value, int | float) for value in given):
        given.sort()
    step = 1 / max(1, len(given) - 1)
    at = {value: i * step if len(given) > 1 else 0.5 for i, value in enumerate(given)}
    lines = []
    for place in places:
        value = place.experiment.values[key]
        beside = [other for other in places if other.experiment.values[key] == value]
        rank = (len(beside) - 1) / 2 - next(i for i, other in enumerate(beside) if other is place)
        lines.append(at[value] + SPREAD * step * rank / max(1, len(beside) - 1))
    return {label(value): height for value, height in at.items()}, lines


def draw_coordinates(places: list[Place], metric: str) -> Markup:
    """Parallel coordinates: an axis for each swept parameter and one for the score; a line for each experiment."""
    keys = list(places[0].experiment.values)
    best = places[0]
    scale = 1 if metric in page.NATS else 100
    low = scale * min(best.low, *(place.mean for place in places))
    high = scale * max(best.high, *(place.mean for place in places))
    ticks = MaxNLocator(nbins=5).tick_values(low, high if high > low else low + 1)

    def height(score: float) -> float:
        return (scale * score - ticks[0]) / (ticks[-1] - ticks[0])

    def coordinates(axes: Axes) -> None:
        axes.axis("off")
        crossed = []
        for x, key in enumerate(keys):
            marks, lines = heights(places, key)
            crossed.append(lines)
            axis(axes, x, key.replace(".", ".\n"), marks)
        axis(axes, len(keys), metric.replace("_", "\n"), {f"{tick:g}": height(tick / scale) for tick in ticks})
        crossed.append([height(place.mean) for place in places])
        t = np.linspace(0, 1, 33)
        x = np.concatenate([i + t for i in range(len(keys))])
        named = set()
        for i, place in reversed(list(enumerate(places))):
            y = np.array([lines[i] for lines in crossed])
            eased = np.concatenate([a + (b - a) * (3 * t**2 - 2 * t**3) for a, b in itertools.pairwise(y)])
            if place is best:
                look = {"color": report.ORANGE, "linewidth": 3, "label": "the best"}
            elif place.close:
                look = {"color": report.ORANGE, "linewidth": 1.2, "alpha": 0.8, "label": "behind it by chance, maybe"}
            else:
                look = {"color": report.BLUE, "linewidth": 1.2, "alpha": 0.8, "label": "worse"}
            if look["label"] in named:
                look["label"] = "_"
            named.add(look["label"])
            axes.plot(x, eased, **look)
        bounds = [height(best.low), height(best.high)]
        axes.plot([len(keys)] * 2, bounds, color=report.ORANGE, alpha=0.4, linewidth=7, solid_capstyle="butt")
        axes.set(xlim=(-0.35, len(keys) + 0.35), ylim=(-0.17, 1.17))
        handles, names = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],
            names[::-1],
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.02),
            ncols=3,
            fontsize=8,
        )

    return report.draw(coordinates, height=3.6)


def axis(axes: Axes, x: float, title: str, marks: dict[str, float]) -> None:
    """A vertical axis with its title above and its marks at the left."""
    axes.plot([x, x], [-0.1, 1.1], color=report.INK, linewidth=1, zorder=1)
    # parse_math: a dollar sign in a parameter's text is no formula
    axes.text(x, 1.17, title, ha="center", va="bottom", fontsize=9, color=report.INK, parse_math=False)
    for text, y in marks.items():
        axes.text(x - 0.04, y, text, ha="right", va="center", fontsize=9, color=report.INK, parse_math=False)


def write(
    out: Path, params: Params, head: str, finished: dict[str, tuple[dict[str, Any], str]], failed: dict[str, str]
) -> None:
    """Write the page of the experiments that are done, each name's swept values and commit, and of those that failed,
    each name's reason, all started from the commit `head`."""
    metric = headline(params)
    before = timings(head)
    experiments = [read_experiment(name, values, commit, before) for name, (values, commit) in finished.items()]
    places = ranked(experiments, metric)
    try:
        committed = Experiment("as committed", {}, read(head), {})
    except Refusal:  # it was not run, or its answers are gone
        committed = None
    page.write(
        out,
        "sweep.html.jinja",
        task=params.task.name,
        headline=metric,
        keys=list(experiments[0].values),
        places=places,
        rows=len(shared(experiments)),
        groups=len({row["group"] for row in experiments[0].rows.values()}),
        chart=draw_coordinates(places, metric),
        failed=failed,
        total=len(finished) + len(failed),
        committed=committed and committed.scores(sorted(committed.rows))[metric].mean,
        gain=committed and over(committed, places[0].experiment, metric),
    )
