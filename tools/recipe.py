"""A recipe's name in; params.yaml with that recipe's values laid over it, comments kept, and the difference, out.

    python -m tools.recipe                  the recipes there are
    python -m tools.recipe quotes
    git checkout params.yaml                undoes it

A section's keys are replaced one by one; task, whose keys are those of one task, as a whole. A recipe that says
`over: NAME` is laid over that one.
"""

import difflib
import io
import re
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from stages.outputs import new_file
from stages.params import load
from stages.refusal import Refusal, run

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


def saved() -> bool:
    """Whether git has params.yaml as it is now."""
    found = subprocess.run(["git", "status", "--porcelain", PARAMS], capture_output=True, text=True, check=False)
    if found.returncode:
        raise Refusal(f"{PARAMS}: git does not answer for it: {found.stderr.strip()}; clone the repository with git")
    return not found.stdout


def main(arguments: list[str]) -> None:
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if not arguments:
        print("\n".join(f"{name:24} {title(path)}" for name, path in known.items()))
        return
    if len(arguments) > 1 or arguments[0] not in known:
        near = difflib.get_close_matches(arguments[0], known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise Refusal(f"{' '.join(arguments)} is not a recipe; {meant}")
    load(PARAMS)
    if not saved():
        raise Refusal(f"{PARAMS}: holds changes that git does not, which the recipe might lose; git commit them first")
    before = PARAMS.read_text(encoding="utf-8")
    after = applied(before, known[arguments[0]])
    with new_file(PARAMS) as partial:
        partial.write_text(after, encoding="utf-8")
        load(partial)
    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "before", "after"))
    print(f"{PARAMS} now holds {arguments[0]}; git checkout {PARAMS} undoes it", file=sys.stderr)


if __name__ == "__main__":
    run(main)
