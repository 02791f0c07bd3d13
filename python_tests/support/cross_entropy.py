"""Problems for the cross-entropy under a linear head, its oracle, and torch's own."""

import functools

import pytest
import torch
import torch.nn.functional as F

import sorted_kernels as sk
from support.oracle import assert_within_twice
from support.poison import poisoned

IGNORED = -100
REDUCTIONS = ("none", "mean", "sum")
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
exit_counts = pytest.mark.parametrize("exits", [None, 1, 3, 8], ids=lambda e: f"E={e}")
EQUAL, DIFFERENT = "equal", "different"


def problem(exits=None, rows=7, words=11, k=5, K=9, dtype=torch.float32, bias=True, ignored="some"):
    """Hidden states, a head that is NaN past its first k columns, a bias and targets."""
    hidden = torch.randn(*(() if exits is None else (exits,)), rows, k).to(dtype)
    weight = poisoned(torch.randn(words, k).to(dtype), (words, K))
    target = torch.randint(words, (rows,))
    kept = {"none": rows, "some": rows - rows // 3, "all but one": 1, "all": 0}[ignored]
    target[torch.randperm(rows)[kept:]] = IGNORED
    return hidden, weight, torch.randn(words).to(dtype) if bias else None, target


def weighing(function):
    """Takes ``exit_weights``, too: losses (E,) or (E, ...), each exit's times its weight."""

    @functools.wraps(function)
    def call(*args, exit_weights=None, **options):
        losses = function(*args, **options)
        if exit_weights is None:
            return losses
        weights = torch.as_tensor(exit_weights).to(losses)
        return losses * weights.view(-1, *[1] * (losses.dim() - 1))

    return call


@weighing
def exact(hidden, block, bias, target, reduction="mean", label_smoothing=0.0, ignore_index=IGNORED):
    """Written out: minus the target's log-probability, mixed with the mean over the words."""
    logits = hidden @ block.T if bias is None else hidden @ block.T + bias
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    kept = target != ignore_index
    index = target.where(kept, torch.zeros_like(target)).long().expand(hidden.shape[:-1])
    losses = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(-1)
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if reduction == "none":
        return losses
    rows = tuple(range(losses.dim() - target.dim(), losses.dim()))
    total = losses.sum(rows) if rows else losses
    return total / kept.sum() if reduction == "mean" else total


@weighing
def plain(hidden, block, bias, target, reduction="mean", label_smoothing=0.0, ignore_index=IGNORED):
    """Torch's own operators in the dtype of the hidden states, logits whole."""
    logits = F.linear(hidden, block, bias).float()
    many = hidden.shape[:-1] != target.shape
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = [
        F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction=reduction, **options)
        for z in (logits if many else [logits])
    ]
    shape = hidden.shape[:-1] if reduction == "none" else hidden.shape[: int(many)]
    return torch.stack(losses).view(shape)


def gradients_of(function, hidden, weight, bias, *rest, dy, **options):
    """The loss, and the gradients of hidden, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, *rest, **options)
    loss.backward(dy.to(loss))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def ours(hidden, weight, bias, target, **options):
    return sk.linear_cross_entropy(hidden, weight, target, bias=bias, **options)


def upstream(hidden, target, reduction, kind=DIFFERENT):
    shape = (
        hidden.shape[:-1]
        if reduction == "none"
        else hidden.shape[: hidden.dim() - 1 - target.dim()]
    )
    return torch.randn(()).expand(shape) if kind == EQUAL else torch.randn(shape)


def check(hidden, weight, bias, target, dy, **options):
    """Losses and gradients at most twice torch's own error away from float64's."""
    block = weight[:, : hidden.shape[-1]]
    wide = [None if t is None else t.double() for t in (hidden, block, bias)]
    found = gradients_of(ours, hidden, weight, bias, target, dy=dy, **options)
    stock = gradients_of(plain, hidden, block, bias, target, dy=dy, **options)
    right = gradients_of(exact, *wide, target, dy=dy, **options)
    assert not found[2][:, hidden.shape[-1] :].any()
    found[2] = found[2][:, : hidden.shape[-1]]
    for name, *three in zip(("loss", "dx", "dw", "db"), found, stock, right, strict=False):
        assert_within_twice(*three, name)
