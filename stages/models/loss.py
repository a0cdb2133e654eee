"""The cross-entropy of the supervised tokens, without ever holding all their logits."""

import functools

import torch
import torch.nn.functional as F

TOKENS_AT_ONCE = 128  # rows of a 262,144-word vocabulary in float32 are 128 MiB


@functools.lru_cache(maxsize=1)
def _workspace(vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[TOKENS_AT_ONCE, V] in `dtype` and in float32, kept: on a CPU, getting such large tensors from the kernel anew
    takes as long as filling them."""
    shape = (TOKENS_AT_ONCE, vocabulary)
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, device=device)


class _HeadLoss(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[target] of each token, its gradient found on the way forward.

    The gradient of the hidden states, (softmax - onehot) @ weight, needs the softmax that the loss needs, so that two
    matrix products serve where autograd would keep the logits or make them again (Wijmans et al. 2024, "Cut your
    losses in large-vocabulary language models", section 4, without its sparsity).
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None):
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        products, scores = _workspace(len(weight), weight.dtype, weight.device)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            product = products[: len(hidden[rows])]
            torch.mm(hidden[rows], weight.T, out=product)
            logits = scores[: len(product)].copy_(product)
            slope = None
            if softcap is not None:
                slope = torch.tanh(logits / softcap)
                logits = slope * softcap
            index = targets[rows, None]
            chosen = logits.gather(1, index)
            highest = logits.amax(1, keepdim=True)
            mass = logits.sub_(highest).exp_().sum(1, keepdim=True)  # from here on `logits` holds exponentials
            losses[rows] = (mass.log() + highest - chosen)[:, 0]
            if gradient is not None:
                softmax = logits.div_(mass)
                softmax.scatter_add_(1, index, -torch.ones_like(chosen))
                if slope is not None:
                    softmax *= 1 - slope**2
                gradient[rows] = product.copy_(softmax) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), None, None, None


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """[N], the cross-entropy of each token, in nats, float32.

    hidden: [N, H]; head: the output embedding, its weight [V, H]; targets: [N], each a token id; softcap: the bound
    of Gemma 2's final logits, c·tanh(logit/c).
    """
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return _HeadLoss.apply(hidden, head.weight, targets, softcap)
    logits = head(hidden).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, reduction="none")
