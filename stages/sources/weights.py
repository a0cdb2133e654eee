"""What a folder of weights may not bring: pickles, which run code when they are loaded; code of its own; damage."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.refusal import Refusal

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one runs whatever it holds
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def refuse_remote_code(path: Path, where: str) -> None:
    """Raise Refusal when a configuration asks for code of its own; `where` is what to call the file."""
    if "auto_map" in settings(path, where):
        raise Refusal(f"{where}: asks for code of its own (auto_map), which is not run; take a model that needs none")


def settings(path: Path, where: str) -> dict[str, Any]:
    """What a model's file of settings holds, nothing where there is no such file; raises Refusal for what is no object
    of JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise Refusal(f"{where}: is not JSON: {error}; fetch or copy it again") from None
    if not isinstance(values, dict):
        raise Refusal(f"{where}: holds no settings; fetch or copy it again")
    return values


def refuse_broken(folder: Path) -> None:
    """Raise Refusal where a safetensors file is not whole, or an index names what is not there. Only headers are read:
    a byte that was changed among the weights themselves is for the checksum to find."""
    held: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                held[path.name] = set(file.keys())
        except SafetensorError as error:
            raise Refusal(f"{path.name}: is not a whole safetensors file ({error}); fetch or copy it again") from None
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or "model.safetensors" in held:
        return
    try:
        places = settings(index, index.name)["weight_map"].items()
        lost = [name for name, file in places if name not in held.get(file, ())]
    except (KeyError, TypeError, AttributeError):
        raise Refusal(f"{index.name}: does not say where the weights are; fetch or copy it again") from None
    if lost:
        raise Refusal(f"{index.name}: {lost[0]!r} is not in the file that it names; fetch or copy the weights again")
