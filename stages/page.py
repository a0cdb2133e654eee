"""A template of stages/ or tools/ and its values in; one HTML file out: whatever stands in the values is escaped."""

from pathlib import Path
from typing import Any

import jinja2

from stages.outputs import new_file

NATS = ("loss",)  # scores that are not shares


def score(value: float, name: str, signed: bool = False) -> str:
    """A score, or with `signed` the difference of two, as text: shares in percent, a loss as it is."""
    scaled, digits = (value, 3) if name in NATS else (100 * value, 1)
    text = f"{round(scaled, digits) + 0.0:{'+' if signed else ''},.{digits}f}".replace("-", "−")
    return text if name in NATS else text + (" points" if signed else "%")


def write(out: Path, template: str, **values: Any) -> None:
    """Fill the template and write the page to `out`."""
    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader([here, here.parent / "tools"])
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(score=score, words=lambda name: name.replace("_", " "))
    page = templates.get_template(template).render(values)
    with new_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
