"""params.yaml in, typed sections out; what it does not know, or what cannot be meant, is refused in one line.

python -m stages.params        says whether params.yaml is sound
"""

import difflib
import importlib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import ruamel.yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml.error import YAMLError

from stages.refusal import Refusal, run

# What pydantic's errors ask for, in words for people; the braces are filled from the error's context.
WANTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}
# Credentials of Hugging Face, ModelScope and GitHub, as they are issued.
TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")

NUMBER = r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?"


class Section(BaseModel):
    """A section of params.yaml: every key must be there, no other may, and a value is never converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Elsewhere(ValueError):
    """What is wrong with a section whose fields stand in the class of a module."""

    def __init__(self, error: ValidationError, module: str):
        super().__init__(str(error))
        self.error = error
        self.module = module


def _from_module(package: str, key: str, name: str) -> WrapValidator:
    """A section whose fields stand in the module of `package` that its `key` names, in the class `name`."""

    def validate(value: Any, _handler: Any) -> Section:
        here = Path(__file__).parent / package
        known = sorted(p.stem for p in here.glob("*.py") if f"class {name}(" in p.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise PydanticCustomError("model_type", "")
        if value.get(key) not in known:
            wanted = PydanticCustomError("choice", "one of {known}", {"known": ", ".join(known)})
            problem = InitErrorDetails(type=wanted if key in value else "missing", loc=(key,), input=value.get(key))
            raise _Elsewhere(ValidationError.from_exception_data(name, [problem]), f"stages/{package}")
        try:
            return getattr(importlib.import_module(f"stages.{package}.{value[key]}"), name).model_validate(value)
        except ValidationError as error:
            raise _Elsewhere(error, f"stages/{package}/{value[key]}.py") from None

    return WrapValidator(validate)


Source = Annotated[Section, _from_module("sources", "source", "Spec"), PlainSerializer(lambda s: s.model_dump())]
Task = Annotated[Section, _from_module("tasks", "name", "Options"), PlainSerializer(lambda s: s.model_dump())]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Quantize = Literal["nf4", "nf4-single", "int8"]


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB)", text):
        raise PydanticCustomError("size", "a size such as 500MB or 2GB")
    return text


def _address(text: str) -> str:
    found = re.fullmatch(r"[A-Za-z0-9._-]+:([0-9]{1,5})", text)
    if not found or not 0 < int(found[1]) < 65536:
        raise PydanticCustomError("address", "an address and a port such as 10.0.0.1:29500")
    return text


class Model(Section):
    fetch: Source
    chat_template: str | None = Field(pattern=r"^[a-z0-9_]+$")


class Data(Section):
    fetch: Source
    license: str


class Prepare(Section):
    group_by: str
    validation: Fraction
    test: Annotated[float, Field(gt=0, lt=1)]
    rows: Count | None
    seed: Seed


class Encode(Section):
    max_length: Annotated[int, Field(ge=8, le=2**20)]


class Lora(Section):
    r: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    dropout: Fraction
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    method: Literal["lora", "rslora", "dora"]
    init: Literal["default", "gaussian", "pissa", "olora"]
    quantize: Quantize | None
    trainable_tokens: list[str]
    modules_to_save: list[Literal["embed_tokens", "lm_head"]]

    @property
    def of_whole_weights(self) -> str | None:
        """The setting that reads or changes a weight as a whole, beside its layer's product; None where none does."""
        if self.method == "dora":
            return "method: dora"
        return f"init: {self.init}" if self.init in ("pissa", "olora") else None

    @model_validator(mode="after")
    def _together(self):
        if self.init in ("pissa", "olora") and (self.method != "lora" or self.quantize):
            # they change the base's weights, and what is saved is the difference: twice the rank, and plain LoRA
            raise ValueError(f"init {self.init} goes with method lora and quantize null alone; set one of them so")
        if self.trainable_tokens and self.modules_to_save:
            raise ValueError("trainable_tokens are rows of what modules_to_save trains whole; empty one of the two")
        return self


class Train(Section):
    epochs: Annotated[float, Field(gt=0, le=1000)]
    batch_size: Count
    order: Literal["shuffled", "shared"]
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)]
    optimizer: Literal["adamw", "adamw_8bit"]
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_ratio: Fraction
    weight_decay: Annotated[float, Field(ge=0, lt=1)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    validations: Count
    early_stopping: Count | None
    keep: Literal["last", "best"]
    metric: Literal["loss", "score"]
    metric_rows: Count
    seed: Seed

    @model_validator(mode="after")
    def _together(self):
        if self.early_stopping and self.early_stopping >= self.validations:
            raise ValueError(
                f"early_stopping {self.early_stopping} never comes with {self.validations} validations; "
                "raise validations or lower it"
            )
        return self


class Merge(Section):
    onto: Literal["trained", "stored"]
    max_shard_size: Annotated[str, AfterValidator(_size)]
    rows: Count
    max_kl: Annotated[float, Field(gt=0)]


class Evaluate(Section):
    rows: Count | None
    shots: Annotated[int, Field(ge=1, le=64)]
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)]


class Machine(Section):
    dtype: Literal["auto", "float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda", "xla"]
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=64)]
    rendezvous: Annotated[str, AfterValidator(_address)] | None
    tokens_per_pack: Literal["auto"] | Count
    rows_per_batch: Literal["auto"] | Count
    engine: Literal["batches", "vllm"]
    shard_base: Literal["auto"] | bool
    deterministic: bool
    checkpoint_minutes: Literal["auto"] | Annotated[float, Field(gt=0, le=10**6)]
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]]


class Params(Section):
    model: Model
    data: Data
    task: Task
    prepare: Prepare
    encode: Encode
    lora: Lora
    train: Train
    merge: Merge
    evaluate: Evaluate
    machine: Machine


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check the whole file; raise Refusal at the first thing that is wrong."""
    values = _values(path)
    if not isinstance(values, dict):
        raise Refusal(f"{path}: is {_kind(values)} where sections belong; restore it with: git checkout {path}")
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise Refusal(f"{path}: {_sentence(error, (), values)}") from None
    if params.prepare.validation + params.prepare.test >= 1:
        raise Refusal(f"{path}: prepare.validation + prepare.test is 1 or more and leaves no training rows; lower one")
    for setting, others in _apart(params).items():
        for name, asked in others.items():
            if asked:
                raise Refusal(f"{path}: {setting} does not go with {name}; set one of them otherwise")
    return params


def _apart(params: Params) -> dict[str, dict[str, Any]]:
    """A setting that is made, and those elsewhere in the file that it does not go with: which of them are made."""
    lora, train, machine = params.lora, params.train, params.machine
    found: dict[str, dict[str, Any]] = {}
    if machine.shard_base is True:
        whole = lora.of_whole_weights
        found["machine.shard_base: true"] = {
            f"lora.{whole}": whole is not None,
            "train.metric: score, since a base in shares answers nothing": train.metric == "score",
        }
    if machine.device == "xla":
        found["machine.device: xla"] = {
            "train.optimizer: adamw_8bit": train.optimizer == "adamw_8bit",
            "train.metric: score": train.metric == "score",
            "lora.trainable_tokens": lora.trainable_tokens,
            "lora.modules_to_save": lora.modules_to_save,
            "machine.devices other than auto: it takes all TPU cores of one machine": machine.devices != "auto",
            "machine.rendezvous: it takes all TPU cores of one machine": machine.rendezvous,
        }
    return found


def _values(path: Path) -> Any:
    """What the file holds, as YAML 1.2, in which 1e-05 is a number; PyYAML's 1.1 would make it text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Refusal(f"{path}: there is no such file; run in the repository's top folder") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read: {error.strerror}; restore it with: git checkout {path}") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    # before anything quotes the file; in a comment, git would keep it too
    for number, line in enumerate(text.splitlines(), start=1):
        if TOKENS.search(line):
            raise Refusal(
                f"{path}: line {number} ({TOKENS.sub('…', line).strip()[:60]}) holds an access token, which git would "
                "keep for ever; take it out, revoke it, and put the new one in the environment (HF_TOKEN)"
            )
    try:
        depth = 0
        for event in ruamel.yaml.YAML(typ="safe", pure=True).parse(text):
            line = event.start_mark.line + 1
            if isinstance(event, ruamel.yaml.AliasEvent):  # a few lines of them unfold to more than memory holds
                raise Refusal(f"{path}: line {line}: *{event.anchor} is an alias; write out what it stands for")
            depth += isinstance(event, ruamel.yaml.CollectionStartEvent)
            depth -= isinstance(event, ruamel.yaml.CollectionEndEvent)
            if depth > 50:  # what follows recurses
                raise Refusal(f"{path}: line {line} is nested too deep; restore it with: git checkout {path}")
        return ruamel.yaml.YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or "it holds a character that YAML does not allow"
        remedy = f"mend it, or restore it with: git checkout {path}"
        raise Refusal(f"{path}: {where} is not YAML: {problem}; {remedy}") from None
    except ValueError as error:
        reason = str(error).split(";")[0]
        raise Refusal(f"{path}: holds a number or a date that cannot be read: {reason}; mend it") from None


def _sentence(
    error: ValidationError, above: tuple, values: dict, remedy: str = "restore it with: git checkout params.yaml"
) -> str:
    """What pydantic found in the section at `above`, as a sentence that names the key and what was meant."""
    problems = error.errors()
    # a key misspelt is both unknown and missing: the unknown one tells what was meant
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, _Elsewhere):
        return _sentence(inner.error, (*above, *first["loc"]), values, f"{inner.module} says what it is")
    known, _ = _held((*above, *first["loc"]), values)
    key = ".".join(known)
    if first["type"] == "extra_forbidden":
        siblings = [problem for problem in problems if problem["loc"][:-1] == first["loc"][:-1]]
        return f"{key} is not a parameter; {_meant(known, siblings, values)}"
    if first["type"] == "missing":
        return f"{key}.{first['loc'][-1]} is missing; {remedy}".lstrip(".")
    if first["type"] == "invalid_key":
        section = ".".join(map(str, (*above, *first["loc"][:-1])))
        return f"{section or 'the file'} holds the key {first['input']!r}, which is not text; take it out"
    if first["type"] == "value_error":
        return f"{key}: {inner}"
    # of a union, every alternative has errors of its own, under its name; the one that leads deepest is meant
    field = first["loc"][: len(known) - len(above)]
    places = [(*_held((*above, *p["loc"]), values), p) for p in problems if p["loc"][: len(field)] == field]
    depth = max(len(known) for known, _, _ in places)
    places = [place for place in places if len(place[0]) == depth]
    known, value, first = places[0]
    wanted = " or ".join(dict.fromkeys(_wanted(problem) for _, _, problem in places))
    quoted = isinstance(value, str) and first["type"] in ("int_type", "float_type") and re.fullmatch(NUMBER, value)
    return f"{'.'.join(known)} is {_kind(value)}; it should be {wanted}{' without quotes' if quoted else ''}"


def _held(location: tuple, values: dict) -> tuple[list[str], Any]:
    """The part of pydantic's location that the file has, and its value there; the names of a union's alternatives
    ("list[str]") are left out."""
    known, holder = [], values
    for part in location:
        if (isinstance(holder, list) and isinstance(part, int)) or (isinstance(holder, dict) and part in holder):
            known.append(str(part))
            holder = holder[part]
    return known, holder


def _meant(known: list[str], siblings: list[dict], values: dict) -> str:
    """Which parameter of its section an unknown one was meant to be, or which there are. All are required, so a
    section's are what the file holds, less the unknown, with the missing."""
    section = values
    for part in known[:-1]:
        section = section[int(part)] if isinstance(section, list) else section[part]
    unknown = {problem["loc"][-1] for problem in siblings if problem["type"] == "extra_forbidden"}
    missing = [problem["loc"][-1] for problem in siblings if problem["type"] == "missing"]
    there = [name for name in section if name not in unknown]
    close = [difflib.get_close_matches(known[-1], names, n=1, cutoff=0.4) for names in (missing, there)]
    near = [*close[0], *(name for name in there if known[-1].startswith(name)), *close[1]]  # rank: r
    if near:
        return f"did you mean {'.'.join([*known[:-1], near[0]])}?"
    return f"take it out; those there are: {', '.join(map(str, [*there, *missing]))}"


def _wanted(problem: dict) -> str:
    form = WANTED.get(problem["type"])
    return form.format(**problem.get("ctx", {})) if form else problem["msg"]


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return repr(value)[:60]


def main(arguments: list[str]) -> None:
    """Check the file named, or params.yaml."""
    path = Path(arguments[0]) if arguments else Path("params.yaml")
    load(path)
    print(f"{path} is sound", file=sys.stderr)


if __name__ == "__main__":
    run(main)
