"""Ragged batches: each row judged by the float64 arithmetic of its own sub-model."""

import pickle
import random

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.reference import ragged as reference

NAN = float("nan")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("linear", "layer_norm", "rms_norm", "embedding")


def problem(seed, limit=24):
    """Widths with repeats and ones, and a parent that is larger than the largest row."""
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    sizes = [
        sorted(
            (draw.choice([1, limit, draw.randint(1, limit)]) for _ in range(count)), reverse=True
        )
        for _ in range(2)
    ]
    widths = sk.RowWidths([(draw.randint(1, 4), m, k) for m, k in zip(*sizes, strict=True)])
    return widths, limit + draw.randint(0, 3), limit + draw.randint(0, 3)


def rows_of(widths):
    return [(m, k) for rows, m, k in widths.runs for _ in range(rows)]


def poisoned(shape, sizes, dtype=torch.float64):
    """Random up to each row's size, NaN past it; cut out of a larger buffer."""
    full = torch.full((shape[0] + 1, shape[1] + 2), NAN, dtype=dtype)
    for row, size in enumerate(sizes):
        full[row, :size] = torch.randn(size)
    return full[: shape[0], : shape[1]]


def poisoned_weight(widths, M, K, dtype=torch.float64):
    weight = torch.full((M, K + 3), NAN, dtype=dtype)[:, :K]
    m, k = widths.out_features, widths.in_features
    weight[:m, :k] = torch.randn(m, k)
    return weight


def vector(size, active, dtype=torch.float64):
    made = torch.full((size,), NAN, dtype=dtype)
    made[:active] = torch.randn(active)
    return made


def inputs(op, seed, dtype=torch.float64):
    """Arguments of an op, each row's output size, and what the op does to one row."""
    widths, M, K = problem(seed)
    rows, k = rows_of(widths), widths.in_features
    if op == "linear":
        x = poisoned((widths.rows, K), [k for _, k in rows], dtype)
        params = [poisoned_weight(widths, M, K, dtype), vector(M, widths.out_features, dtype)]

        def one(row, x, weight, bias):
            m, k = rows[row]
            return weight[:m, :k] @ x[row, :k] + bias[:m]

        return widths, x, params, [m for m, _ in rows], widths.out_features, one
    sizes = [k for _, k in rows]
    if op == "embedding":
        x = torch.randint(M, (widths.rows,))
        weight = torch.full((M, K), NAN, dtype=dtype)
        weight[:, :k] = torch.randn(M, k)
        return widths, x, [weight], sizes, k, lambda row, x, weight: weight[x[row], : sizes[row]]
    x = poisoned((widths.rows, K), sizes, dtype)
    if op == "layer_norm":
        params = [vector(K, k, dtype), vector(K, k, dtype)]

        def one(row, x, weight, bias):
            n = sizes[row]
            return torch.nn.functional.layer_norm(x[row, :n], (n,), weight[:n], bias[:n], 1e-5)

        return widths, x, params, sizes, k, one

    def one(row, x, weight):
        part = x[row, : sizes[row]]
        scale = torch.rsqrt(part.square().mean() + 1e-6)
        return part * scale * weight[: sizes[row]]

    return widths, x, [vector(K, k, dtype)], sizes, k, one


def run(op, x, params, widths, **options):
    if op == "linear":
        return sk.linear(x, *params, out_features=widths, **options)
    if op == "embedding":
        return sk.embedding(x, *params, features=widths)
    return getattr(sk, op)(x, *params, features=widths)


def judged(one, sizes, width, x, params, dy, dtype=torch.float64):
    """Outputs and gradients, row by row, with autograd's own slicing."""
    leaves = [param.detach().to(dtype).requires_grad_() for param in params]
    data = x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    outputs = [one(row, data, *leaves) for row in range(len(sizes))]
    y = torch.stack([torch.nn.functional.pad(out, (0, width - len(out))) for out in outputs])
    clean = [dy[row, :size].to(dtype) for row, size in enumerate(sizes)]
    wanted = [data, *leaves] if x.is_floating_point() else leaves
    return y.detach(), torch.autograd.grad(outputs, wanted, clean)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", range(25))
def test_each_row_is_its_own_sub_model(op, seed):
    torch.manual_seed(seed)
    widths, x, params, sizes, width, one = inputs(op, seed)
    dy = poisoned((widths.rows, width), sizes)
    leaves = [param.detach().requires_grad_() for param in params]
    data = x.detach().requires_grad_() if x.is_floating_point() else x
    y = run(op, data, leaves, widths)
    expected, gradients = judged(one, sizes, width, x, params, dy)
    torch.testing.assert_close(y.detach(), expected)  # also: zero past each row's size
    y.backward(dy)
    found = [data, *leaves] if x.is_floating_point() else leaves
    for tensor, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_precision(op, dtype):
    """At most twice as far from float64 as PyTorch is, row by row in the same dtype."""
    torch.manual_seed(1)
    widths, x, params, sizes, width, one = inputs(op, 11, dtype)
    dy = poisoned((widths.rows, width), sizes, dtype)
    leaves = [param.detach().requires_grad_() for param in params]
    data = x.detach().requires_grad_() if x.is_floating_point() else x
    y = run(op, data, leaves, widths)
    y.backward(dy)
    assert y.dtype == dtype
    found = [data, *leaves] if x.is_floating_point() else leaves
    ours = [y.detach(), *(tensor.grad for tensor in found)]
    exact, stock = (
        [outputs, *gradients]
        for outputs, gradients in (
            judged(one, sizes, width, x, params, dy, kind) for kind in (torch.float64, dtype)
        )
    )
    for actual, wanted, other in zip(ours, exact, stock, strict=True):
        error, allowed = ((t.double() - wanted).norm() for t in (actual, other))
        assert error <= 2 * allowed + (1e-6 + torch.finfo(dtype).eps) * wanted.norm()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_and_gradcheck(activation):
    widths = sk.RowWidths([(2, 5, 4), (1, 3, 4), (2, 2, 1)])
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((5, 4), (6, 5), (6,)))
    args = [t.requires_grad_() for t in (x, weight, bias)]

    def call(x, weight, bias):
        return sk.linear(x, weight, bias, out_features=widths, activation=activation)

    assert torch.autograd.gradcheck(call, args)
    y = call(*args)
    uniform = sk.linear(x[:2, :4], weight, bias, out_features=5, activation=activation)
    torch.testing.assert_close(y[:2], uniform)
    assert not y[2, 3:].any() and not y[3:, 2:].any()


@pytest.mark.parametrize("accumulate", [True, False])
def test_only_the_largest_block_of_a_gradient_is_written(accumulate):
    widths, M, K = problem(3)
    rows = rows_of(widths)
    x = poisoned((widths.rows, K), [k for _, k in rows])
    dy = poisoned((widths.rows, M), [m for m, _ in rows])
    grad = torch.randn(M, K, dtype=torch.float64)
    before, m, k = grad.clone(), widths.out_features, widths.in_features
    reference.ragged_wgrad_into(dy, x, widths.runs, grad, accumulate)
    exact = torch.zeros(m, k, dtype=torch.float64)
    for row, (a, b) in enumerate(rows):
        exact[:a, :b] += torch.outer(dy[row, :a], x[row, :b])
    torch.testing.assert_close(grad[:m, :k], exact + (before[:m, :k] if accumulate else 0))
    grad[:m, :k] = before[:m, :k]
    assert torch.equal(grad, before)


def test_boxes_cover_the_work_once():
    for seed in range(200):
        widths, M, K = problem(seed, limit=9)
        for swapped in (False, True):
            covered = torch.zeros(widths.rows, M, K, dtype=torch.int64)
            written = torch.zeros(widths.rows, K if swapped else M, dtype=torch.bool)
            for rows, m0, m, k0, k, first in reference._by_boxes(widths.runs, swapped):
                covered[:rows, m0:m, k0:k] += 1
                outputs = written[:rows, k0:k] if swapped else written[:rows, m0:m]
                assert not outputs.any() if first else outputs.all()
                outputs.fill_(True)
            wanted = torch.zeros_like(covered)
            for row, (m, k) in enumerate(rows_of(widths)):
                wanted[row, :m, :k] = 1
            assert torch.equal(covered, wanted)
            assert 2 * int(covered.sum()) == widths.flops


def layers(op):
    if op == "linear":
        return sk.nn.Linear(27, 27, activation="gelu")
    if op == "embedding":
        return sk.nn.Embedding(27, 27)
    return sk.nn.LayerNorm(27) if op == "layer_norm" else sk.nn.RMSNorm(27, eps=1e-6)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("op", OPS)
def test_layers_put_gradients_in_place(op):
    torch.manual_seed(5)
    widths, *_ = problem(7)
    layer = layers(op)
    dense = layers(op)
    dense.load_state_dict(layer.state_dict())
    dense.grad_mode = "dense"
    x = torch.randint(27, (widths.rows,)) if op == "embedding" else torch.randn(widths.rows, 27)
    for _ in range(2):  # the second pass accumulates
        for module in (layer, dense):
            y = module(x, widths)
            torch.manual_seed(9)
            y.backward(torch.randn_like(y))
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, dense.get_parameter(name).grad)
        rows = {"linear": widths.out_features, "embedding": 27}.get(op, widths.in_features)
        cols = 1 if param.dim() == 1 else widths.in_features
        assert staircase_of(param).area == rows * cols
    layer.zero_grad()
    y = layer(x, widths)
    (gradient,) = torch.autograd.grad(y.sum(), y)
    assert layer.weight.grad is None
    with pytest.raises(sk.GradientError):
        layer(x, widths).square().sum().backward(create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op):
    widths, x, params, *_ = inputs(op, 2)
    leaves = [torch.nan_to_num(param).requires_grad_() for param in params]
    y = run(op, x, leaves, widths)
    with pytest.raises(sk.GradientError, match="double backward"):
        torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


def test_autocast():
    widths = sk.RowWidths([(2, 5, 4), (2, 2, 3)])
    layer, x = sk.nn.Linear(4, 5), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, widths)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x, widths), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: sk.linear(torch.randn(4, 4), torch.randn(5, 4), out_features=w),
        lambda w: sk.linear(torch.randn(1, 3, 4), torch.randn(5, 4), out_features=w),
        lambda w: sk.linear(torch.randn(3, 3), torch.randn(5, 4), out_features=w),
        lambda w: sk.linear(torch.randn(3, 4), torch.randn(4, 4), out_features=w),
        lambda w: sk.linear(torch.randn(3, 4), torch.randn(5, 3), out_features=w),
        lambda w: sk.linear(torch.randn(3, 4), torch.randn(5, 4), torch.randn(4), out_features=w),
        lambda w: sk.layer_norm(torch.randn(3, 4), torch.randn(3), features=w),
        lambda w: sk.rms_norm(torch.randn(4, 4), torch.randn(4), features=w),
        lambda w: sk.embedding(torch.zeros(4, dtype=torch.int64), torch.randn(5, 4), features=w),
        lambda w: sk.embedding(torch.zeros(3, dtype=torch.int64), torch.randn(5, 3), features=w),
    ],
)
def test_sizes_that_do_not_fit(call):
    with pytest.raises(sk.ShapeError):
        call(sk.RowWidths([(1, 5, 4), (2, 3, 2)]))


def test_compiled_calls_agree():
    torch._dynamo.reset()
    weight = torch.randn(6, 5, requires_grad=True)

    def call(x, widths):
        return sk.linear(x, weight, out_features=widths, activation="gelu")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for runs in ([(2, 6, 5), (1, 2, 2)], [(3, 4, 4)]):
        widths, x = sk.RowWidths(runs), torch.randn(3, 5)
        torch.testing.assert_close(compiled(x, widths), call(x, widths))
        grads = [torch.autograd.grad(f(x, widths).square().sum(), weight) for f in (compiled, call)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no runs"),
        ([(0, 1, 1)], "runs\\[0\\] has rows=0"),
        ([(1, True, 1)], "out_features=True"),
        ([(1, 2, 1.5)], "in_features=1.5"),
        ([(1, 2, 3), (1, 3, 3)], "out_features=3, more than the 2"),
        ([(1, 2, 3), (1, 1, 4)], "in_features=4, more than the 3"),
    ],
)
def test_row_widths_are_checked(runs, message):
    with pytest.raises(sk.ShapeError, match=message):
        sk.RowWidths(runs)


def test_row_widths():
    widths = sk.RowWidths([(2, 5, 4), (1, 5, 4), (3, 2, 2)])
    assert widths.runs == ((3, 5, 4), (3, 2, 2)) and len(widths) == widths.rows == 6
    assert widths == sk.RowWidths.of_rows([5, 5, 5, 2, 2, 2], [4, 4, 4, 2, 2, 2])
    assert widths.flops == 2 * (3 * 20 + 3 * 4) and widths.flat() == [3, 5, 4, 3, 2, 2]
    assert pickle.loads(pickle.dumps(widths)) == widths and len({widths, widths}) == 1
    assert eval(repr(widths), {"RowWidths": sk.RowWidths}) == widths
    with pytest.raises(AttributeError, match="frozen"):
        widths.runs = ()
    with pytest.raises(sk.ShapeError, match="entries"):
        sk.RowWidths.of_rows([1], [1, 2])
