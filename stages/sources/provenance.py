"""What a source hands back: where files came from and their checksums; nothing that differs between two runs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Provenance(BaseModel):
    """`origin` is what to ask the source for again; `files` maps each fetched file's name to its sha256. `kept`, which
    is not written down, is the folder to forget once the stage has succeeded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    origin: list[str]
    files: dict[str, Sha256]
    kept: Path | None = Field(default=None, exclude=True)


@dataclass(frozen=True)
class Announced:
    """What `fetch` would bring, asked for beforehand: the files' sizes in bytes by name, None where it is not told;
    `config`, a model's config.json where it can be read."""

    sizes: dict[str, int | None]
    config: dict[str, Any] | None = None


def checksum(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits; memory is flat."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of every file in `folder`, by name, in the names' order."""
    return {path.name: checksum(path) for path in sorted(folder.iterdir())}
