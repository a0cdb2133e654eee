"""The cross-entropy of the supervised tokens, without ever holding all their logits."""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from stages.models.compiled import any_length

# rows of a 262,144-word vocabulary in float32 are 1 MiB each
TOKENS_AT_ONCE = {"cpu": 128, "cuda": 2048}
# to a multiple of which a GPU's tokens are filled up: for each number of them cuBLAS may take another kernel, and
# loading one that was not used before waits until the GPU has nothing left to do
STEP = 256


@functools.lru_cache(maxsize=1)
def _workspace(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] in `dtype` and in float32, kept: on a CPU, getting such large tensors from the kernel anew takes as long
    as filling them."""
    shape = (TOKENS_AT_ONCE["cpu"], vocabulary)
    return torch.empty(shape, dtype=dtype), torch.empty(shape)


class _HeadLoss(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[target] of each token, its gradient found on the way forward.

    The gradient of the hidden states, (softmax - onehot) @ weight, needs the softmax that the loss needs, so that two
    matrix products serve where autograd would keep the logits or make them again (Wijmans et al. 2024, "Cut your
    losses in large-vocabulary language models", section 4, without its sparsity).
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None):
        tokens, cuda = len(hidden), hidden.device.type == "cuda"
        if cuda:
            hidden, targets = F.pad(hidden, (0, 0, 0, -tokens % STEP)), F.pad(targets, (0, -tokens % STEP))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        at_once = TOKENS_AT_ONCE[hidden.device.type]
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            if cuda:
                _choose_kernels(len(weight), weight.dtype, softcap)
                product = hidden[rows] @ weight.T
                losses[rows] = any_length(losses_in_one)(product, targets[rows, None], softcap)
            else:
                products, scores = _workspace(len(weight), weight.dtype)
                product = products[: len(hidden[rows])]
                torch.mm(hidden[rows], weight.T, out=product)
                losses[rows] = _losses(product, scores[: len(product)], targets[rows, None], softcap)
            if gradient is not None:
                gradient[rows] = product @ weight
        ctx.save_for_backward(None if gradient is None else gradient[:tokens])
        return losses[:tokens]

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), None, None, None


def _losses(product: torch.Tensor, logits: torch.Tensor, index: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """[N], each token's loss; `product`, its scores [N, V], becomes the loss's gradient by them. index: [N, 1];
    logits: [N, V], float32, is overwritten."""
    logits.copy_(product)
    slope = None
    if softcap is not None:
        slope = torch.tanh(logits / softcap)
        logits = slope * softcap
    chosen = logits.gather(1, index)
    highest = logits.amax(1, keepdim=True)
    mass = logits.sub_(highest).exp_().sum(1, keepdim=True)  # from here on `logits` holds exponentials
    softmax = logits.div_(mass)
    softmax.scatter_add_(1, index, -torch.ones_like(chosen))
    if slope is not None:
        softmax *= 1 - slope**2
    product.copy_(softmax)
    return (mass.log() + highest - chosen)[:, 0]


def losses_in_one(product: torch.Tensor, index: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`_losses` for a compiler, which makes two reads and a write of it: passes over [N, V] are what costs."""
    logits = product.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    mass = logits.logsumexp(1, keepdim=True)
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = (logits - mass).exp() - (columns == index).float()
    if softcap is not None:
        gradient = gradient * (1 - (logits / softcap) ** 2)
    found = (mass - logits.gather(1, index))[:, 0]
    product.copy_(gradient)
    return found


@functools.cache
def _choose_kernels(vocabulary: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Have the compiler choose among its kernels on a few tokens: it tries them on copies of what they overwrite, for
    which there is no room beside TOKENS_AT_ONCE of them where packs are as large as fit. Of fewer tokens than two for
    each of the GPU's 132 or so multiprocessors it would take a sum over the vocabulary apart."""
    product = torch.zeros(2 * STEP, vocabulary, dtype=dtype, device="cuda")
    any_length(losses_in_one)(product, torch.zeros(2 * STEP, 1, dtype=torch.long, device="cuda"), softcap)


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """[N], the cross-entropy of each token, in nats, float32.

    hidden: [N, H]; head: the output embedding, its weight [V, H]; targets: [N], each a token id; softcap: the bound
    of Gemma 2's final logits, c·tanh(logit/c).
    """
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return _HeadLoss.apply(hidden, head.weight, targets, softcap)

    def losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return F.cross_entropy(logits, targets, reduction="none")

    # a head that is trained; a part's logits are made again on the way back
    at_once = TOKENS_AT_ONCE[hidden.device.type]
    parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
