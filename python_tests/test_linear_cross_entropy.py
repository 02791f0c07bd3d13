"""Cross-entropy under a linear head against the float64 oracle: losses and gradients."""

import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.reference import linear_cross_entropy as reference
from support.oracle import DTYPES, assert_within_twice
from support.poison import assert_same_bits, outside, poisoned, transposed

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


def weigh(losses, exit_weights):
    """Losses (E,) or (E, ...), each exit's times its weight."""
    if exit_weights is None:
        return losses
    weights = torch.as_tensor(exit_weights).to(losses)
    return losses * weights.view(-1, *[1] * (losses.dim() - 1))


def exact(
    hidden,
    block,
    bias,
    target,
    reduction="mean",
    label_smoothing=0.0,
    ignore_index=IGNORED,
    exit_weights=None,
):
    """Written out: minus the target's log-probability, mixed with the mean over the words."""
    logits = hidden @ block.T if bias is None else hidden @ block.T + bias
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    kept = target != ignore_index
    index = target.where(kept, torch.zeros_like(target)).long().expand(hidden.shape[:-1])
    losses = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(-1)
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if reduction == "none":
        return weigh(losses, exit_weights)
    rows = tuple(range(losses.dim() - target.dim(), losses.dim()))
    total = losses.sum(rows) if rows else losses
    return weigh(total / kept.sum() if reduction == "mean" else total, exit_weights)


def plain(
    hidden,
    block,
    bias,
    target,
    reduction="mean",
    label_smoothing=0.0,
    ignore_index=IGNORED,
    exit_weights=None,
):
    """Torch's own operators in the dtype of the hidden states, logits whole."""
    logits = F.linear(hidden, block, bias).float()
    many = hidden.shape[:-1] != target.shape
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = [
        F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction=reduction, **options)
        for z in (logits if many else [logits])
    ]
    shape = hidden.shape[:-1] if reduction == "none" else hidden.shape[: int(many)]
    return weigh(torch.stack(losses).view(shape), exit_weights)


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


@exit_counts
@reductions
@pytest.mark.parametrize("ignored", ["none", "some", "all but one"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_matches_the_oracle(exits, reduction, ignored, label_smoothing):
    for bias, kind in ((True, EQUAL), (False, DIFFERENT)):
        torch.manual_seed(1)
        values = problem(exits, ignored=ignored, bias=bias)
        dy = upstream(values[0], values[3], reduction, kind)
        check(*values, dy, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("rows, words, k, K", [(1, 1, 1, 1), (1, 2, 1, 3), (65, 13, 9, 9)])
@pytest.mark.parametrize("exits", [None, 3])
def test_odd_sizes_and_size_one(rows, words, k, K, exits):
    torch.manual_seed(2)
    values = problem(exits, rows, words, k, K, ignored="none")
    for reduction in REDUCTIONS:
        check(*values, upstream(values[0], values[3], reduction), reduction=reduction)


@exit_counts
@reductions
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_no_row_that_counts(exits, reduction, label_smoothing):
    """As torch: a mean over nothing is NaN, and its gradient zero."""
    hidden, weight, bias, target = problem(exits, ignored="all")
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    dy = upstream(hidden, target, reduction, EQUAL)
    found = gradients_of(ours, hidden, weight, bias, target, dy=dy, **options)
    stock = gradients_of(plain, hidden, weight[:, :5], bias, target, dy=dy, **options)
    torch.testing.assert_close(found[0], stock[0], equal_nan=True)
    for gradient, same in zip(found[1:], stock[1:], strict=True):
        assert not gradient.any() and not same.any()


def test_no_rows_at_all():
    hidden, weight, bias, target = problem(3, rows=0)
    for reduction, result in (("sum", 0.0), ("mean", float("nan"))):
        loss = ours(hidden, weight, bias, target, reduction=reduction)
        torch.testing.assert_close(loss, torch.full((3,), result), equal_nan=True)
    assert ours(hidden, weight, bias, target, reduction="none").shape == (3, 0)


def test_ignored_class_of_the_vocabulary():
    torch.manual_seed(3)
    hidden, weight, bias, target = problem(3, rows=20, ignored="none")
    target[::3] = 0
    check(hidden, weight, bias, target, torch.randn(3), ignore_index=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
def test_dtypes(dtype, kind):
    torch.manual_seed(4)
    values = problem(3, 40, 130, 24, 31, dtype)
    for reduction in REDUCTIONS:
        check(*values, upstream(values[0], values[3], reduction, kind), reduction=reduction)


def test_a_large_vocabulary():
    torch.manual_seed(5)
    check(*problem(2, 3, 49152, 16, 18), torch.randn(2), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
def test_many_chunks(dtype, kind, monkeypatch):
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 5)
    torch.manual_seed(6)
    for ignored in ("none", "some"):
        values = problem(3, 11, 23, 6, 8, dtype, ignored=ignored)
        seen = []
        add = reference.Gradients.add
        with monkeypatch.context() as patch:
            patch.setattr(
                reference.Gradients,
                "add",
                lambda self, rows, dz, *rest, f=add, s=seen: (
                    s.append(len(dz)),
                    f(self, rows, dz, *rest),
                )[1],
            )
            check(*values, upstream(values[0], values[3], "mean", kind))
        assert max(seen) <= 5 and len(seen) >= 5


def test_any_layout_of_inputs():
    torch.manual_seed(7)
    hidden, weight, bias, target = problem(3, ignored="some")
    strided = torch.stack([target, target], 1)[:, 0].int()
    larger = torch.full((20, 12), float("nan"))
    larger[3:14, :9] = weight
    expected = gradients_of(ours, hidden, weight, bias, target, dy=torch.arange(3.0))
    found = gradients_of(
        ours, transposed(hidden), larger[3:14, :9], bias, strided, dy=torch.arange(3.0)
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_leading_axes_of_one_exit_and_of_many():
    torch.manual_seed(8)
    hidden, weight, bias, _ = problem(rows=2 * 3 * 4)
    hidden, target = hidden.view(2, 3, 4, 5), torch.randint(11, (2, 3, 4))
    assert ours(hidden, weight, bias, target).shape == ()
    assert ours(hidden, weight, bias, target[0]).shape == (2,)
    check(hidden, weight, bias, target, torch.randn(()))
    check(hidden, weight, bias, target[0], torch.randn(2, 3, 4), reduction="none")
    one = ours(hidden[0, 0, 0], weight, bias, target[0, 0, 0])
    torch.testing.assert_close(one, plain(hidden[:1, 0, 0], weight[:, :5], bias, target[0, 0, :1]))


@reductions
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_of_exits(reduction, kind, dtype):
    torch.manual_seed(8)
    values = problem(3, 65, 37, 33, 40, dtype)
    dy = upstream(values[0], values[3], reduction, kind)
    for weights in ([0.3, 0.0, 2.5], torch.tensor([-1.0, 7.0, 0.5], dtype=torch.float64)):
        check(*values, dy, reduction=reduction, exit_weights=weights)


@pytest.mark.parametrize("reduction, exits", [("mean", 2), ("sum", None), ("none", 2)])
def test_gradcheck(reduction, exits):
    torch.manual_seed(9)
    hidden, weight, bias, target = problem(exits, 4, 5, 3, 4, torch.float64)
    weight = weight.nan_to_num()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    options = {"exit_weights": None if exits is None else [0.5, 3.0]}

    def function(hidden, weight, bias):
        return ours(
            hidden, weight, bias, target, reduction=reduction, label_smoothing=0.2, **options
        )

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


# --- layers -----------------------------------------------------------------------------------


def head_with(weight, bias, k, words=None, mode="inplace"):
    """A head whose active input is k wide, and output ``words`` where given."""
    head = sk.nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype, in_dim="i",
        out_dim=None if words is None else "o", grad_mode=mode,
    )  # fmt: skip
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    sizes = {"i": k} if words is None else {"i": k, "o": words}
    sk.activate(head, sk.Submodel(**sizes))
    return head


def run_layer(head, hidden, target, dy, exit_weights=None, **options):
    leaf = hidden.detach().requires_grad_()
    loss = sk.nn.LinearCrossEntropy(head, **options)(leaf, target, exit_weights=exit_weights)
    loss.backward(dy.to(loss))
    return [loss.detach(), leaf.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("exits", [None, 3])
@reductions
@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_in_place_equals_pure_and_leaves_the_rest_alone(exits, reduction, kind, dtype):
    torch.manual_seed(10)
    hidden, weight, bias, target = problem(exits, 9, words=13, dtype=dtype)
    target.clamp_(max=7)
    dy = upstream(hidden, target, reduction, kind)
    options = {"reduction": reduction, "exit_weights": None if exits is None else [2.0, 0.5, 1.0]}
    head, pure = (head_with(weight, bias, 5, 8, mode) for mode in ("inplace", "dense"))
    found = run_layer(head, hidden, target, dy, **options)
    expected = run_layer(pure, hidden, target, dy, **options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert staircase_of(head.weight).area == staircase_of(pure.weight).area == 8 * 5
    assert staircase_of(head.bias).area == 8
    masks = {n: outside(tuple(p.shape), (8, 5)[: p.dim()]) for n, p in head.named_parameters()}
    patterns = {}
    for name, param in head.named_parameters():
        param.grad.data[masks[name]] = torch.arange(1, int(masks[name].sum()) + 1).to(dtype)
        patterns[name] = param.grad.clone()
    run_layer(head, hidden, target, dy, **options)  # a second time, onto the first
    run_layer(pure, hidden, target, dy, **options)
    for name, param in head.named_parameters():
        assert_same_bits(param.grad[masks[name]], patterns[name][masks[name]])
        second, other = param.grad[~masks[name]], pure.get_parameter(name).grad[~masks[name]]
        rounding = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(second, other, rtol=rounding, atol=rounding)
        torch.testing.assert_close(
            second.double(), 2 * patterns[name][~masks[name]].double(), rtol=0.02, atol=1e-3
        )


@pytest.mark.parametrize("stock_head", [False, True], ids=["elastic head", "stock head"])
def test_tied_embeddings(stock_head):
    """The head's and the embedding's gradients meet in one parameter."""
    torch.manual_seed(11)
    found = []
    for mode in ("inplace", "dense"):
        torch.manual_seed(12)
        table = sk.nn.Embedding(13, 9, dim="i", grad_mode=mode)
        if stock_head:
            head = torch.nn.Linear(9, 13, bias=False)
        else:
            head = sk.nn.Linear(9, 13, bias=False, in_dim="i", grad_mode=mode)
        head.weight = table.weight
        model = torch.nn.ModuleList([table, head])
        sk.activate(model, sk.Submodel(i=5))
        loss, tokens = sk.nn.LinearCrossEntropy(head), torch.randint(13, (2, 6))
        for _ in range(2):
            loss(table(tokens)[:, :-1], tokens[:, 1:]).backward()
        found.append(table.weight.grad)
        assert not table.weight.grad[:, 5:].any()
    torch.testing.assert_close(*found)
    embedded = table.weight.detach()[:, :5].clone().requires_grad_()
    F.cross_entropy(
        embedded[tokens[:, :-1]].flatten(0, 1) @ embedded.T, tokens[:, 1:].flatten()
    ).backward()
    torch.testing.assert_close(found[0][:, :5], 2 * embedded.grad)


@pytest.mark.parametrize("kind", ["hook", "post_accumulate_grad_hook"])
def test_a_hook_selects_the_pure_path_and_sees_the_gradient(kind):
    torch.manual_seed(13)
    hidden, weight, bias, target = problem(2)
    expected = run_layer(head_with(weight, bias, 5), hidden, target, torch.ones(2))
    head, seen = head_with(weight, bias, 5), []
    getattr(head.weight, f"register_{kind}")(
        lambda t: seen.append((t if kind == "hook" else t.grad).clone())
    )
    found = run_layer(head, hidden, target, torch.ones(2))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(seen, [expected[2]])
    assert staircase_of(head.weight).area == 11 * 5


def test_double_backward_in_place_is_refused():
    hidden, weight, bias, target = problem()
    loss = sk.nn.LinearCrossEntropy(head_with(weight, bias, 5))(hidden.requires_grad_(), target)
    with pytest.raises(sk.GradientError, match="double backward"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("mode", ["inplace", "dense"])
@pytest.mark.parametrize("exits", [None, 3])
def test_backward_twice_over_one_graph(mode, exits):
    torch.manual_seed(14)
    hidden, weight, bias, target = problem(exits)
    head, leaf = head_with(weight, bias, 5, mode=mode), hidden.requires_grad_()
    loss = sk.nn.LinearCrossEntropy(head)(leaf, target).sum()
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in (leaf, *head.parameters())]
    loss.backward()
    for t, first in zip((leaf, *head.parameters()), once, strict=True):
        torch.testing.assert_close(t.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_the_hidden_states_alone():
    torch.manual_seed(15)
    hidden, weight, bias, target = problem(2)
    head, leaf = head_with(weight, bias, 5), hidden.requires_grad_()
    (dx,) = torch.autograd.grad(sk.nn.LinearCrossEntropy(head)(leaf, target).sum(), leaf)
    assert head.weight.grad is None and head.bias.grad is None
    head.requires_grad_(False)
    sk.nn.LinearCrossEntropy(head)(leaf, target).sum().backward()
    torch.testing.assert_close(leaf.grad, dx)
    assert head.weight.grad is None


@pytest.mark.parametrize("kind", [EQUAL, DIFFERENT])
@pytest.mark.parametrize("mode", ["inplace", "dense"])
def test_autocast(mode, kind):
    torch.manual_seed(16)
    hidden, weight, bias, target = problem(3, 40, 130, 24, 31)
    dy = upstream(hidden, target, "mean", kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_layer(head_with(weight, bias, 24, mode=mode), hidden, target, dy)
        stock = gradients_of(plain, hidden, weight[:, :24], bias, target, dy=dy)
    right = gradients_of(
        exact, hidden.double(), weight[:, :24].double(), bias.double(), target, dy=dy
    )
    found[2] = found[2][:, :24]
    for name, *three in zip(("loss", "dx", "dw", "db"), found, stock, right, strict=True):
        assert_within_twice(*three, name)


def test_a_loss_scale_neither_overflows_nor_loses_small_gradients():
    """A float16 mean over many rows, scaled up as torch.amp.GradScaler does."""
    torch.manual_seed(17)
    hidden, weight, _, target = problem(2, 500, 300, 8, 8, torch.float16, bias=False)
    hidden, weight = hidden * 0.3, weight * 0.3
    scale = torch.full((2,), 2.0**17)
    check(hidden, weight, None, target, scale)
    dw = gradients_of(ours, hidden, weight, None, target, dy=scale)[2]
    assert dw.isfinite().all() and dw.abs().min() > 0


def test_no_gradients_are_computed_without_need(monkeypatch):
    """Three products where the exits count equally, two more where not, one without a backward."""
    hidden, weight, bias, target = problem(3, ignored="none")
    calls = []
    stage = reference.cross_entropy_

    def counted(*args):
        calls.append(args[-1])
        return stage(*args)

    run = reference.linear_cross_entropy
    monkeypatch.setattr(
        reference, "linear_cross_entropy", lambda *args, **kw: run(*args, stage=counted, **kw)
    )
    head, leaf = head_with(weight, bias, 5), hidden.requires_grad_()
    loss = sk.nn.LinearCrossEntropy(head)

    def stages(work):
        calls.clear()
        work()
        return list(calls)

    with torch.no_grad():
        assert stages(lambda: loss(leaf, target)) == [False]
    assert stages(lambda: loss(leaf, target).mean().backward()) == [True]
    assert stages(lambda: loss(leaf, target).sum().backward()) == [True]
    weighed = {"exit_weights": [1.0, 2.0, 5.0]}
    assert stages(lambda: loss(leaf, target, **weighed).mean().backward()) == [True]
    assert stages(lambda: loss(leaf, target).backward(torch.arange(3.0))) == [True, True]
    assert stages(lambda: loss(leaf, target, "none").sum().backward()) == [False, True]
    head.requires_grad_(False)
    assert stages(lambda: loss(leaf.detach(), target)) == [False]


def test_a_loss_that_is_kept_holds_no_gradients():
    hidden, weight, bias, target = problem(words=37, k=9)
    head = head_with(weight, bias, 9)
    loss = sk.nn.LinearCrossEntropy(head)(hidden.requires_grad_(), target)
    loss.backward()
    hidden.grad = head.weight.grad = None
    gc.collect()
    blocks = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (37, 9)]
    buffers = {t.data_ptr() for t in blocks} - {weight.data_ptr()}
    assert len(buffers) == 1  # the slot's, which waits for the next step
    assert loss.isfinite()


@pytest.mark.parametrize("mode", ["inplace", "dense"])
def test_sixteen_sizes_two_graphs(mode):
    torch._dynamo.reset()
    torch.manual_seed(18)
    hidden, weight, bias, target = problem(3, words=20, k=17, K=17)
    eager, head = (head_with(weight, bias, 17, 20, mode) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sk.nn.LinearCrossEntropy(head), backend=counter, fullgraph=True)
    for k in [17, 5, *range(2, 18)]:  # of a size of 1, torch makes a graph of its own
        outcomes = []
        for module, run in ((head, compiled), (eager, sk.nn.LinearCrossEntropy(eager))):
            sk.activate(module, sk.Submodel(i=k, o=k + 3))
            module.zero_grad()
            leaf = hidden[..., :k].clone().requires_grad_()
            loss = run(leaf, target.clamp(max=k + 2), exit_weights=[3.0, 1.0, 0.5])
            loss.backward(torch.arange(1.0, 4.0))
            outcomes.append([loss.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        for mine, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


# --- errors -----------------------------------------------------------------------------------


def bad(**changes):
    hidden, weight, bias, target = problem(ignored="none")
    values = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    return values | changes


_FULL = torch.zeros(7, dtype=torch.int64)
ERRORS = {
    "target dtype": (sk.DTypeError, "target has dtype torch.float32", {"target": torch.ones(7)}),
    "target shape": (sk.ShapeError, "target has shape", {"target": torch.ones(6).long()}),
    "target above": (sk.OptionError, "target has 11; allowed are 0..10", {"target": _FULL + 11}),
    "target below": (sk.OptionError, "target has -1; allowed", {"target": _FULL - 1}),
    "target device": (sk.DeviceError, "target is on meta", {"target": _FULL.to("meta")}),
    "smoothing": (sk.OptionError, "label_smoothing=1.5; allowed", {"label_smoothing": 1.5}),
    "reduction": (sk.OptionError, "reduction='max'; allowed are none", {"reduction": "max"}),
    "weights of no exits": (sk.ShapeError, "here no exits", {"exit_weights": [1.0] * 7}),
    "weights": (
        sk.ShapeError, r"shape \(3,\); .* here \(2,\)",
        {"hidden": torch.ones(2, 7, 5), "exit_weights": [1.0] * 3},
    ),
    "too wide": (sk.ShapeError, "hidden has 10 features", {"hidden": torch.ones(7, 10)}),
    "no exit": (sk.ShapeError, "at least one exit", {"hidden": torch.ones(0, 7, 5)}),
    "weight strides": (sk.StrideError, "weight has strides", {"weight": torch.ones(9, 11).T}),
    "weight dtype": (sk.DTypeError, "weight has dtype", {"weight": torch.ones(11, 9).half()}),
    "weight axes": (sk.ShapeError, "weight has 1 axes", {"weight": torch.ones(11)}),
    "bias size": (sk.ShapeError, "bias has 10 elements", {"bias": torch.ones(10)}),
    "bias dtype": (sk.DTypeError, "bias has dtype", {"bias": torch.ones(11).half()}),
    "hidden dtype": (sk.DTypeError, "hidden has dtype", {"hidden": torch.ones(7, 5).int()}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, words, changes):
    with pytest.raises(error, match=words):
        sk.linear_cross_entropy(**bad(**changes))


def test_errors_of_the_module():
    with pytest.raises(sk.OptionError, match="head has the activation 'gelu'"):
        sk.nn.LinearCrossEntropy(sk.nn.Linear(4, 5, activation="gelu"))
    with pytest.raises(sk.OptionError, match="head is a Conv2d"):
        sk.nn.LinearCrossEntropy(torch.nn.Conv2d(4, 5, 1))
    head = sk.nn.Linear(9, 11, in_dim="i")
    sk.activate(head, sk.Submodel(i=5))
    with pytest.raises(sk.ShapeError, match="active input width is 5 of 9"):
        sk.nn.LinearCrossEntropy(head)(torch.ones(2, 6), torch.ones(2).long())


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inplace", "dense"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_hidden_state_costs_one_gradient(mode, dtype):
    """The backward makes room for the head's gradient alone; that of hidden is there already."""
    head = sk.nn.Linear(64, 20, bias=False, grad_mode=mode, dtype=dtype)
    hidden = torch.randn(3, 5000, 64, dtype=dtype, requires_grad=True)
    target = torch.randint(20, (5000,))
    loss = sk.nn.LinearCrossEntropy(head)(hidden, target).mean()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    made = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size for size in made if size > 0) <= 4 * head.weight.nbytes + 100_000
    assert hidden.grad.any()


_PEAK = """
import sys, torch
import sorted_kernels as sk
torch.set_num_threads(1)
exits, whole = int(sys.argv[1]), sys.argv[2] == "whole"
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
head = torch.nn.Linear(64, 20000, bias=False)
hidden = torch.randn(exits, 256, 64, requires_grad=True)
target = torch.randint(20000, (256,))
def step(hidden, target):
    if whole:
        logits = head(hidden).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, target.repeat(len(hidden)))
    else:
        loss = sk.nn.LinearCrossEntropy(head)(hidden, target).mean()
    loss.backward()
step(hidden[:, :1], target[:1])  # libraries' own buffers
head.weight.grad = hidden.grad = None
start = peak()
step(hidden, target)
print(peak() - start)
"""


def peak_of(exits, kind):
    command = [sys.executable, "-c", _PEAK, str(exits), kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_of_exits_is_that_of_their_hidden_states():
    """Chunks of 64 MiB; logits of eight exits would be 164 MB, thrice."""
    one, eight, whole = peak_of(4, "ours"), peak_of(16, "ours"), peak_of(16, "whole")
    hidden = 12 * 256 * 64 * 4
    assert eight - one <= hidden + 8e6, (one, eight)
    assert whole >= 5 * eight, (whole, eight)
