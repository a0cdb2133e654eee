"""A folder's name in; the folder, with all that a machine without any network needs to run the pipeline, out.

    python -m tools.carry FOLDER                                   # for Linux on x86-64 and this Python's version
    python -m tools.carry FOLDER --python 3.12 --machine aarch64

There, from an empty folder: FOLDER/run, or FOLDER/run STAGE to go no further than that stage. It takes git, make and
that Python. The folder holds the commit that is checked out here, the model and the data as the download stages left
them, with data/own and models/own, and a wheel for each line of requirements.txt and for what those lines leave to
others (NVIDIA's packages to torch). pip's own settings say where the wheels come from; how much room they take, which
may be several GB, is not known before they are there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from stages.outputs import new_folder, refuse_without_room
from stages.refusal import Refusal, run
from stages.sources.path import WATCHED
from tools.repository import LOCK, cache, git, object_of, outputs, read_lock, uncommitted

REQUIREMENTS = Path("requirements.txt")
SCRIPT = Path(__file__).with_name("carried_run.sh")
DOWNLOADS = ("download@model", "download@data")
OBJECTS = Path("objects/files/md5")  # laid out as a remote of DVC
# torch is built for glibc 2.28; a wheel for a later one would not run on every system that torch runs on
GLIBC = (28, 27, 26, 24, 17, 12, 5)


def main(arguments: list[str]) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(prog="python -m tools.carry", description="All of it, for a machine offline.")
    parser.add_argument("folder", type=Path, help="is made, and must not be there yet")
    parser.add_argument("--python", default=here, help=f"the version there: 3.10 to 3.13; {here} unless named")
    parser.add_argument("--machine", default="x86_64", choices=["x86_64", "aarch64"], help="the processor there")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        raise Refusal(f"{options.folder}: is there already; name a folder that is not")
    if not re.fullmatch(r"3\.1[0-3]", options.python):
        raise Refusal(f"--python {options.python}: should be 3.10, 3.11, 3.12 or 3.13")
    refuse_uncommitted()
    downloads, own = downloaded(), own_files()
    refuse_without_room(options.folder, history_bytes() + sum(path.stat().st_size for path in (*downloads, *own)))
    with new_folder(options.folder) as folder:
        bundle(folder / "repository.bundle")
        for path in downloads:
            (folder / OBJECTS / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / OBJECTS / path.parent.name / path.name)
        for path in WATCHED:
            shutil.copytree(path, folder / "own" / path)  # what a link points to, not the link
        collect(folder / "wheels", options.python, options.machine)
        script = SCRIPT.read_text(encoding="utf-8").replace("PYTHON_VERSION", options.python)
        (folder / "run").write_text(script, encoding="utf-8")
        (folder / "run").chmod(0o755)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{options.folder} holds all of it, {size / 1e9:.1f} GB; on the other machine, in an empty folder: "
        f"{options.folder.name}/run",
        file=sys.stderr,
    )


def refuse_uncommitted() -> None:
    """The folder holds a commit: raise Refusal where what is here differs from it."""
    # what is new may be a note; in stages it is a task of one's own
    if changed := list(dict.fromkeys([*uncommitted(new=False), *uncommitted("stages")])):
        raise Refusal(f"{', '.join(changed[:5])}: holds what no commit does, and would stay here so; git commit first")
    if not git("ls-files", str(LOCK)):
        raise Refusal(f"{LOCK}: is in no commit; dvc repro, then git add {LOCK} and git commit")


def bundle(file: Path) -> None:
    """Write the commit that is checked out, its history and its branch's name."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise Refusal("this clone is shallow, and git makes no bundle of such; git fetch --unshallow first")
    branch = git("branch", "--show-current")
    git("bundle", "create", "--quiet", str(file), "HEAD", *([branch] if branch else []))


def history_bytes() -> int:
    """About what the bundle will take."""
    counted = dict(line.split(": ") for line in git("count-objects", "-v").splitlines())
    return (int(counted["size"]) + int(counted["size-pack"])) << 10


def downloaded() -> list[Path]:
    """What the download stages have made, in DVC's cache; DVC checks each file's hash when it is taken over."""
    stages = {name: entry for name, entry in read_lock()["stages"].items() if name in DOWNLOADS}
    held = cache()
    folders = [out["md5"] for entry in stages.values() for out in entry["outs"]]
    names = {*folders, *(name for _, name, _ in outputs({"stages": stages}, held))}
    found = [object_of(held, name) for name in sorted(names)]
    if len(stages) < len(DOWNLOADS) or not all(path.is_file() for path in found):
        raise Refusal(f"{LOCK}: names a model or data that is not here; dvc repro {' '.join(DOWNLOADS)}")
    return found


def own_files() -> list[Path]:
    """What lies in data/own and models/own, and where links there lead; raises Refusal where one leads nowhere."""
    walked = (found for own in WATCHED for found in os.walk(own, followlinks=True))
    files = [Path(folder) / name for folder, _, names in walked for name in names]
    for path in files:
        if not (path.is_file() and os.access(path, os.R_OK)):
            link = f", a link to {path.readlink()}," if path.is_symlink() else ""
            raise Refusal(f"{path}{link} cannot be read, and so not be carried; mend it, or take it away")
    return files


def collect(wheels: Path, python: str, machine: str) -> None:
    """Fill `wheels` for a Python's version and a processor: each requirement's, and those that they leave open."""
    environment = target(python, machine)
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    wanted = [requirement for requirement in map(Requirement, filter(None, lines)) if needed(requirement, environment)]
    while wanted:
        fetch([f"{want.name}{want.specifier}" for want in wanted], wheels, python, machine)
        wanted = left_open(wheels, wanted, environment)


def target(python: str, machine: str) -> dict[str, str]:
    """What the markers of requirements ask of the other machine (PEP 508)."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def needed(requirement: Requirement, environment: dict[str, str], extras: frozenset[str] = frozenset()) -> bool:
    """Whether a requirement is one there, of a package that is wanted with `extras`."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras})


def fetch(wanted: list[str], wheels: Path, python: str, machine: str) -> None:
    """Have pip download `wanted` for the other machine; what there is as source alone is built here."""
    print(f"downloading {len(wanted)} packages for Python {python} on {machine}", file=sys.stderr)
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
    platforms += [f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}", "--platform=any"]
    choice = ["--no-deps", f"--python-version={python}", "--implementation=cp", *platforms]
    with tempfile.TemporaryDirectory(dir=wheels.parent) as landing:
        pip("download", *choice, "--dest", landing, *wanted)
        wheels.mkdir(exist_ok=True)
        for source in sorted(path for path in Path(landing).iterdir() if path.suffix != ".whl"):
            pip("wheel", "--no-deps", "--wheel-dir", str(Path(landing) / "built"), str(source))
            (wheel,) = (Path(landing) / "built").glob("*.whl")
            if not wheel.name.endswith("-none-any.whl"):
                raise Refusal(f"{source.name}: there is no wheel of it for Python {python} on {machine}; take another")
            wheel.rename(wheels / wheel.name)
        for path in Path(landing).glob("*.whl"):
            path.rename(wheels / path.name)


def pip(*arguments: str) -> None:
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr]
        raise Refusal(f"pip {arguments[0]} fails: {errors[-1].removeprefix('ERROR: ')}; see to version and network")


def left_open(wheels: Path, wanted: list[Requirement], environment: dict[str, str]) -> list[Requirement]:
    """What the wheels of `wanted` need and the folder does not hold."""
    files = {parse_wheel_filename(path.name)[0]: path for path in wheels.glob("*.whl")}
    found: dict[str, Requirement] = {}
    for want in wanted:
        for requirement in requires(files[canonicalize_name(want.name)]):
            name = canonicalize_name(requirement.name)
            if name not in files and needed(requirement, environment, frozenset(want.extras)):
                known = found.setdefault(name, requirement)
                known.extras |= requirement.extras
                known.specifier &= requirement.specifier
    return list(found.values())


def requires(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return [Requirement(line) for line in message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])]


if __name__ == "__main__":
    run(main)
