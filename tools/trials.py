"""What a person sweeps over, in the grammar of `dvc exp run --queue -S`, in; every combination, checked as params.yaml
is, and with a name of its own, out."""

import difflib
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dvc.exceptions import InvalidArgumentError
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps, to_hydra_overrides
from hydra.errors import HydraException
from ruamel.yaml import YAML

from stages.last_run import flat
from stages.params import load
from stages.refusal import Refusal

PARAMS = Path("params.yaml")
LONGEST_NAME = 100


@dataclass(frozen=True)
class Trial:
    """One combination: its experiment's name, what `-S` says of it, and the values by their keys."""

    name: str
    overrides: tuple[str, ...]
    values: dict[str, Any]


def combinations(settings: list[str]) -> list[Trial]:
    """Every combination of the settings, each `key=value,value` in the grammar of `dvc exp run --queue -S`, checked as
    params.yaml is; raises Refusal at the first that is wrong."""
    text = PARAMS.read_text(encoding="utf-8-sig")
    keys = [swept_key(setting, text) for setting in settings]
    for key in keys:
        if keys.count(key) > 1:
            raise Refusal(f"-S {key}: is there twice; write all its values into one: -S {key}=value,value")
    try:
        chosen = [tuple(sweep[str(PARAMS)]) for sweep in get_hydra_sweeps({str(PARAMS): settings})]
    except InvalidArgumentError as error:
        raise Refusal(f"-S {' -S '.join(settings)}: {error}; write -S key=value,value") from None
    trials: dict[str, Trial] = {}
    for overrides in chosen:
        values = checked(overrides, keys, text)
        trial = Trial(name(values), overrides, values)
        if trial.name in trials:
            raise Refusal(f"-S {' -S '.join(overrides)}: is there twice; name each value once")
        trials[trial.name] = trial
    return list(trials.values())


def swept_key(setting: str, text: str) -> str:
    """The parameter that a setting names; raises Refusal where params.yaml has none, or it cannot be compared over."""
    try:
        (override,) = to_hydra_overrides([setting])
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"-S {setting}: cannot be read ({reason}); write -S key=value,value") from None
    key = override.key_or_group
    known = [name for name, _ in flat("", YAML(typ="safe", pure=True).load(text)) if "[" not in name]
    if key in known and not (override.is_add() or override.is_delete() or override.package):
        if key.startswith("machine."):
            raise Refusal(f"-S {setting}: machine decides how fast, not what comes out; set it in params.yaml")
        if key == "task.name":
            raise Refusal(f"-S {setting}: scores of two tasks cannot be compared; sweep each by itself")
        return key
    inner = [name for name in known if name.startswith(f"{key}.")]
    if inner:
        raise Refusal(f"-S {setting}: {key} is a section; name one of its parameters, as {inner[0]}")
    near = difflib.get_close_matches(key.lstrip("+~"), known, n=1)
    meant = f"did you mean {near[0]}?" if near else "params.yaml has those there are"
    raise Refusal(f"-S {setting}: {key} is not a parameter; {meant}")


def checked(overrides: tuple[str, ...], keys: list[str], text: str) -> dict[str, Any]:
    """The values of one combination, by their keys, as DVC will write them into params.yaml."""
    settings = f"-S {' -S '.join(overrides)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PARAMS
        path.write_text(text, encoding="utf-8")
        try:
            apply_overrides(path, list(overrides))
            load(path)
        except InvalidArgumentError as error:
            raise Refusal(f"{settings}: {str(error.__cause__).splitlines()[0]}") from None
        except Refusal as refusal:
            raise Refusal(f"{settings}: {str(refusal).removeprefix(f'{path}: ')}") from None
        values = dict(flat("", YAML(typ="safe", pure=True).load(path)))
    return {key: values[key] for key in keys}


def name(values: dict[str, Any]) -> str:
    """The experiment's name: each parameter by its last word where that names one alone, and its value. What a git ref
    cannot hold is replaced, and a checksum then tells it from others."""
    last = [key.rpartition(".")[2] for key in values]
    short = {key: word if last.count(word) == 1 else key for key, word in zip(values, last, strict=True)}
    whole = ",".join(f"{short[key]}={value}" for key, value in values.items())
    plain = re.sub(r"[^A-Za-z0-9_=,.+-]+|\.{2,}|\.(?=$|lock$)", "+", whole)[:LONGEST_NAME]
    return plain if plain == whole else f"{plain}-{sha256(whole.encode()).hexdigest()[:8]}"
