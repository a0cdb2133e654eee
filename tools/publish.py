"""The adapter or the merged model in; a repository on a hub with it, its card and its licence, out. Off unless asked.

    python -m tools.publish OWNER/NAME [adapter|merged] --dry-run    writes the folder, and says what would go
    python -m tools.publish OWNER/NAME [adapter|merged] [--private] [--replace]

HF_TOKEN, from the environment alone, must allow writing; HF_ENDPOINT names another hub. All goes in one commit: the
repository has the whole model or none of it. What was sent before a cut is not sent again.
"""

import argparse
import fnmatch
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from stages.outputs import new_folder
from stages.params import TOKENS, load
from stages.refusal import Refusal, run
from stages.sources import repository
from stages.sources.hub import SITE
from stages.sources.path import WATCHED
from tools import card, licence, verify
from tools.repository import ADAPTER, BASE, LOCK, MERGED, RUNS, cache, git, outputs, read_lock, uncommitted

MODELS = {"adapter": ADAPTER, "merged": MERGED}
FOLDERS = RUNS / "publish"
# Beside the stages' code. What lies in models/own and data/own need not be in git: the card names it, with its sha256.
RECIPE = ("dvc.yaml", "dvc.lock", "params.yaml", "requirements.txt")
LICENCES = ("licen[cs]e*", "*terms*")
ALONG = (*LICENCES, "notice*", "use_policy*")
# Of the base, what the adapter is used with: a pretrained one has no chat template, and does not end its answers.
BESIDE = ("*token*", "chat_template.jinja", "generation_config.json")


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if any(fnmatch.fnmatch(path.name.lower(), p) for p in patterns)]


def find_licence(given: Path | None) -> licence.Licence:
    """The base's licence: the file given, else one that came with the base."""
    if given and not given.is_file():
        raise Refusal(f"{given}: there is no such file; give --license the file of the base model's licence")
    found = given or next(iter(matching(BASE, LICENCES)), None)
    if not found:
        raise Refusal(
            f"{BASE}: came without its licence, which must go along with what is made from it; save the licence of "
            f"{', '.join(card.read(BASE / 'provenance.json')['origin'])} as a text file, and name that with "
            "--license FILE"
        )
    return licence.read(found)


def some(of: list[str]) -> str:
    return ", ".join(of[:3]) + (", …" if len(of) > 3 else "")


def refuse_another_state(model: Path, lock: dict) -> str:
    """The commit that makes the outputs as they are here; raises Refusal where there is none."""
    try:
        with Repo(".") as repo:
            changed = repo.status()
    except DvcException as error:
        raise Refusal(f"dvc status fails: {error}; wait for what runs, or see what dvc status says") from None
    if changed:
        raise Refusal(
            f"the outputs are not what params.yaml and the code make ({some(list(changed))}; dvc status shows why): "
            "dvc repro, git commit, and publish again"
        )
    used = {dep["path"] for entry in lock["stages"].values() for dep in (*entry.get("deps", []), *entry["outs"])}
    if changed := uncommitted(*sorted({*RECIPE, *used} - set(map(str, WATCHED)))):
        raise Refusal(f"{some(changed)}: not committed, so that no commit makes this model; git commit, and try again")
    for path, md5, _ in outputs(lock, cache()):  # DVC believes a file that was changed in place
        wrong = f"{path}: is not what dvc.lock says; python -m tools.verify tells what to do"
        if path.is_relative_to(model) and verify.Check(partial(path.open, "rb"), md5, wrong).fails():
            raise Refusal(wrong)
    return git("rev-parse", "HEAD")


def remote() -> str | None:
    """The address of this repository, without who fetches it; None where it lies on this machine alone."""
    done = subprocess.run(["git", "remote", "get-url", "origin"], capture_output=True, text=True, check=False)
    found = re.fullmatch(r"(?:https?://|ssh://)?(?:[^/@]*@)?([\w.-]+\.\w+)[:/](?!\d+/)([^?#\s]+)", done.stdout.strip())
    return found and f"https://{found[1]}/{found[2]}"


def warn_unpushed(commit: str) -> None:
    """Say that others may not find the commit that the card names. Only git push tells a clone what a remote has: what
    went there in another way is not known here, so that this is no reason to refuse."""
    if remote() and not git("for-each-ref", "--contains", commit, "refs/remotes/origin"):
        print(
            f"warning: commit {commit[:12]}, which the card names, is on no branch of origin that this clone knows of; "
            "git push, or nobody else can make the model again",
            file=sys.stderr,
        )


def fill(folder: Path, kind: str, name: str, asked: licence.Licence, commit: str, lock: dict) -> None:
    """Write what goes to the hub; large files as links to the outputs."""
    for path in {path.name: path for path in (*matching(BASE, ALONG), asked.file)}.values():
        (folder / path.name).write_bytes(path.read_bytes())  # before there are links, through which it might write
    beside = matching(BASE, BESIDE) if kind == "adapter" else []
    for path in {path.name: path for path in (*beside, *MODELS[kind].iterdir())}.values():
        (folder / path.name).symlink_to(path.resolve())
    origin = card.read(BASE / "provenance.json")
    if kind == "adapter" and origin["source"] == "hub":
        name_base(folder / "adapter_config.json", origin["origin"][0])
    write_notice(folder, asked, card.base_name(origin))
    made = next(out for stage in lock["stages"].values() for out in stage["outs"] if Path(out["path"]) == MODELS[kind])
    card.write(folder / "README.md", kind, name, asked, commit, remote(), made)


def name_base(config: Path, origin: str) -> None:
    """Let the adapter's configuration name the base's repository in place of a folder."""
    settings = card.read(config)
    settings["base_model_name_or_path"], _, settings["revision"] = origin.partition("@")
    config.unlink()
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_notice(folder: Path, asked: licence.Licence, base: str) -> None:
    """The file NOTICE, where the licence asks for one or the base brought one; that the weights were changed, too."""
    said = []
    for path in matching(folder, ("notice", "notice.*")):
        said.append(path.read_text(encoding="utf-8", errors="replace").strip())
        path.unlink()
    if asked.notice and not any(asked.notice in text for text in said):
        said.append(asked.notice)
    if said:
        changed = f"The weights in this repository were made from {base} by fine-tuning: see README.md."
        (folder / "NOTICE").write_text("\n\n".join([*said, changed]) + "\n", encoding="utf-8")


def send(folder: Path, name: str, token: str, message: str, private: bool, replace: bool) -> str:
    """Make the repository where there is none, and commit the folder to it; return the address of the commit."""
    endpoint = repository.address("HF_ENDPOINT", SITE)
    shown = repository.shown(endpoint)
    api = HfApi(endpoint=endpoint, token=token, library_name="lorepro")
    # With xet, the library would need a second service beside the hub, which not every hub has. The plain LFS protocol
    # is answered by all of them, and says what is there already.
    constants.HF_HUB_DISABLE_XET = True
    try:
        api.create_repo(name, private=private, exist_ok=True)
        info = api.model_info(name, timeout=30)
        if private and not info.private:
            raise Refusal(f"{name}: is there and public; make it private in its settings, or leave out --private")
        here = {path.name for path in folder.iterdir()}
        there = api.list_repo_files(name, revision=info.sha)
        others = [path for path in there if path not in {*here, ".gitattributes"}]  # which the hub itself puts there
        if others and not replace:
            raise Refusal(
                f"{name}: has other files ({some(others)}); take another name, or --replace, which drops them"
            )
        added = [CommitOperationAdd(path, str(folder / path)) for path in sorted(here)]
        operations = [*map(CommitOperationDelete, others), *added]
        sent = api.create_commit(name, operations, commit_message=message, parent_commit=info.sha)
        return repository.shown(sent.commit_url)
    except (HfHubHTTPError, httpx.RequestError) as error:
        raise explained(error, name, shown) from None
    except RuntimeError as error:  # of one file: the library puts its own words around what went wrong
        if not isinstance(error.__cause__, (HfHubHTTPError, httpx.RequestError)):
            raise
        raise explained(error.__cause__, name, shown) from None
    except ValueError as error:  # a card that the hub does not take, an object that its storage does not
        raise Refusal(f"{shown} does not take it: {harmless(str(error))}") from None


def explained(error: HfHubHTTPError | httpx.RequestError, name: str, endpoint: str) -> Refusal:
    """What is wrong with the repository, the token or the network, and what to do."""
    if not isinstance(error, HfHubHTTPError):
        return Refusal(
            f"{endpoint}: the connection was lost ({type(error).__name__}); type it again: files that it has whole are "
            "not sent twice"
        )
    status, said = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    said = f" (it says: {harmless(said)})" if said else ""
    tokens = f"{SITE}/settings/tokens"
    if status == 401:
        return Refusal(f"{endpoint} does not know the token in HF_TOKEN{said}; make one at {tokens}")
    if status in (403, 404):
        return Refusal(f"{name}: the token in HF_TOKEN may not write there{said}; let it at {tokens}, or change OWNER")
    if status in (409, 412):
        return Refusal(f"{name}: was changed meanwhile{said}; look at it, and type it again")
    return Refusal(f"{error.response.url.host} answers {status}{said}; type it again later")


def harmless(text: str) -> str:
    """A server's words, short and without a token that they may repeat."""
    return TOKENS.sub("…", " ".join(text.split()))[:300]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.publish", description="Put the tuned model on a hub.")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository; made, where there is none")
    parser.add_argument("kind", nargs="?", choices=sorted(MODELS), default="adapter", help="adapter, if left out")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--replace", action="store_true", help="drop files that the repository has beside these")
    parser.add_argument("--license", type=Path, metavar="FILE", help="the base's licence, where it came without one")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, and send nothing")
    options = parser.parse_args(arguments)
    name, kind = options.name, options.kind
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or "--" in name or ".." in name:
        raise Refusal(f"{name}: is no name of a repository; give OWNER/NAME, of letters, digits, - . and _")
    load()
    token = repository.token("HF_TOKEN")
    if not options.dry_run and constants.is_offline_mode():
        raise Refusal("HF_HUB_OFFLINE is set; unset it, or see what would go with --dry-run")
    if not options.dry_run and not token:
        raise Refusal(f"HF_TOKEN is not set; set it to a token that may write, from {SITE}/settings/tokens")
    if not any(MODELS[kind].glob("*.safetensors")) or not LOCK.is_file():
        raise Refusal(f"{MODELS[kind]}: holds no model yet; make it with dvc repro, or fetch it with dvc pull")
    asked = find_licence(options.license)
    if not asked.allows(name.partition("/")[2]):
        raise Refusal(f"{name}: {asked.file} asks for a name that begins with {asked.name!r}; choose another")
    lock = read_lock()
    commit = refuse_another_state(MODELS[kind], lock)
    warn_unpushed(commit)
    folder = FOLDERS / name.replace("/", "--")
    with new_folder(folder) as partial_folder:
        fill(partial_folder, kind, name, asked, commit, lock)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>15,} bytes  {path.name}", file=sys.stderr)
    if options.dry_run:
        print(f"written to {folder}, and not sent")
        return
    message = f"The {kind} that commit {commit[:12]} makes"
    print(send(folder, name, token, message, options.private, options.replace))


if __name__ == "__main__":
    run(main)
