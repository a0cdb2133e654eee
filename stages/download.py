"""A source named in params.yaml in; its files, fit for the next stage, and where they came from (provenance.json) out.

python -m stages.download model models/base
python -m stages.download data data/raw
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from jinja2 import TemplateError

from stages import params
from stages.outputs import new_folder, write_json
from stages.refusal import Refusal, run
from stages.sources import kept
from stages.sources.provenance import Provenance, checksums
from stages.sources.weights import refuse_broken, settings

PROVENANCE = "provenance.json"
TEMPLATES = Path(__file__).parent / "models" / "templates"


def main(arguments: list[str]) -> None:
    """Fetch the model or the data into the folder named second."""
    if len(arguments) != 2 or arguments[0] not in ("model", "data"):
        raise Refusal("usage: python -m stages.download model|data FOLDER")
    refuse_in_vain()
    section = getattr(params.load(), arguments[0])
    stage = model if arguments[0] == "model" else data
    with new_folder(Path(arguments[1])) as folder:
        provenance = stage(section, folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors saves with 0600
    if provenance.kept:
        kept.forget(provenance.kept)


def refuse_in_vain() -> None:
    """Where DVC runs this stage, end if tools/doctor.py knows that the pipeline will fail: before hours of download.

    A stage of its own in front of this one would have to run at every dvc repro, since disk, token and GPU are no files
    that DVC could compare. Not imported: what the doctor knows decides about no byte of the output, so that a change of
    it must not download anew.
    """
    if "DVC_STAGE" in os.environ:
        done = subprocess.run([sys.executable, "-m", "tools.doctor"], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(done.returncode)


def data(section: params.Data, folder: Path) -> Provenance:
    """Fill `folder` with the rows' files."""
    provenance = fetch(section.fetch, folder)
    write_json(folder / PROVENANCE, {**provenance.model_dump(), "license": section.license})
    return provenance


def model(section: params.Model, folder: Path) -> Provenance:
    """Fill `folder` with a model that transformers loads: plain weights, tokenizer and chat template."""
    template = find_template(section.chat_template)
    provenance = fetch(section.fetch, folder)
    open_gguf(folder)
    if not (folder / "config.json").is_file():
        raise Refusal(f"{', '.join(provenance.files)}: is no model; fetch a .gguf file or a folder with a config.json")
    refuse_broken(folder)
    if template:
        shutil.copyfile(template, folder / "chat_template.jinja")
    refuse_without_template(folder)
    name_terminator(folder)
    write_json(folder / PROVENANCE, {**provenance.model_dump(), "produced": checksums(folder)})
    return provenance


def fetch(spec: params.Section, folder: Path) -> Provenance:
    """Have the source that `spec` is of fill `folder`."""
    provenance = importlib.import_module(f"stages.sources.{spec.source}").fetch(spec, folder)
    if PROVENANCE in provenance.files:
        raise Refusal(f"{provenance.origin[-1]}: brings a file called {PROVENANCE}, which is written here; rename it")
    return provenance


def find_template(name: str | None) -> Path | None:
    """The template's file; raises Refusal, naming those there are, when there is none."""
    known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    if name is not None and name not in known:
        raise Refusal(f"params.yaml: model.chat_template is {name!r}; templates there are: {', '.join(known)}")
    return name and TEMPLATES / f"{name}.jinja"


def open_gguf(folder: Path) -> None:
    """Put the model that a .gguf file in `folder` holds in the file's place."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise Refusal(f"{files[1].name}: is a second .gguf file beside {files[0].name}; fetch one")
    if files:
        from stages.models import gguf  # brings torch, which takes seconds that no other source needs

        gguf.dequantize(files[0], folder)
        files[0].unlink()


def refuse_without_template(folder: Path) -> None:
    """Raise Refusal when a conversation could not be written in the model's own form."""
    config = folder / "tokenizer_config.json"
    inside = settings(config, config.name).get("chat_template")
    if not inside and not (folder / "chat_template.jinja").is_file():
        known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
        raise Refusal(f"params.yaml: the model brings no chat template; set model.chat_template to one of: {known}")


def name_terminator(folder: Path) -> None:
    """Put the token that the chat template ends an answer with among those that end one, in generation_config.json:
    a pretrained checkpoint names the end of the text alone, and a model that was tuned would go on after its answer."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer  # takes a second that no data needs

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # what transformers makes of files that are not a tokenizer's, as it comes upon them
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        problem = str(error).strip().split("\n")[0]
        raise Refusal(f"the model's tokenizer cannot be opened ({problem}); bring its tokenizer.json") from None
    turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Answer")[2]
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError):  # encode says of which row
        return
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = [token for token in tokenizer(after, add_special_tokens=False).input_ids if token in special][:1]
    file = folder / "generation_config.json"
    found = settings(file, file.name)
    known = found.get("eos_token_id", tokenizer.eos_token_id)
    stops = known if isinstance(known, list) else [known] if known is not None else []
    if [*stops, *ends] and (set(ends) - set(stops) or "eos_token_id" not in found):
        write_json(file, found | {"eos_token_id": [*stops, *(end for end in ends if end not in stops)]})


if __name__ == "__main__":
    run(main)
