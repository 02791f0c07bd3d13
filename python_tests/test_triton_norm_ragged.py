"""Triton's ragged norms against a loop over runs in float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sorted_kernels.reference import layer_norm as layer_reference  # noqa: E402
from sorted_kernels.reference import rms_norm as rms_reference  # noqa: E402
from sorted_kernels.triton import layer_norm, rms_norm  # noqa: E402
from sorted_kernels.triton.norm import MAX_FEATURES  # noqa: E402
from support import ragged  # noqa: E402
from support.triton_numerics import (  # noqa: E402
    DEVICE,
    DTYPES,
    AddressWatch,
    Patterned,
    assert_accurate,
    dtype_id,
    inside,
    poisoned,
    randn,
)

EPS = 1e-5
NAN = float("nan")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
PROBLEMS = {
    "one": [(1, 1, 1)],
    "every_row": [(1, 1, 60 - 3 * i) for i in range(20)],
    "aligned": [(3, 1, 768), (5, 1, 512), (9, 1, 16)],
    "two_kernels_odd": [(1, 1, 4101), (1, 1, 4099), (2, 1, 77)],
    "two_kernels": [(1, 1, 8208), (1, 1, 4096), (1, 1, 16)],
}
by_problem = pytest.mark.parametrize("runs", PROBLEMS.values(), ids=PROBLEMS)


class ByRuns:
    """A uniform norm of the reference, on each run's own block."""

    def __init__(self, runs, x, parameters, *, centred):
        self.runs, self.x, self.parameters = runs, x, parameters
        module = layer_reference if centred else rms_reference
        self.forward = module.layer_norm if centred else module.rms_norm
        self.backward_into = (
            module.layer_norm_backward_into if centred else module.rms_norm_backward_into
        )
        n, _, k = ragged.largest(runs)
        self.y = x.new_zeros(n, k)
        self.statistics = []
        for rows, _, width in ragged.spans(runs):
            self.y[rows, :width], *statistics = self.forward(
                x[rows, :width].contiguous(), *parameters, EPS
            )
            self.statistics.append(statistics)

    def backward(self, dy, starts):
        """dx, and the parameters' gradients added to ``starts``."""
        dx, totals = torch.zeros_like(self.y), [start.clone() for start in starts]
        for (rows, _, width), statistics in zip(
            ragged.spans(self.runs), self.statistics, strict=True
        ):
            dx[rows, :width] = self.backward_into(
                dy[rows, :width].contiguous(),
                self.x[rows, :width].contiguous(),
                *statistics,
                self.parameters[0],
                *(total[:width] for total in totals),
                *(True for _ in totals),
            )
        return dx, totals


def check(runs, dtype, accumulate, *, centred):
    n, _, k = ragged.largest(runs)
    x, dy = randn(n, k + 2, dtype=dtype, seed=1), randn(n, k + 1, dtype=dtype, seed=2)
    ragged.fill_past(x, runs, NAN, features="in")
    ragged.fill_past(dy, runs, NAN, features="in")
    x, dy = inside(x, NAN), inside(dy * n**-0.5, NAN)
    parameters = [randn(k, dtype=dtype, seed=3 + i) for i in range(1 + centred)]
    parents = [poisoned(parameter, k + 5) for parameter in parameters]
    same = ByRuns(runs, x, parameters, centred=centred)
    exact = ByRuns(runs, x.double(), [p.double() for p in parameters], centred=centred)

    if centred:
        y, *statistics = layer_norm.ragged_layer_norm(x, *parents, runs, EPS)
    else:
        y, *statistics = rms_norm.ragged_rms_norm(x, *parents, runs, EPS)
    assert y.dtype == dtype and y.is_contiguous()
    assert_accurate(y, same.y, exact.y)
    for place, actual in enumerate(statistics):
        assert actual.dtype == torch.float32 and actual.shape == (n, 1)
        oracle = torch.cat([of_run[place] for of_run in exact.statistics])
        torch.testing.assert_close(actual.double(), oracle, rtol=2e-6, atol=1e-6)

    grads = [Patterned((k + 5,), (k,), dtype) for _ in parameters]
    starts = [accumulate * grad.start for grad in grads]
    backward_into = (
        layer_norm.ragged_layer_norm_backward_into
        if centred
        else rms_norm.ragged_rms_norm_backward_into
    )
    dx = backward_into(
        dy, x, *statistics, parents[0], runs,
        *(grad.full for grad in grads), *(accumulate for _ in grads),
    )  # fmt: skip
    same_dx, same_grads = same.backward(dy, starts)
    exact_dx, exact_grads = exact.backward(dy.double(), [start.double() for start in starts])
    assert_accurate(dx, same_dx, exact_dx)
    for rows, _, width in ragged.spans(runs):
        assert not y[rows, width:].any() and not dx[rows, width:].any()
    for grad, same_grad, exact_grad in zip(grads, same_grads, exact_grads, strict=True):
        assert_accurate(grad.view, same_grad, exact_grad)
        grad.assert_rest_intact()


def test_random_problems(ragged_runs):
    rows = ragged.largest(ragged_runs)[0]
    check(ragged_runs, DTYPES[rows % 3], rows % 2 == 0, centred=rows % 4 < 2)


@by_problem
@by_dtype
@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
def test_fixed_problems(dtype, runs, centred):
    check(runs, dtype, runs[0][2] > 64, centred=centred)


@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
def test_longer_rows_than_registers_hold_go_run_by_run(centred):
    runs = [(1, 1, MAX_FEATURES + 1), (1, 1, 5000), (2, 1, 33)]
    check(runs, torch.float32, True, centred=centred)
    check(runs, torch.float32, False, centred=centred)


def test_parts_and_no_parameters():
    runs = [(2, 1, 33), (3, 1, 20)]
    x, dy = randn(5, 33, dtype=torch.float32, seed=1), randn(5, 33, dtype=torch.float32, seed=2)
    y, mean, rstd = layer_norm.ragged_layer_norm(x, None, None, runs, EPS)
    exact = ByRuns(runs, x.double(), [None, None], centred=True)
    torch.testing.assert_close(y.double(), exact.y, rtol=1e-5, atol=1e-5)
    none = (None, None, False, False)
    dx = layer_norm.ragged_layer_norm_backward_into(dy, x, mean, rstd, None, runs, *none)
    bias_grad = torch.zeros(33, device=DEVICE)
    nothing = layer_norm.ragged_layer_norm_backward_into(
        dy, x, mean, rstd, None, runs, None, bias_grad, False, False, need_dx=False
    )
    assert nothing is None
    for rows, _, width in ragged.spans(runs):
        wide = x[rows, :width].double().requires_grad_()
        layer_reference.layer_norm(wide, None, None, EPS)[0].backward(dy[rows, :width].double())
        torch.testing.assert_close(dx[rows, :width].double(), wide.grad, rtol=1e-5, atol=1e-5)
    expected = ragged.ragged_bias_grad(dy, [(2, 33, 1), (3, 20, 1)], torch.zeros_like(bias_grad))
    torch.testing.assert_close(bias_grad, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
@pytest.mark.parametrize("k", [33, 4101])
def test_nothing_past_a_rows_width_is_read(monkeypatch, k):
    """A batch of one run, cut out of a larger one: its width is less than what the rows hold."""
    runs = [(3, 1, k)]
    x, dy = (torch.zeros(9, k + 600)[3:6, 300 : 300 + k] for _ in range(2))
    weight, grad = (torch.zeros(k + 600)[300 : 300 + k] for _ in range(2))
    watch = AddressWatch(x=x, dy=dy, weight=weight, grad=grad)
    watch.install(monkeypatch)
    wide_x, wide_dy = (t.as_strided((3, k + 200), t.stride()) for t in (x, dy))
    _, rstd = rms_norm.ragged_rms_norm(wide_x, weight, runs, EPS)
    rms_norm.ragged_rms_norm_backward_into(wide_dy, wide_x, rstd, weight, runs, grad, True)
    assert watch.touched == {"x", "dy", "weight", "grad"}
