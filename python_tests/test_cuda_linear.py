"""The compiled GEMM on a GPU (sm_90) or on emulated threads, against float64."""

import random

import pytest
import torch

from sorted_kernels.cuda import gemm, linear
from sorted_kernels.errors import DeviceError
from sorted_kernels.reference import linear as reference
from support import emulated_gemm
from support.gemm import exact, random_runs, row_sizes
from support.poison import assert_same_bits, in_larger_buffer

DTYPES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
SIZES = [(1, 1, 1), (37, 75, 53), (129, 257, 65), (64, 1030, 7), (1000, 520, 2049), (8, 64, 2048)]
EMULATED_ROWS = 200  # larger products take too long there


@pytest.fixture
def hopper(device, monkeypatch):
    """The GPU's name; on a machine without one, CPU tensors and emulated threads."""
    return emulated_gemm.hopper(device, monkeypatch)


def parent(rows, cols, dtype, device):
    """Random numbers in the leading block of a buffer that is NaN elsewhere."""
    shape = (rows + 2, -(-cols // 8) * 8 + 8)
    buffer = torch.full(shape, torch.nan, dtype=dtype, device=device)
    buffer[:rows, :cols] = torch.randn(rows, cols).to(device)
    return buffer


def ragged_operands(runs, dtype, device):
    """x, W and dy as blocks of NaN buffers, x and dy NaN past each row's sizes."""
    m, k = (torch.from_numpy(sizes).to(device) for sizes in row_sizes(runs))
    n, m_max, k_max = len(m), int(m[0]), int(k[0])
    x, dy = parent(n, k_max, dtype, device), parent(n, m_max, dtype, device)
    x[:n][torch.arange(x.shape[1], device=device) >= k[:, None]] = torch.nan
    dy[:n][torch.arange(dy.shape[1], device=device) >= m[:, None]] = torch.nan
    weight = parent(m_max, k_max, dtype, device)
    return x[:n, :k_max], weight, dy[:n, :m_max]


def float64(mode, x, weight, dy, runs):
    m, k = runs[0][1:]
    blocks = (tensor.double().cpu().numpy() for tensor in (x, weight[:m, :k], dy))
    return torch.from_numpy(exact(mode, *blocks, runs))


def check(actual, wanted):
    """Sums are float32 and rounded once; torch's own error is no less."""
    eps = torch.finfo(actual.dtype).eps
    atol = 2e-6 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(actual.double().cpu(), wanted, rtol=eps, atol=atol)


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_uniform(hopper, dtype, size):
    n, m, k = size
    if hopper == "cpu" and n > EMULATED_ROWS:
        pytest.skip("too large to emulate")
    x, weight, dy = ragged_operands([size], dtype, hopper)
    y, _ = linear.linear(x, weight, None, m, "none", False)
    check(y, float64("forward", x, weight, dy, [size]))
    check(linear.linear_dgrad(dy, weight, k), float64("dgrad", x, weight, dy, [size]))
    for out_dtype in (torch.float32, dtype):
        grad = torch.full((m + 3, k + 5), 7.0, dtype=out_dtype, device=hopper)
        wanted = float64("wgrad", x, weight, dy, [size])
        linear.linear_wgrad_into(dy, x, grad[:m, :k], False)
        check(grad[:m, :k], wanted)
        before = grad[:m, :k].double().cpu()
        linear.linear_wgrad_into(dy, x, grad[:m, :k], True)
        check(grad[:m, :k], before + wanted)
        assert (grad[m:] == 7).all() and (grad[:, k:] == 7).all()


@dtypes
def test_ragged(hopper, dtype):
    for seed, most in enumerate([EMULATED_ROWS] * 5 + [900] * 25 * (hopper == "cuda")):
        rng = random.Random(seed)
        runs = random_runs(rng, most, most, most=12)
        m, k = runs[0][1:]
        x, weight, dy = ragged_operands(runs, dtype, hopper)
        y, _ = linear.ragged_linear(x, weight, None, runs, "none", False)
        check(y, float64("forward", x, weight, dy, runs))
        check(linear.ragged_dgrad(dy, weight, runs), float64("dgrad", x, weight, dy, runs))
        grad = torch.full((m + 3, k + 5), 7.0, device=hopper)
        linear.ragged_wgrad_into(dy, x, runs, grad, True)
        check(grad[:m, :k], float64("wgrad", x, weight, dy, runs) + 7)
        assert (grad[m:] == 7).all() and (grad[:, k:] == 7).all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation(hopper, activation):
    x, weight, _ = ragged_operands([(100, 77, 130)], torch.bfloat16, hopper)
    bias = in_larger_buffer(torch.randn(77)).to(hopper, torch.bfloat16)
    y, z = linear.linear(x, weight, bias, 77, activation, True)
    exact_z = x.double() @ weight[:77, :130].double().T + bias.double()
    check(y, reference.activate(exact_z, activation).cpu())
    if activation != "relu":
        check(z, exact_z.cpu())


def test_outputs_feed_the_next_layer(hopper):
    """Odd sizes from layer to layer; outputs are dense, and batches keep their axes."""
    x, first, _ = ragged_operands([(60, 77, 131)], torch.bfloat16, hopper)
    second = parent(33, 77, torch.bfloat16, hopper)
    x = torch.nn.functional.pad(x, (0, 5)).reshape(5, 12, 136)[..., :131]
    y, _ = linear.linear(x, first, None, 77, "relu", False)
    z, _ = linear.linear(y, second, None, 33, "none", False)
    assert y.shape == (5, 12, 77) and z.shape == (5, 12, 33)
    assert y.is_contiguous() and z.is_contiguous()
    check(z, (y.double() @ second[:33, :77].double().T).cpu())


def activations(kind, values):
    """The same values lying in memory in another way; around them is NaN."""
    if kind == "odd stride":
        buffer = torch.full((len(values), 81), torch.nan, dtype=values.dtype, device=values.device)
        buffer[:, :72] = values
        return buffer[:, :72]
    if kind == "odd address":
        buffer = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
        buffer = buffer.to(values.device)
        buffer[1:] = values.flatten()
        return buffer[1:].view(values.shape)
    if kind == "transposed":
        return values.T.contiguous().T
    return values[:1].expand(len(values), -1) if kind == "one row" else values[:, :1].expand(-1, 72)


@pytest.mark.parametrize(
    "kind", ["odd stride", "odd address", "transposed", "one row", "one column"]
)
def test_activations_that_tma_cannot_address(hopper, kind):
    """The gradient of a sum is one row, or one number, expanded."""
    rows, m = 21, 40
    x = activations(kind, torch.randn(rows, 72, device=hopper).bfloat16())
    dy = torch.randn(rows, m, device=hopper).bfloat16()
    weight = parent(m, 72, torch.bfloat16, hopper)
    read = linear._rows(x, 72)  # emulation reads more than TMA does, so look
    assert read.stride(0) >= 72 and read.stride(0) % 8 == 0 and read.stride(1) == 1
    assert read.data_ptr() % 16 == 0
    y, _ = linear.linear(x, weight, None, m, "none", False)
    check(y, (x.double() @ weight[:m, :72].double().T).cpu())
    other = parent(72, m, torch.bfloat16, hopper)
    dx = x.double() @ other[:72, :m].double()
    check(linear.linear_dgrad(x, other, m), dx.cpu())
    grad = torch.zeros(m, 72, device=hopper)
    linear.linear_wgrad_into(dy, x, grad, True)
    check(grad, (dy.double().T @ x.double()).cpu())


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def test_tiles_that_no_row_uses_are_zero(hopper, nan_in_new_memory):
    runs = [(128, 300, 290), (20, 9, 7)]
    x, weight, dy = ragged_operands(runs, torch.bfloat16, hopper)
    y, z = linear.ragged_linear(x, weight, None, runs, "silu", True)
    dx = linear.ragged_dgrad(dy, weight, runs)
    for found, size in ((y, 9), (z, 9), (dx, 7)):
        assert torch.isfinite(found).all() and not found[128:, size:].any()


def test_results_are_the_same_each_time(hopper):
    """Also where the reduction is cut: parts are added in their order."""
    runs = [(64, 100, 2048), (30, 64, 1300)]
    x, weight, dy = ragged_operands(runs, torch.bfloat16, hopper)
    assert gemm.plan("forward", tuple(runs), gemm._processors(x.device)).slots > 0
    first, _ = linear.ragged_linear(x, weight, None, runs, "none", False)
    for _ in range(20 if hopper == "cuda" else 1):
        assert_same_bits(linear.ragged_linear(x, weight, None, runs, "none", False)[0], first)


def test_one_graph_serves_all_sizes(hopper):
    if hopper == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    n, m, k = 200, 300, 400
    x = torch.randn(n, k, device=hopper).bfloat16()
    weight = torch.randn(m, k, device=hopper).bfloat16()
    out = torch.zeros(n, 320, dtype=torch.bfloat16, device=hopper)
    sizes = torch.tensor([n, m, k], dtype=torch.int32, device=hopper)

    def run():
        gemm.run_gemm("forward", x, weight, out, ((n, m, k),), sizes=sizes)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for rows, cols, red in [(200, 300, 400), (130, 77, 33), (1, 1, 1), (64, 299, 391)]:
        out.fill_(7)
        sizes.copy_(torch.tensor([rows, cols, red], dtype=torch.int32))
        graph.replay()
        check(out[:rows, :cols], (x[:rows, :red].double() @ weight[:cols, :red].double().T).cpu())
        padded = min(320, -(-cols // 64) * 64)
        assert (out[:rows, cols:padded] == 0).all()
        assert (out[rows:] == 7).all() and (out[:, padded:] == 7).all()


# --- without a GPU -------------------------------------------------------------------------------

SUPPORTED = {
    "dtype": torch.bfloat16, "n": 3, "m": 5, "k": 7, "strides": (8, 64), "addresses": (0, 4096),
    "arch": (9, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "strides": (0, 8)}, None),
        ({"dtype": torch.float32}, "dtype=torch.float32; allowed are"),
        ({"arch": (8, 0)}, "compute capability 9.0, and this GPU's is (8, 0)"),
        ({"arch": (10, 0)}, "compute capability 9.0"),
        ({"strides": (8, 65)}, "row stride 65; allowed are multiples of 8"),
        ({"addresses": (0, 4098)}, "address 0x1002; allowed are multiples of 16"),
        ({"n": 0}, "n=0; allowed are sizes from 1"),
        ({"k": 2**30}, "k=1073741824; allowed"),
    ],
    ids=str,
)
def test_supports_says_why_not(change, reason):
    found = gemm.supports(**(SUPPORTED | change))
    assert found is None if reason is None else reason in found


def test_cpu_tensors_are_refused_by_name():
    x, weight = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    with pytest.raises(DeviceError, match="a is on cpu; the CUDA GEMM takes CUDA tensors"):
        linear.linear(x, weight, None, 5, "none", False)
    with pytest.raises(DeviceError, match="a is on cpu"):
        linear.ragged_dgrad(x, x.T.contiguous().T, [(2, 8, 8), (1, 1, 1)])


def test_empty_batches_need_no_kernel():
    x, weight = torch.zeros(0, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    y, saved = linear.linear(x, weight, None, 5, "gelu", False)
    assert y.shape == (0, 5) and saved.numel() == 0
    assert linear.linear_dgrad(y, weight, 8).shape == (0, 8)
    grad = torch.full((6, 9), 7.0)
    linear.linear_wgrad_into(y, x, grad[:5, :8], True)
    assert (grad == 7).all()
    linear.linear_wgrad_into(y, x, grad[:5, :8], False)
    assert (grad[:5, :8] == 0).all() and grad[5:].min() == grad[:, 8:].min() == 7


def test_ragged_bias_gradient():
    runs = [(3, 7, 4), (2, 5, 4), (4, 1, 1)]
    m, _ = row_sizes(runs)
    dy = torch.randn(9, 7, dtype=torch.float64)
    wanted = torch.where(torch.arange(7) < torch.from_numpy(m)[:, None], dy, 0.0).sum(0)
    dy[torch.arange(7) >= torch.from_numpy(m)[:, None]] = torch.nan
    out = torch.full((9,), 7.0, dtype=torch.float64)
    linear.ragged_bias_grad_into(dy, runs, out, True)
    torch.testing.assert_close(out[:7], wanted + 7)
    linear.ragged_bias_grad_into(dy, runs, out, False)
    torch.testing.assert_close(out[:7], wanted)
    assert (out[7:] == 7).all()
