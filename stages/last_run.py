"""Timings, telemetry and the last commit in; metrics/run.html out: how this run went, and what differs from the commit.

It is written with the report and is no stage's output: what varies from run to run may not stand in a page that is
hashed.
"""

import csv
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml
from markupsafe import Markup
from ruamel.yaml.error import YAMLError

from stages import page, timing
from stages.refusal import Refusal

PARAMS = Path("params.yaml")
SCORES = Path("metrics/tuned.json")


@dataclass(frozen=True)
class Differences:
    """What differs in a file from its last committed version: name, then, now; or why that cannot be said."""

    path: str
    found: list[tuple[str, Any, Any]]
    unknown: str = ""


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value under `key`, as `-S` names it; a list of plain values is one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(f"{key}.{name}".lstrip("."), inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from flat(f"{key}[{number}]", inner)
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value))
    else:
        yield key, "null" if value is None else value


def committed(path: Path) -> str:
    """A file's text in the last commit; raises ValueError with what git says where there is none."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, check=False)
    except OSError:
        raise ValueError("git cannot be run") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(f"git says: {said[0] if said else done.returncode}")
    return done.stdout.decode("utf-8")


def differences(path: Path, parse: Callable[[str], Any]) -> Differences:
    """Compare a file with its last committed version; what cannot be read is no error, for nothing depends on it."""
    try:
        before = dict(flat("", parse(committed(path))))
        now = dict(flat("", parse(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        return Differences(str(path), [], str(error).splitlines()[0])
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return Differences(str(path), [(name, before.get(name, "none"), now.get(name, "none")) for name in names])


def timings() -> dict[str, dict[str, Any]]:
    """Each stage's figures; raises Refusal where the file is not what timing.record writes."""
    try:
        found = json.loads(timing.TIMING.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Refusal(f"{timing.TIMING}: is not JSON: {error}; delete it, the stages write it anew") from None
    if not isinstance(found, dict) or not all(isinstance(figures, dict) for figures in found.values()):
        raise Refusal(f"{timing.TIMING}: holds no figures by stage; delete it, the stages write it anew")
    return found


def telemetry() -> list[dict[str, float]]:
    """What training left at each moment, by name, less what the machine did not tell; nothing where there is no file.

    Raises Refusal where the file is not what stages/models/watch.py writes.
    """
    try:
        with timing.TELEMETRY.open(encoding="utf-8", newline="") as file:
            moments = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError, csv.Error):
        moments = [{}]
    if not all("seconds" in moment and all(map(math.isfinite, moment.values())) for moment in moments):
        raise Refusal(f"{timing.TELEMETRY}: is not what training writes; delete it, training writes it anew")
    return moments


def write(out: Path, steps: int, charts: dict[str, Markup]) -> None:
    """Write the page of the run whose training took `steps` optimizer steps; `charts` by their titles."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    changes = [differences(PARAMS, yaml.load), differences(SCORES, json.loads)]
    page.write(out, "run.html.jinja", timings=timings(), steps=steps, charts=charts, changes=changes)
