"""Batch, group and instance norm against the float64 oracle, as functions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from support.channel_norms import EPS, LAYOUTS, NORMS, SIZES, TRAINED, affine, values
from support.oracle import DTYPES, assert_outcome, assert_within_twice, outcome
from support.poison import assert_same_bits, pattern, poisoned

norms = pytest.mark.parametrize("norm", NORMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def run(function, x, p, dy):
    """Outcome of an op of which the affine parameters train and the statistics do not."""
    fixed = {name: p[name] for name in ("mean", "var")}
    return outcome(lambda x, q: function(x, q | fixed), x, affine(p), dy)


def judged(norm, x, p, dy):
    wide = {name: value.double() for name, value in p.items()}
    plain = run(norm.plain, x, p, dy)
    return plain, run(norm.exact, x.double(), wide, dy.double())


@norms
@dtypes
@sizes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_oracle_with_poison_past_the_channels(norm, dtype, size, layout):
    n, C, c, spatial = size
    x = torch.randn(n, c, *spatial).mul(2).add(1).to(dtype)
    if not norm.several(x):
        return
    p, dy = values(norm, c, dtype), torch.randn_like(x)
    parents = {name: poisoned(value, (C,)) for name, value in p.items()}
    given, given_dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    actual = run(norm.ours, given, parents, given_dy)
    if layout == "channels_last":  # where torch's sums have another order, too
        x, dy = given, given_dy
    assert_outcome(actual, *judged(norm, x, p, dy), what=f"{size}")
    if layout == "channels_last" and x.dim() == 4:
        for found in (actual.y, actual.dx):
            assert found.is_contiguous(memory_format=torch.channels_last)


@norms
def test_float64_is_exact(norm):
    x, p = torch.randn(3, 6, 4, 5).double(), values(norm, 6, torch.float64)
    dy = torch.randn_like(x)
    parents = {name: poisoned(value, (9,)) for name, value in p.items()}
    assert_outcome(run(norm.ours, x, parents, dy), *judged(norm, x, p, dy))


@norms
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_wide_parameters_with_half_precision_inputs(norm, half):
    x, p = torch.randn(3, 6, 4, 5).to(half), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    parents = {name: poisoned(value, (9,)) for name, value in p.items()}
    actual = run(norm.ours, x, parents, dy)
    assert actual.y.dtype == half and all(
        g.dtype == torch.float32 for g in actual.gradients.values()
    )
    assert_outcome(actual, *judged(norm, x, p, dy))


@norms
def test_first_and_second_derivatives(norm):
    x, p = torch.randn(3, 4, 2, 2).double(), values(norm, 4, torch.float64)
    fixed = {name: p[name] for name in ("mean", "var")}
    parents = [torch.nn.functional.pad(p[name], [0, 2]).requires_grad_() for name in norm.names]

    def call(x, *given):
        return norm.ours(x, dict(zip(norm.names, given, strict=True)) | fixed)

    inputs = [x.requires_grad_(), *parents]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@norms
def test_prefix_and_contiguous_copy_give_the_same_bits(norm):
    x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    parents = {name: poisoned(value, (9,)) for name, value in p.items()}
    one, other = run(norm.ours, x, p, dy), run(norm.ours, x, parents, dy)
    assert_same_bits(one.y, other.y)
    assert_same_bits(one.dx, other.dx)
    for name, gradient in one.gradients.items():
        assert_same_bits(gradient, other.gradients[name][:6].contiguous())


@pytest.mark.parametrize("norm", TRAINED, ids=str)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_wanted_gradients(norm, wanted, layout):
    if wanted == "bias" and "bias" not in norm.names:
        wanted = "weight"
    x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    _, exact = judged(norm, x, p, dy)
    leaves = {"x": LAYOUTS[layout](x), **p}
    leaves = {name: v.clone().requires_grad_(name == wanted) for name, v in leaves.items()}
    norm.ours(leaves.pop("x") if wanted != "x" else leaves["x"], leaves).backward(dy)
    found = [name for name, value in leaves.items() if value.grad is not None]
    assert found == [wanted]
    right = exact.dx if wanted == "x" else exact.gradients[wanted]
    torch.testing.assert_close(leaves[wanted].grad.double(), right, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.25])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_running_statistics_move_in_their_prefix(dtype, momentum, grad):
    x = torch.randn(4, 5, 3, 2).mul(3).to(dtype)
    mean, var = pattern((8,), dtype), pattern((8,), dtype)
    stock = mean[:5].clone(), var[:5].clone()
    wide = x.double().transpose(0, 1).flatten(1)
    right = [
        (1 - momentum) * old[:5].double() + momentum * new
        for old, new in ((mean, wide.mean(1)), (var, wide.var(1)))
    ]
    with torch.set_grad_enabled(grad):
        sk.batch_norm(x, mean, var, training=True, momentum=momentum)
    torch.nn.functional.batch_norm(x, *stock, training=True, momentum=momentum)
    for found, plain, exact in zip((mean, var), stock, right, strict=True):
        assert_within_twice(found[:5], plain, exact, "running")
        assert_same_bits(found[5:].clone(), pattern((8,), dtype)[5:].clone())


def test_evaluation_moves_nothing():
    mean, var = pattern((8,), torch.float32), pattern((8,), torch.float32)
    x = torch.randn(4, 5, requires_grad=True)
    sk.batch_norm(x, mean, var).sum().backward()
    assert_same_bits(mean, pattern((8,), torch.float32))
    assert_same_bits(var, pattern((8,), torch.float32))


def test_no_samples():
    x = torch.empty(0, 3, 2, 2)
    one = torch.ones(5)
    assert sk.batch_norm(x, one, one, one, one).shape == x.shape
    assert sk.group_norm(x, 3, one, one).shape == x.shape
    assert sk.instance_norm(x, one, one).shape == x.shape


X = torch.randn(4, 3, 2, 2)
ONE = torch.ones(5)
ERRORS = {
    "channels": (lambda: sk.batch_norm(X, ONE[:2], ONE), sk.ShapeError, "3 channels.*running_mean"),
    "weight": (lambda: sk.group_norm(X, 1, ONE[:2]), sk.ShapeError, "3 channels; weight has 2"),
    "axes": (lambda: sk.batch_norm(ONE, ONE, ONE), sk.ShapeError, r"shape \(5,\)"),
    "no channel": (lambda: sk.instance_norm(X[:, :0]), sk.ShapeError, "a channel"),
    "two-dimensional": (lambda: sk.batch_norm(X, ONE, ONE, X[0, 0]), sk.ShapeError, "weight has 2"),
    "one value": (
        lambda: sk.batch_norm(X[:1, :, 0, 0], None, None, training=True),
        sk.ShapeError,
        r"more than 1 value per channel when training.*\(1, 3\)",
    ),
    "one value a group": (lambda: sk.group_norm(X[:1, :, 0, 0], 3), sk.ShapeError, "1 value a gr"),
    "one element": (lambda: sk.instance_norm(X[:, :, :1, :1]), sk.ShapeError, "1 spatial element"),
    "groups": (lambda: sk.group_norm(X, 2, ONE), sk.ShapeError, "num_groups=2 does not divide.* 3"),
    "no groups": (lambda: sk.group_norm(X, 0), sk.ShapeError, "num_groups=0"),
    "statistics": (lambda: sk.batch_norm(X, None, None), sk.OptionError, "training=False needs"),
    "one statistic": (lambda: sk.batch_norm(X, ONE, None), sk.OptionError, "both or not at all"),
    "integers": (lambda: sk.batch_norm(X.long(), ONE, ONE), sk.DTypeError, "int64"),
    "float64": (lambda: sk.batch_norm(X.double(), ONE, ONE), sk.DTypeError, "float64"),
    "half parameters": (lambda: sk.group_norm(X, 1, ONE.half()), sk.DTypeError, "float16"),
    "mixture": (
        lambda: sk.batch_norm(X.half(), ONE, ONE, ONE.half()),
        sk.DTypeError,
        "one dtype",
    ),
    "device": (lambda: sk.batch_norm(X, ONE, ONE.to("meta")), sk.DeviceError, "running_var.*meta"),
    "stride": (
        lambda: sk.instance_norm(X, torch.ones(10)[::2]), sk.StrideError, "weight has strides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["batch", "group", "instance"])
def test_compiled_functions(name):
    def function(x, w, b, mean, var):
        if name == "batch":
            return sk.batch_norm(x, mean, var, w, b, training=True, eps=EPS)
        if name == "group":
            return sk.group_norm(x, x.shape[1] // 2, w, b, eps=EPS)
        return sk.instance_norm(x, w, b, eps=EPS)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for c in (38, 8, 12, 20, 34, 2):
        x = torch.randn(3, c, 4)
        torch._dynamo.mark_dynamic(x, 1) if c == 38 else None
        results = []
        for call in (compiled, function):
            leaf, w, b = x.clone().requires_grad_(), *torch.ones(2, 40)
            mean, var = pattern((40,), torch.float32), pattern((40,), torch.float32)
            w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
            y = call(leaf, w, b, mean, var)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(c)))
            results.append([y.detach(), leaf.grad, w.grad, b.grad, mean, var])
        for mine, theirs in zip(*results, strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
