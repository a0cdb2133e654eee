"""Every recipe, laid over params.yaml, is one that the stages accept."""

from pathlib import Path

import pytest
import ruamel.yaml

from stages.params import load

TOP = Path(__file__).parent.parent
RECIPES = sorted(TOP.glob("recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_laid_over_the_parameters_is_sound(recipe, tmp_path):
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    params = yaml.load((TOP / "params.yaml").read_text(encoding="utf-8"))
    overlay = yaml.load(recipe.read_text(encoding="utf-8"))
    assert set(overlay) <= set(params)
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params | overlay, file)
    load(tmp_path / "params.yaml")


def test_there_are_recipes():
    assert RECIPES
