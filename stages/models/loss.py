"""The cross-entropy of the supervised tokens, without ever holding all their logits."""

import torch
import torch.nn.functional as F

TOKENS_AT_ONCE = 128  # rows of a 262,144-word vocabulary in float32 are 128 MiB


class _HeadLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], its gradient found on the way forward.

    The gradient of the hidden states, (softmax - onehot) @ weight, needs the softmax that the loss needs, so that two
    matrix products serve where autograd would keep the logits or make them again (Wijmans et al. 2024, "Cut your
    losses in large-vocabulary language models", section 4, without its sparsity).
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None):
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            logits = (hidden[rows] @ weight.T).float()
            slope = None
            if softcap is not None:
                slope = torch.tanh(logits / softcap)
                logits = slope * softcap
            index = targets[rows, None]
            chosen = logits.gather(1, index)
            highest = logits.amax(1, keepdim=True)
            mass = logits.sub_(highest).exp_().sum(1, keepdim=True)  # from here on `logits` holds exponentials
            total += (mass.log() + highest - chosen).sum()
            if gradient is not None:
                softmax = logits.div_(mass)
                softmax.scatter_add_(1, index, -torch.ones_like(chosen))
                if slope is not None:
                    softmax *= 1 - slope**2
                gradient[rows] = softmax.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Sum over N tokens of the cross-entropy, in nats, float32.

    hidden: [N, H]; head: the output embedding, its weight [V, H]; targets: [N], each a token id; softcap: the bound
    of Gemma 2's final logits, c·tanh(logit/c).
    """
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return _HeadLoss.apply(hidden, head.weight, targets, softcap)
    logits = head(hidden).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, reduction="sum")
