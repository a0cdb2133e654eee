"""Every recipe, laid over params.yaml, is one that the stages accept."""

import shutil
import subprocess
from pathlib import Path

import pytest
import ruamel.yaml

from stages.params import load
from stages.refusal import Refusal
from tools import recipe

TOP = Path(__file__).parent.parent
RECIPES = sorted(TOP.glob("recipes/*.yaml"))
OWN = (TOP / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with params.yaml and the recipes."""
    shutil.copy(TOP / "params.yaml", tmp_path)
    shutil.copytree(TOP / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    commit()
    return tmp_path


def commit():
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"], check=True)


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_laid_over_the_parameters_is_sound_and_holds_its_values(name, clone):
    recipe.main([name])
    load()
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    overlay, wanted = yaml.load((clone / f"recipes/{name}.yaml").read_text()), yaml.load(OWN)
    under = overlay.pop("over", None)
    for values in (yaml.load((clone / f"recipes/{under}.yaml").read_text()) if under else {}, overlay):
        wanted |= {section: keys if section == "task" else wanted[section] | keys for section, keys in values.items()}
    assert yaml.load(Path("params.yaml").read_text()) == wanted


def test_comments_stay_and_only_what_the_recipe_holds_changes():
    assert recipe.laid_over(OWN, "lora:\n  r: 16\n") == OWN
    changed = recipe.laid_over(OWN, "lora:\n  r: 8\nmerge:\n  max_kl: 0.5\n")
    differing = [
        (before, after) for before, after in zip(OWN.splitlines(), changed.splitlines(), strict=True) if before != after
    ]
    assert [after.split("#")[0].strip() for _, after in differing] == ["r: 8", "max_kl: 0.5"]
    assert all(before.partition("#")[2] == after.partition("#")[2] for before, after in differing)


def test_git_undoes_a_recipe_and_changes_that_it_has_not_are_not_lost(clone):
    recipe.main(["quotes"])
    with pytest.raises(Refusal, match="holds changes that git does not"):
        recipe.main(["gretel"])
    subprocess.run(["git", "checkout", "-q", "params.yaml"], check=True)
    assert Path("params.yaml").read_text(encoding="utf-8") == OWN


def test_a_recipe_that_does_not_fit_leaves_the_parameters_as_they_were(clone):
    (clone / "recipes/odd.yaml").write_text("# Odd.\n\nlora:\n  rank: 8\n")
    commit()
    with pytest.raises(Refusal, match="rank is not a parameter"):
        recipe.main(["odd"])
    assert Path("params.yaml").read_text(encoding="utf-8") == OWN


def test_without_a_name_the_recipes_are_listed(clone, capsys):
    recipe.main([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in RECIPES]
    assert any("Quotations completed, with their author, from FreeBSD's fortune file" in line for line in listed)


def test_a_name_that_is_none_is_refused(clone, tmp_path):
    with pytest.raises(Refusal, match="did you mean quotes"):
        recipe.main(["qutes"])
    shutil.rmtree(tmp_path / ".git")
    with pytest.raises(Refusal, match="git does not answer for it"):
        recipe.main(["quotes"])
