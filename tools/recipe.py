"""A recipe's name in; params.yaml with that recipe's values laid over it, comments kept, and the difference, out.

    python -m tools.recipe                  the recipes there are
    python -m tools.recipe quotes
    git checkout params.yaml                undoes it

A section's keys are replaced one by one; task, whose keys are those of one task, as a whole. A recipe that says
`over: NAME` is laid over that one.
"""

import argparse
import difflib
import io
import re
import sys
from pathlib import Path

from ruamel.yaml import YAML

from stages.outputs import new_file
from stages.params import load
from stages.refusal import Refusal, run
from tools.repository import uncommitted

PARAMS = Path("params.yaml")
RECIPES = Path("recipes")


def laid_over(params: str, recipe: str) -> str:
    """The text of params.yaml with the recipe's values; `over` is left to `applied`."""
    yaml = YAML()  # keeps comments
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    values = yaml.load(params)
    for section, keys in yaml.load(recipe).items():
        if section == "over":
            continue
        if section == "task":
            values[section] = keys
        else:
            values[section].update(keys)
    text = io.StringIO()
    yaml.dump(values, text)
    # an empty line belongs to the value before it, which may have been replaced
    return re.sub(r"\n+(?=[a-z]+:)", "\n\n", re.sub(r"\n\n+(?= )", "\n", text.getvalue()))


def applied(params: str, recipe: Path) -> str:
    """The text of params.yaml with the values of the recipe, and before them of the one that it goes over."""
    text = recipe.read_text(encoding="utf-8")
    under = YAML(typ="safe").load(text).get("over")
    return laid_over(applied(params, recipe.with_name(f"{under}.yaml")) if under else params, text)


def title(recipe: Path) -> str:
    """What the recipe says of itself: the comment at its top, to the first full stop or colon."""
    comment = recipe.read_text(encoding="utf-8").partition("\n\n")[0].replace("\n# ", " ").removeprefix("# ")
    return re.split(r"[.:](?:\s|$)", comment)[0]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.recipe", description="Lay a recipe over params.yaml.")
    parser.add_argument("name", nargs="?", help="left out, those there are")
    name = parser.parse_args(arguments).name
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if name is None:
        print("\n".join(f"{name:24} {title(path)}" for name, path in known.items()))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise Refusal(f"{name} is not a recipe; {meant}")
    load(PARAMS)
    if uncommitted(PARAMS):
        raise Refusal(f"{PARAMS}: holds changes that git does not, which the recipe might lose; git commit them first")
    before = PARAMS.read_text(encoding="utf-8")
    after = applied(before, known[name])
    with new_file(PARAMS) as partial:
        partial.write_text(after, encoding="utf-8")
        load(partial)
    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "before", "after"))
    print(f"{PARAMS} now holds {name}; git checkout {PARAMS} undoes it", file=sys.stderr)


if __name__ == "__main__":
    run(main)
