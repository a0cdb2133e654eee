"""A licence in; what it asks of whoever passes on a model made from what it covers, out: read in its own words."""

import html
import re
from dataclasses import dataclass
from pathlib import Path

# in the words of each licence, with the name that the hub has for it (hf.co/docs/hub/repositories-licenses)
KNOWN = (
    (r"Gemma Terms of Use", "gemma"),
    (r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", r"llama\1"),
    (r"Apache License,? Version 2\.0", "apache-2.0"),
    (r"Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
)
QUOTED = r"[\"“”]\s*([^\"“”]+?)\s*[\"“”]"
NOTICE = re.compile(rf"[\"“”]\s*Notice\s*[\"“”] text file[^:\"“”]*:\s*{QUOTED}")  # of Gemma and Llama
DISPLAY = re.compile(rf"prominently display {QUOTED}")  # of Llama since 3
NAME = re.compile(rf"include {QUOTED} at the beginning of any such AI model name")  # the same


@dataclass(frozen=True)
class Licence:
    """`hub` is what the hub calls it, or other; `notice` what a file NOTICE must say, `display` what the card must,
    `name` what the name of a model made from the base must begin with: None where the licence does not ask."""

    file: Path
    hub: str
    notice: str | None
    display: str | None
    name: str | None

    def allows(self, name: str) -> bool:
        """Whether a model made from the base may be called so; a hyphen or an underscore counts as a space."""
        return self.name is None or re.sub(r"[-_ ]+", " ", name).lower().startswith(self.name.lower())


def read(file: Path) -> Licence:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix.lower() in (".html", ".htm"):
        text = html.unescape(re.sub(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>", " ", text))
    text = " ".join(text.split())
    asked = (pattern.search(text) for pattern in (NOTICE, DISPLAY, NAME))
    return Licence(file, _on_the_hub(text), *(found and found[1] for found in asked))


def _on_the_hub(text: str) -> str:
    for pattern, name in KNOWN:
        if found := re.search(pattern, text):
            return found.expand(name)
    return "other"
