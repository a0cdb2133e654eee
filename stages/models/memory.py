"""A model's config.json and params.yaml in; the bytes that training, merging and answering hold at most, out.

Knows shapes alone: no weights are read, and torch is not imported. What is counted is what the stages hold (each part
names its module); what was measured beside it is in bench/results/gpus.json (python -m bench.memory). By it the doctor
warns, and machine.shard_base: auto decides.
"""

from dataclasses import dataclass
from typing import Any

from stages.params import Lora, Params

GIB = 2**30

# Of modules beside this one, which import torch; tests/test_memory.py compares them.
TOKENS_PER_PACK = {"cpu": 1024, "cuda": 24576, "xla": 1024}  # machine.py
ROWS_PER_BATCH = {"cpu": 105, "cuda": 256}
PROMPT_TOKENS = {"cpu": 8192}  # generate.py
HEAD_TOKENS = {"cpu": 128, "cuda": 2048}  # loss.py
ROOM = 128  # generate.RoomyLayer
GRAPHS, KEYS = 12, 4  # graphs.py: MOST, KEYS

ERROR = 0.15  # of what is estimated here, at most (bench/results/gpus.json)
# a weight's; nf4: 4 bits, and for each 64 weights a scale of 32; int8's scales are one a row
QUANTIZED_BYTES = {"nf4": 4.5 / 8, "nf4-single": 4.5 / 8, "int8": 1.0}
# where several processes share it: nf4's scales stay quantized, 8 bits and a 256th of 32
SHARED_BYTES = QUANTIZED_BYTES | {"nf4": 4.127 / 8}
# What the process holds before any weights: Python, torch and what comes with it; on a GPU the context of CUDA and the
# workspaces of its libraries, which PyTorch does not count among its own.
PROCESS = {"cpu": 0.75 * GIB, "cuda": 0.8 * GIB}
# On a CPU freed memory is kept (machine.py), and packs of other sizes do not fit into its pieces: what comes and goes
# takes so many times its own size. From the default run, whose training came to 3.75 GiB, where full packs take 2.3.
PIECES = 2.2
# What config.json leaves out where it is its class's default; of the families that do so.
DEFAULTS = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "gemma3n_text": {
        "vocab_size": 262400,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
    },
}
FOUR_NORMS = ("gemma2", "gemma3_text", "gemma3n_text")  # to a layer; others have two
QUERY_NORMS = ("gemma3_text", "gemma3n_text", "qwen3")
TIED = ("gemma", "gemma2", "gemma3_text", "gemma3n_text")  # by their classes' default
RECORDED = ("gemma", "gemma2", "gemma3_text", "llama")  # families.py: as a CUDA graph
SHARDED = RECORDED  # families.py: layer by layer
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """What config.json says of the language model. `parameters` are all of the folder's, an image tower's too, where
    the size of its files is known; `stored` is the bytes of each there."""

    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    queries: int  # elements a token, all heads together
    keys: int
    vocabulary: int
    tied: bool
    capped: bool
    stored: int
    parameters: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices by name, in and out."""
        h, i, q, k = self.hidden, self.inner, self.queries, self.keys
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linear.values())

    @property
    def norms(self) -> int:
        return 4 if self.kind in FOUR_NORMS else 2


def shape(config: dict[str, Any], weight_bytes: int | None = None) -> Shape | None:
    """The shape that `config` describes; None where it is not that of a decoder known here. weight_bytes: of the
    safetensors files, where known."""
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    kind = text.get("model_type") or config.get("model_type", "")
    values = DEFAULTS.get(kind, {}) | {key: value for key, value in text.items() if value is not None}
    try:
        layers, hidden, heads = (values[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        inner, vocabulary = values["intermediate_size"], values["vocab_size"]
        inner = max(inner) if isinstance(inner, list) else inner  # of Gemma 3n, one a layer
        size = values.get("head_dim") or hidden // heads
        queries, keys = heads * size, (values.get("num_key_value_heads") or heads) * size
        named = (holder.get(key) for holder in (text, config) for key in ("dtype", "torch_dtype"))
        stored = SIZES[next(filter(None, named), "bfloat16")]
        tied = bool(values.get("tie_word_embeddings", kind in TIED))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    if not all(isinstance(number, int) for number in (layers, hidden, heads, inner, vocabulary, queries, keys)):
        return None
    found = Shape(
        kind=kind,
        layers=layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        queries=queries,
        keys=keys,
        vocabulary=vocabulary,
        tied=tied,
        capped=values.get("attn_logit_softcapping") is not None,
        stored=stored,
        parameters=0,
    )
    own = found.linear_parameters + vocabulary * hidden * (1 if tied else 2) + layers * found.norms * hidden
    return Shape(**{**vars(found), "parameters": weight_bytes // stored if weight_bytes else own})


def adapter_parameters(model: Shape, lora: Lora) -> int:
    """The values that are trained (stages/models/lora.py): adapters; DoRA's lengths; of embedding and head the trained
    tokens' rows, or all, and once where they are one matrix."""
    sizes = adapted(model, lora).values()
    adapters = model.layers * sum(lora.r * (a + b) + (b if lora.method == "dora" else 0) for a, b in sizes)
    matrices = 1 if model.tied else 2
    rows = len(set(lora.trainable_tokens)) * matrices
    if lora.modules_to_save:
        rows = model.vocabulary * min(matrices, len(set(lora.modules_to_save)))
    return adapters + rows * model.hidden


def adapted(model: Shape, lora: Lora) -> dict[str, tuple[int, int]]:
    """The matrices of a layer that get an adapter."""
    names = model.linear if lora.target_modules == "all-linear" else lora.target_modules
    return {name: size for name, size in model.linear.items() if name in names}


@dataclass(frozen=True)
class Held:
    """What training holds, in bytes. `peak` is what PyTorch, or on a CPU the process, reports as its largest where all
    packs are alike; `needed` is what there must be room for: on a GPU CUDA's own, too."""

    weights: float
    adapters: float
    activations: float
    head: float
    process: float
    on_gpu: bool
    recomputed: float  # beside graphs, what a pass without one holds, its head too; 0 where there are none

    @property
    def peak(self) -> float:
        # while graphs are recorded, which is when most is held, the head has not begun
        held = self.weights + self.adapters + self.activations + (0 if self.recomputed else self.head)
        return held + (0 if self.on_gpu else self.process)

    @property
    def needed(self) -> float:
        passing = (self.activations + max(self.head, self.recomputed)) * (1 if self.on_gpu else PIECES)
        return self.weights + self.adapters + passing + self.process


def weights(model: Shape, dtype: str, quantize: str | None, shares: int = 1) -> float:
    """Bytes of the base; quantize: on a GPU, of the language model's matrices (quantized.py). With several shares, of
    what one process holds: its part of the layers, two buffers, embedding and head; no image tower (sharded.py)."""
    size = SIZES[dtype]
    quantized = SHARED_BYTES if shares > 1 else QUANTIZED_BYTES
    packed = model.linear_parameters * (quantized[quantize] if quantize else size)
    if shares > 1:
        words = model.vocabulary * model.hidden * (1 if model.tied else 2)
        return words * size + packed * (1 / shares + 2 / model.layers)
    return (model.parameters - model.linear_parameters) * size + packed


def pack_tokens(params: Params, device: str) -> int:
    """Tokens of the largest pack that can come: no larger than a step, but as long as one row at least."""
    asked = params.machine.tokens_per_pack
    tokens = TOKENS_PER_PACK[device] if asked == "auto" else asked
    longest = params.encode.max_length
    return max(longest, min(tokens, params.train.batch_size * longest))


def recorded_size(tokens: int) -> int:
    """graphs.size_of: the padded size of the largest pack."""
    return -(-tokens // 256) * 256


def gated_again(lora: Lora) -> bool:
    """Whether a GPU makes act(gate)·up again on the way back, and does not keep it (fused._GatedLora)."""
    named = lora.target_modules
    whole = named == "all-linear" or {"gate_proj", "up_proj", "down_proj"} <= set(named)
    return whole and lora.method != "dora" and not lora.dropout


def layer_bytes(model: Shape, lora: Lora, dtype: str, compiled: bool, flash: bool, longest: int, shared: bool) -> float:
    """What one token of a row of `longest` leaves behind in one layer for the way back.

    compiled: norms, rotary embedding and gate are, as on every GPU (graphs.py, fused.py); otherwise norms and attention
    keep copies in float32, and the gate keeps all its steps. flash: attention is one kernel (attention.py).
    """
    b, h, i, q, k = SIZES[dtype], model.hidden, model.inner, model.queries, model.keys
    own = adapted(model, lora)
    wide = b if compiled else 4
    kept = model.norms * wide * h
    if model.kind in QUERY_NORMS:
        kept += wide * (q + k) + (b * k if compiled else 0)  # values, where the three are one product
    if own.keys() & {"q_proj", "k_proj", "v_proj"}:
        kept += b * h  # what goes into them, once
    if own.keys() & {"gate_proj", "up_proj"}:
        kept += b * h
    keys = (KEYS if shared else 1) * k
    if flash:
        kept += b * (q + 2 * keys + q) + 4 * model.heads
    else:
        kept += wide * (q + 2 * q + q) + (b * q if "o_proj" in own else 0)  # keys and values once for each query's head
        if model.capped:  # _softcapped's bounded scores and softmax, of each query with each key of its row
            kept += model.heads * longest * (4 + 2 * b)
    kept += b * i * (2 if compiled else 3)
    if not compiled or ("down_proj" in own and not gated_again(lora)):
        kept += b * i
    if lora.dropout:  # of each element that goes into an adapter, whether it is kept
        kept += sum(a for a, _ in own.values())
    if lora.method == "dora":  # PEFT's forward: each adapter a float32 copy of what goes in
        kept += sum(4 * a + 2 * b * out for a, out in own.values())
    return kept + b * lora.r * len(own)


def training(
    model: Shape,
    lora: Lora,
    device: str,
    dtype: str,
    tokens: int,
    longest: int,
    flash: bool = True,
    shared: bool = True,
    shares: int = 1,
) -> Held:
    """What training holds with packs of at most `tokens` tokens, of rows of at most `longest`.

    flash: the GPU is one that flash attention knows; shared: rows share beginnings, whose keys a GPU lays out once for
    each row (graphs.KEYS), as in whatever order some rows of most data sets do; shares: over how many devices the base
    is shared out, where it is.
    """
    gpu = device == "cuda"
    fused = gpu and flash and dtype != "float32" and not model.capped and model.queries // model.heads <= 256
    recorded = fused and model.kind in RECORDED and shares == 1
    tokens = recorded_size(tokens) if recorded else tokens
    own = adapter_parameters(model, lora)
    size = SIZES[dtype]
    adapters = 16 * own + (
        size * own if size != 4 else 0
    )  # values, gradients, two moments; copies in the model's format
    if recorded:
        adapters += GRAPHS * 4 * own
    layer = layer_bytes(model, lora, dtype, gpu, fused, longest, shared)
    back = (3 if gpu and gated_again(lora) else 2) * model.inner * size  # of the layer that is on its way back
    inputs = model.layers * model.hidden * size  # of layers that are computed again (recomputed.py)
    activations = tokens * (model.layers * layer + back if shares == 1 else inputs + layer + back)
    head = HEAD_TOKENS[device] * model.vocabulary * (size if gpu else size + 4)
    return Held(
        weights=weights(model, dtype, lora.quantize if gpu or shares > 1 else None, shares),
        adapters=adapters,
        activations=activations,
        head=head,
        process=PROCESS[device],
        on_gpu=gpu,
        recomputed=tokens * (inputs + layer) + max(head, tokens * (layer + back)) if recorded else 0,
    )


def sharding(model: Shape, params: Params, device: str, dtype: str, flash: bool, devices: int, room: float) -> bool:
    """Whether machine.shard_base shares the base out over `devices`; auto: on GPUs, where that can be, beside the whole
    of it not even one row of encode.max_length is sure to fit into `room`, and beside a share of it one fits."""
    asked = params.machine.shard_base
    if asked != "auto" or device != "cuda" or devices == 1:
        return asked is True and devices > 1
    if model.kind not in SHARDED or params.lora.of_whole_weights:
        return False
    longest = params.encode.max_length
    whole, share = (
        training(model, params.lora, device, dtype, longest, longest, flash, shares=shares).needed
        for shares in (1, devices)
    )
    return whole > (1 - ERROR) * room and share <= room


def most_tokens(
    model: Shape,
    lora: Lora,
    device: str,
    dtype: str,
    longest: int,
    flash: bool,
    shared: bool,
    room: float,
    shares: int = 1,
) -> int | None:
    """The largest machine.tokens_per_pack, of 256 tokens and its doubles or one and a half of them, with which training
    needs no more than `room`; None where not even one row fits."""
    steps = sorted(size for power in range(8, 16) for size in (1 << power, 3 << (power - 1)))
    fit = [
        n
        for n in steps
        if n >= longest and training(model, lora, device, dtype, n, longest, flash, shared, shares).needed <= room
    ]
    return max(fit, default=None)


def gpu_tokens_per_pack(
    model: Shape | None, params: Params, dtype: str, flash: bool, room: float, shares: int = 1
) -> int:
    """machine.tokens_per_pack on a GPU of so much `room`; auto: TOKENS_PER_PACK, or fewer where only fewer fit beside
    what answering takes meanwhile, the estimate's error allowed for; a row at least."""
    asked = params.machine.tokens_per_pack
    if asked != "auto" or model is None:
        return TOKENS_PER_PACK["cuda"] if asked == "auto" else asked
    longest = params.encode.max_length
    room = (1 - ERROR) * room - beside(model, params, "cuda", dtype)
    fit = most_tokens(model, params.lora, "cuda", dtype, longest, flash, True, room, shares)
    return min(TOKENS_PER_PACK["cuda"], fit or longest)


def merging(model: Shape, params: Params, dtype: str) -> float:
    """Main memory that merging holds: a layer at a time, the vocabulary's among them, beside the logits of both models
    (merge.answers_logits), for answers of at most evaluate.max_new_tokens tokens."""
    size = SIZES[dtype]
    largest = max(model.vocabulary * model.hidden, model.linear_parameters // model.layers)
    logits = 2 * params.merge.rows * params.evaluate.max_new_tokens * model.vocabulary * size
    return PROCESS["cpu"] + 2 * largest * max(size, model.stored) + logits


def answering(model: Shape, params: Params, device: str, dtype: str, prompt: int) -> float:
    """What answering prompts of at most `prompt` tokens holds (generate.py): the weights, keys and values, and either
    the prompts' way through a layer or the scores of their last tokens."""
    size, asked = SIZES[dtype], params.machine.rows_per_batch
    rows = ROWS_PER_BATCH[device] if asked == "auto" else asked
    if device in PROMPT_TOKENS:
        rows = min(rows, max(1, PROMPT_TOKENS[device] // prompt))
    held = rows * (prompt + ROOM) * model.layers * 2 * model.keys * size
    through = rows * prompt * (4 * model.inner + 4 * model.hidden) * size + 2 * rows * prompt**2
    if model.capped:  # eager attention
        through += rows * model.heads * prompt**2 * (4 + size)
    return PROCESS[device] + weights(model, dtype, None) + held + max(through, rows * model.vocabulary * (size + 4))


def beside(model: Shape, params: Params, device: str, dtype: str) -> float:
    """What answering validation rows while training holds beyond what training does: keys and values, and the prompts'
    way through a layer; 0 where nothing is answered (train.metric)."""
    if params.train.metric != "score":
        return 0.0
    most = params.machine.rows_per_batch
    rows = min(ROWS_PER_BATCH[device] if most == "auto" else most, params.train.metric_rows)
    asked = params.model_copy(update={"machine": params.machine.model_copy(update={"rows_per_batch": rows})})
    more = answering(model, asked, device, dtype, params.encode.max_length)
    return more - weights(model, dtype, None) - PROCESS[device]
