"""A folder's name in; the folder, with all that a machine without any network needs to run the pipeline, out.

    python -m tools.carry FOLDER                                   # for Linux on x86-64 and this Python's version
    python -m tools.carry FOLDER --python 3.12 --machine aarch64

There, from an empty folder: FOLDER/run, or FOLDER/run STAGE to go no further than that stage. It takes git, make and
that Python. The folder holds the commit that is checked out here, the model and the data as the download stages left
them, with data/own and models/own, and a wheel for each line of requirements.txt and for what those lines leave to
others (NVIDIA's packages to torch). pip's own settings say where the wheels come from.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from dvc.repo import Repo
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from ruamel.yaml import YAML

from stages.outputs import new_folder
from stages.refusal import Refusal, run
from tools.verify import LOCK, outputs

REQUIREMENTS = Path("requirements.txt")
SCRIPT = Path(__file__).with_name("carried_run.sh")
DOWNLOADS = ("download@model", "download@data")
OWN = (Path("data/own"), Path("models/own"))
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
    with new_folder(options.folder) as folder:
        bundle(folder / "repository.bundle")
        copy_downloads(folder / "objects" / "files" / "md5")
        for own in OWN:
            shutil.copytree(own, folder / "own" / own)  # what a link points to, not the link
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


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refusal(f"git {arguments[0]} fails: {done.stderr}; run in the top folder of a clone")
    return done.stdout


def refuse_uncommitted() -> None:
    """The folder holds a commit: raise Refusal where what is here differs from it."""
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]
    if changed:
        raise Refusal(f"{', '.join(changed[:5])}: holds what no commit does, and would stay here so; git commit first")
    if not git("ls-files", str(LOCK)):
        raise Refusal(f"{LOCK}: is in no commit; dvc repro, then git add {LOCK} and git commit")


def bundle(file: Path) -> None:
    """Write the commit that is checked out, its history and its branch's name."""
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        raise Refusal("this clone is shallow, and git makes no bundle of such; git fetch --unshallow first")
    branch = git("branch", "--show-current").strip()
    git("bundle", "create", "--quiet", str(file), "HEAD", *([branch] if branch else []))


def copy_downloads(place: Path) -> None:
    """Copy what the download stages have made out of DVC's cache; DVC checks each file's hash when it is taken over."""
    lock = YAML(typ="safe", pure=True).load(LOCK)
    stages = {name: entry for name, entry in lock["stages"].items() if name in DOWNLOADS}
    cache = Path(Repo(".").cache.local.path)
    folders = [out["md5"] for entry in stages.values() for out in entry["outs"]]
    names = {*folders, *(name for _, name, _ in outputs({"stages": stages}, cache))}
    missing = [name for name in names if not (cache / name[:2] / name[2:]).is_file()]
    if len(stages) < len(DOWNLOADS) or missing:
        raise Refusal(f"{LOCK}: names a model or data that is not here; dvc repro {' '.join(DOWNLOADS)}")
    for name in sorted(names):
        (place / name[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache / name[:2] / name[2:], place / name[:2] / name[2:])


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
