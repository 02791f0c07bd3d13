"""The staircase optimizers' ops as PyTorch sees them: arguments, errors, threads, ownership."""

import sys
import weakref

import pytest
import torch

from sorted_kernels.ops import optimizer
from sorted_kernels.ops.library import load_compiled
from support.optimizer_problems import ADAMW, ADAMW_OPTIONS, SGD


def test_contiguous_copy_gives_the_same_bits_as_a_view():
    big = [torch.randn(40, 60) for _ in range(2)] + [torch.zeros(40, 60) for _ in range(2)]
    small = [t[:33, :47].clone() for t in big]
    for tensors in (big, small):
        lists = [[t] for t in tensors]
        ADAMW(*lists, [], [0, 0, 33, 47], [1], *ADAMW_OPTIONS.values(), False, False)
    for view, copy in zip(big, small, strict=True):
        assert torch.equal(view[:33, :47], copy)


def test_step_counts_are_per_tensor():
    shape, steps = (8, 8), [1, 7]
    param, grad = torch.randn(shape), torch.randn(shape)
    params, zeros = [param.clone(), param.clone()], lambda: [torch.zeros(shape) for _ in steps]
    whole = [0, 0, 8, 8, 1, 0, 8, 8]
    options = dict(ADAMW_OPTIONS, weight_decay=0.0, eps=0.0)
    ADAMW(params, [grad, grad], zeros(), zeros(), [], whole, steps, *options.values(), False, False)
    for moved, step in zip(params, steps, strict=True):
        first, second = (1 - 0.9) / (1 - 0.9**step), (1 - 0.99) / (1 - 0.99**step)
        expected = param - 0.01 * first / second**0.5 * grad.sign()
        torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_uneven_call_is_complete_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(700, 300), (1, 1), (3, 70000), (129, 511), (1, 1)]
        params = [torch.ones(shape) for shape in shapes * 3]
        grads = [torch.ones_like(p) for p in params]
        bands = [x for i, p in enumerate(params) for x in (i, 0, p.shape[0], p.shape[1])]
        SGD(params, grads, [], [], bands, 0.5, 0.0, 0.0, False, False, True)
        assert all((p == 0.5).all() for p in params) and not any(g.any() for g in grads)
    finally:
        torch.set_num_threads(before)


def small_call():
    tensors = [[torch.randn(4, 4)] for _ in range(2)] + [[torch.zeros(4, 4)] for _ in range(2)]
    return [*tensors, [], [0, 0, 2, 3], [1], *ADAMW_OPTIONS.values(), False, False]


def changed(position, value):
    call = small_call()
    call[position] = value
    return call


@pytest.mark.skipif(not load_compiled(), reason="the compiled library is absent")
@pytest.mark.parametrize(
    "position, value, message",
    [
        (1, [], "grads has 0 tensors; 1 are needed"),
        (1, [torch.zeros(4, 5)], r"grads\[0\] is 4x5, its parameter 4x4"),
        (1, [torch.zeros(4, 4).double()], r"grads\[0\] is float64"),
        (1, [torch.zeros(4, 4).T[:, ::2]], "inner stride"),
        (2, [torch.zeros(4, 4).half()], "is float16; float32 is needed"),
        (3, [torch.zeros(4, 4).int()], "must be float32, float64, bfloat16 or float16"),
        (4, [torch.zeros(4, 4)], "masters has 1 tensors; 0 are needed"),
        (5, [0, 0, 2], "quadruples"),
        (5, [0, 0, 5, 3], r"band \(0, 0, 5, 3\) lies outside its tensor, which is 4x4"),
        (5, [1, 0, 1, 1], "there are 1 tensors"),
        (6, [0], r"steps\[0\]=0 must be at least 1"),
        (6, [1, 1], "steps has 2 entries for 1 parameters"),
    ],
)
def test_compiled_kernel_names_what_is_wrong(position, value, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        ADAMW(*changed(position, value))


def test_opcheck():
    torch.library.opcheck(ADAMW, small_call())
    tensors = [[torch.randn(4, 4)] for _ in range(3)]
    torch.library.opcheck(SGD, [*tensors, [], [0, 0, 2, 3], 0.1, 0.9, 0.0, True, False, True])


def test_nothing_leaks():
    """The bindings own the list elements that torch hands them; each has to be given back."""
    call = small_call()
    ADAMW(*call)
    counts = [sys.getrefcount(tensors[0]) for tensors in call[:4]]
    storage_users = [tensors[0]._use_count() for tensors in call[:4]]
    for _ in range(10):
        ADAMW(*call)
        with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
            ADAMW(*call[:5], [0, 0, 2], *call[6:])
    assert [tensors[0]._use_count() for tensors in call[:4]] == storage_users
    assert [sys.getrefcount(tensors[0]) for tensors in call[:4]] == counts
    reference = weakref.ref(call[0][0])
    call.clear()
    assert reference() is None


def test_use_native_says_what_runs(monkeypatch):
    monkeypatch.delenv("SORTED_KERNELS_EXPERIMENTAL", raising=False)
    assert optimizer.use_native("cpu") == load_compiled()
    assert not optimizer.use_native("cuda") and not optimizer.use_native("mps")
    monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", "1")
    assert optimizer.use_native("cuda") == optimizer._has_cuda_kernels()
