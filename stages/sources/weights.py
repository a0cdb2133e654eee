"""What a folder of weights may not bring: pickles, which run code when they are loaded, and code of its own."""

import json
from pathlib import Path

from stages.refusal import Refusal

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one runs whatever it holds
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def refuse_remote_code(path: Path, where: str) -> None:
    """Raise Refusal when a configuration asks for code of its own; `where` is what to call the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:  # of JSON or of UTF-8
        raise Refusal(f"{where}: is not JSON: {error}") from None
    if isinstance(values, dict) and "auto_map" in values:
        raise Refusal(f"{where}: asks for code of its own (auto_map), which is not run; take a model that needs none")
