"""Attention against the float64 definition: masks, groups, heads a sample, poison, derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops.attention_dispatch import AttentionProblem, choose_attention
from sorted_kernels.ops.dispatch import Machine
from sorted_kernels.reference import attention as reference
from support.attention import PROBLEMS, Problem, exact, outcome, plain, poison_inactive, wide
from support.oracle import DTYPES, assert_within_twice
from support.poison import assert_same_bits, in_larger_buffer

problems = pytest.mark.parametrize("p", PROBLEMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def ours(q, k, v, mask, p):
    return sk.attention(q, k, v, num_heads=p.num_heads, mask=mask, causal=p.causal, scale=p.scale)


def op(q, k, v, mask, p):
    """The op that graphs hold, whose CPU implementation is the explicit formula."""
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    counts = torch.tensor(p.each)
    return torch.ops.sorted_kernels.attention(q, k, v, mask, counts, p.causal, p.factor)[0]


def check(call, p, dtype, change=lambda t: t):
    tensors, mask = p.tensors(dtype), p.make_mask(dtype)
    given = [change(t) for t in poison_inactive(tensors, p)]
    if isinstance(p.counts, tuple) or call is op:  # zero heads of y take no part
        given[3] = change(tensors[3])
    found = outcome(call, given, mask, p)
    right = outcome(exact, [t.double() for t in tensors], wide(mask), p)
    torchs = outcome(plain, tensors, mask, p)
    active = found[0].shape[1]
    assert active == (p.counts if isinstance(p.counts, int) and call is ours else p.heads)
    for what, mine, theirs, oracle in zip(
        ("y", "dq", "dk", "dv"), found, torchs, right, strict=True
    ):
        theirs, oracle = (t[:, :active] if what == "y" else t for t in (theirs, oracle))
        assert_within_twice(mine, theirs, oracle, f"{p} {what}")
        for b, heads in enumerate(p.each):
            assert not mine[b, heads if what in ("y", "dq") else heads // p.group :].any(), what


@problems
@dtypes
def test_matches_the_definition_with_poison_in_inactive_heads(p, dtype):
    check(ours, p, dtype)


@problems
def test_the_explicit_formula_matches_too(p):
    check(op, p, torch.float32)


@pytest.mark.parametrize("call", [ours, op], ids=["function", "op"])
def test_long_rows(call):
    check(
        call, Problem("long", heads=3, rows=1000, cols=1000, counts=2, causal=True), torch.float32
    )


@pytest.mark.parametrize("p", [PROBLEMS[2], PROBLEMS[17], PROBLEMS[15]], ids=str)
@pytest.mark.parametrize(
    "layout",
    [in_larger_buffer, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)],
    ids=["cut", "transposed"],
)
def test_any_layout(p, layout):
    check(ours, p, torch.float32, layout)


def test_an_expanded_upstream_gradient():
    q, k, v, _ = Problem("each", batch=4, counts=(6, 2, 2, 1)).tensors(torch.float32)
    leaf = q.clone().requires_grad_()
    sk.attention(leaf, k, v, num_heads=torch.tensor([6, 2, 2, 1])).sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[3, 1:].any()


@pytest.mark.parametrize("p", [p for p in PROBLEMS if isinstance(p.counts, int)], ids=str)
def test_a_prefix_and_its_copy_give_the_same_bits(p):
    tensors, mask = p.tensors(torch.float32), p.make_mask(torch.float32)
    n = p.counts
    copies = [t[:, : n if i in (0, 3) else n // p.group].clone() for i, t in enumerate(tensors)]
    own = mask if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask[:, :n].clone()
    whole = Problem("copy", p.batch, n, p.group, p.rows, p.cols, p.head_dim,
                    causal=p.causal, scale=p.scale)  # fmt: skip
    found, copied = outcome(ours, tensors, mask, p), outcome(ours, copies, own, whole)
    for mine, theirs in zip(found, copied, strict=True):
        assert_same_bits(mine[:, : theirs.shape[1]].contiguous(), theirs.contiguous())


@pytest.mark.parametrize(
    "p",
    [
        Problem("groups", heads=4, group=2, rows=3, cols=4, head_dim=2, mask="bool-empty"),
        Problem("prefix", heads=3, rows=3, cols=2, head_dim=2, counts=2, causal=True),
        Problem("each", heads=2, rows=2, cols=3, head_dim=2, counts=(1, 2), mask="additive-empty"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [ours, op], ids=["function", "op"])
def test_first_and_second_derivatives(p, call):
    inputs = [t.requires_grad_() for t in p.tensors(torch.float64)[:3]]
    mask = p.make_mask(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call(*t, mask, p), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, mask, p), inputs, fast_mode=True)


@pytest.mark.parametrize("counts", [None, (1, 2)], ids=["all", "each"])
def test_an_additive_mask_gets_its_gradients(counts):
    p = Problem("mask", heads=2, rows=2, cols=3, head_dim=2, counts=counts)
    inputs = [t.requires_grad_() for t in p.tensors(torch.float64)[:3]]
    mask = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    call = lambda *t: ours(*t, p)  # noqa: E731
    assert torch.autograd.gradcheck(call, (*inputs, mask))
    assert torch.autograd.gradgradcheck(call, (*inputs, mask), fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
def test_only_the_wanted_gradients(wanted, create_graph):
    p = Problem("each", counts=(4, 2), heads=4, group=2)
    *tensors, dy = p.tensors(torch.float64)
    right = outcome(exact, [*tensors, dy], None, p)[1 + wanted]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = ours(*leaves, None, p)
    for _ in range(2):  # the graph is kept
        (found,) = torch.autograd.grad(
            y, leaves[wanted], dy, retain_graph=True, create_graph=create_graph
        )
        torch.testing.assert_close(found, right)


def test_rows_that_attend_to_nothing_elsewhere():
    """What stands in for them where PyTorch's kernels are not known to give zeros."""
    p = Problem("empty", mask="bool-empty")
    for name in ("bool-empty", "additive-empty"):
        mask = Problem("empty", mask=name).make_mask(torch.float64)
        if name == "bool-empty":
            empty = ~mask.any(-1, keepdim=True)
        else:
            empty = mask.isneginf().all(-1, keepdim=True)
        filled, found = reference.without_empty_rows(mask)
        assert torch.equal(found, empty) and empty.any() and not empty.all()
        some = filled if name == "bool-empty" else ~filled.isneginf()
        assert some.any(-1).all()
        *tensors, dy = p.tensors(torch.float64)
        leaves = [t.requires_grad_() for t in tensors]
        y = F.scaled_dot_product_attention(*leaves, filled).masked_fill(found, 0)
        gradients = torch.autograd.grad(y, leaves, dy)
        right = outcome(exact, [*tensors, dy], mask, p)
        for mine, theirs in zip((y, *gradients), right, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_no_grad_and_autocast():
    p = Problem("prefix", counts=4)
    q, k, v, _ = p.tensors(torch.float32)
    with torch.no_grad():
        quiet = ours(q, k, v, None, p)
    assert_same_bits(quiet, ours(q.requires_grad_(), k, v, None, p))
    mask = torch.zeros(7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(q, k, v, mask, p)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), quiet, rtol=2e-2, atol=2e-2)


def test_vmap_and_grad_transforms():
    q, k, v, _ = Problem("plain").tensors(torch.float64)
    function = lambda q: sk.attention(q, k, v, num_heads=4).square().sum()  # noqa: E731
    leaf = q.clone().requires_grad_()
    function(leaf).backward()
    torch.testing.assert_close(torch.func.grad(function)(q), leaf.grad)


def test_empty_axes():
    for B, S, T in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k = torch.randn(B, 4, S, 8), torch.randn(B, 2, T, 8)
        y = sk.attention(q, k, k, num_heads=2)
        assert y.shape == (B, 2, S, 8) and not y.isnan().any()
        counts = torch.full((B,), 2)
        assert sk.attention(q, k, k, num_heads=counts).shape == (B, 4, S, 8)


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_compiles_twice_for_sixteen_counts(causal):
    """(Of a single head PyTorch makes a graph of its own: a size of 1 is a constant to it.)"""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(q, k, v, mask, probe):
        return sk.attention(q, k, v, num_heads=probe.shape[0], mask=mask, causal=causal)

    p = Problem("compile", heads=17, rows=5, cols=6, mask="padding")
    for n in (17, 3, *range(2, 18)):
        tensors, mask = p.tensors(torch.float32), p.make_mask(torch.float32)
        results = []
        for call in (
            lambda q, k, v, mask, p: compiled(q, k, v, mask, torch.empty(n, 0)),  # noqa: B023
            lambda q, k, v, mask, p: sk.attention(q, k, v, num_heads=n, mask=mask, causal=causal),  # noqa: B023
        ):
            results.append(outcome(call, tensors, mask, p))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 2


def test_counts_a_sample_compile_once():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(q, k, v, counts):
        return sk.attention(q, k, v, num_heads=counts)

    p = Problem("compile", batch=3, heads=16, rows=3, cols=4)
    for n in range(1, 17):
        counts = torch.tensor([n, 17 - n, 16])
        tensors = p.tensors(torch.float32)
        results = [
            outcome(lambda q, k, v, mask, p: run(q, k, v, counts), tensors, None, p)  # noqa: B023
            for run in (compiled, lambda q, k, v, c: sk.attention(q, k, v, num_heads=c))
        ]
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


def test_runs_are_neighbours_with_the_same_count():
    assert list(reference.runs_of([3, 3, 1, 3])) == [
        (slice(0, 2), 3), (slice(2, 3), 1), (slice(3, 4), 3),
    ]  # fmt: skip
    assert list(reference.runs_of([])) == []


def test_work_follows_the_sum_of_heads():
    """Multiply-adds of the products, counted where they happen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def flops(num_heads):
        q, k, v = (torch.randn(4, 6, 5, 8) for _ in range(3))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sk.attention(q, k, v, num_heads=num_heads)
        return counter.get_total_flops()

    for counts in ([6, 2, 2, 1], [1, 6, 1, 3]):
        assert flops(torch.tensor(counts)) == sum(counts) * 2 * 2 * 5 * 5 * 8
    assert flops(3) == 4 * 3 * 2 * 2 * 5 * 5 * 8


BAD = {
    "rank": ({"q": torch.randn(2, 3, 4)}, sk.ShapeError, r"q has shape \(2, 3, 4\)"),
    "int": ({"q": torch.ones(2, 6, 7, 8, dtype=torch.int32)}, sk.DTypeError, "q has dtype"),
    "dtype": ({"k": torch.randn(2, 3, 7, 8).half()}, sk.DTypeError, "k has dtype"),
    "k-v": ({"v": torch.randn(2, 3, 6, 8)}, sk.ShapeError, "v "),
    "batch": ({"q": torch.randn(3, 6, 7, 8)}, sk.ShapeError, r"q \(3, 6, 7, 8\)"),
    "features": ({"q": torch.randn(2, 6, 7, 9)}, sk.ShapeError, "features"),
    "groups": ({"q": torch.randn(2, 5, 7, 8)}, sk.ShapeError, "multiple"),
    "device": ({"k": torch.empty(2, 3, 7, 8, device="meta")}, sk.DeviceError, "k is on meta"),
    "zero": ({"num_heads": 0}, sk.ShapeError, r"num_heads=0 is not in 1\.\.6"),
    "many": ({"num_heads": 8}, sk.ShapeError, "num_heads=8"),
    "ratio": ({"num_heads": 0.5}, sk.ShapeError, "num_heads=0.5"),
    "half-group": ({"num_heads": 3}, sk.ShapeError, "num_heads=3 is not a multiple of 2"),
    "kv": ({"num_kv_heads": 4}, sk.ShapeError, r"num_kv_heads=4 is not in 1\.\.3"),
    "disagree": ({"num_heads": 4, "num_kv_heads": 1}, sk.ShapeError, "num_kv_heads=1 disagrees"),
    "mask-dtype": ({"mask": torch.zeros(7, 7).half()}, sk.DTypeError, "mask has dtype"),
    "mask-shape": ({"mask": torch.zeros(7, 6)}, sk.ShapeError, r"mask has shape \(7, 6\)"),
    "mask-rank": ({"mask": torch.zeros(1, 1, 1, 7, 7)}, sk.ShapeError, "mask has shape"),
    "mask-device": ({"mask": torch.zeros(7, 7, device="meta")}, sk.DeviceError, "mask is on"),
    "counts-dtype": ({"num_heads": torch.ones(2)}, sk.DTypeError, "num_heads has dtype"),
    "counts-shape": ({"num_heads": torch.tensor([2])}, sk.ShapeError, "num_heads has shape"),
    "counts-value": ({"num_heads": torch.tensor([2, 3])}, sk.ShapeError, r"num_heads\[1\]=3"),
    "counts-zero": ({"num_heads": torch.tensor([0, 2])}, sk.ShapeError, r"num_heads\[0\]=0"),
    "counts-many": ({"num_heads": torch.tensor([8, 2])}, sk.ShapeError, r"num_heads\[0\]=8"),
    "counts-kv": (
        {"num_heads": torch.tensor([4, 2]), "num_kv_heads": 2}, sk.ShapeError, "num_kv_heads=2"
    ),
    "counts-device": (
        {"num_heads": torch.empty(2, dtype=torch.int64, device="meta")}, sk.DeviceError, "is on"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, error, message = BAD[name]
    kv = torch.randn(2, 3, 7, 8)
    arguments = {"q": torch.randn(2, 6, 7, 8), "k": kv, "v": kv, **changed}
    with pytest.raises(error, match=message):
        sk.attention(**arguments)


def test_num_kv_heads_alone():
    q, k, v, _ = Problem("groups", group=2).tensors(torch.float32)
    assert_same_bits(
        sk.attention(q, k, v, num_kv_heads=2), sk.attention(q, k, v, num_heads=4, num_kv_heads=2)
    )


GPU = Machine("cuda", (9, 0), built=frozenset({"triton"}))
ON = Machine("cuda", (8, 0), built=GPU.built, experimental=True)
EACH = AttentionProblem(True, torch.bfloat16, per_sample=True)
BOTH = AttentionProblem(True, torch.float16, causal=True, masked=True)


@pytest.mark.parametrize(
    ("problem", "machine", "backend", "reason"),
    [
        (AttentionProblem(True, torch.bfloat16), ON, "library", "PyTorch's attention"),
        (AttentionProblem(True, torch.bfloat16, causal=True), ON, "library", "PyTorch's"),
        (EACH, ON, "triton", "experimental"),
        (BOTH, ON, "triton", "without the mask of both"),
        (EACH, GPU, "reference", "is experimental"),
        (EACH, Machine("cuda", (9, 0), built=GPU.built, promoted=GPU.built), "triton", "launch"),
        (EACH, Machine("cuda", (7, 5), built=GPU.built, experimental=True), "reference", "sm_80"),
        (EACH, Machine("cuda", (9, 0), experimental=True), "reference", "not installed"),
        (EACH, Machine("cpu", built=GPU.built, experimental=True), "library", "PyTorch's"),
        (EACH, Machine("cpu", forced="reference"), "reference", "BACKEND=reference"),
        (EACH, Machine("cuda", (9, 0), "cuda", built=GPU.built), "reference", "BACKEND=cuda"),
        (
            AttentionProblem(True, torch.float32),
            Machine("cpu", None, "triton", built=GPU.built, interpreter=True),
            "triton", "BACKEND=triton",
        ),
    ],
)  # fmt: skip
def test_dispatch(problem, machine, backend, reason):
    choice = choose_attention(problem, machine)
    assert choice.backend == backend and reason in choice.reason


@pytest.mark.parametrize(
    "misfit",
    [{"dtype": torch.float64}, {"head_fits": False}, {"mask_trains": True},
     {"unit_strides": False}],
    ids=str,
)  # fmt: skip
def test_dispatch_of_what_the_kernel_cannot_take(misfit):
    import dataclasses

    problem = dataclasses.replace(EACH, **misfit)
    assert choose_attention(problem, ON).backend == "reference"
    forced = Machine("cpu", forced="triton", built=GPU.built, interpreter=True)
    assert choose_attention(problem, forced).backend == "reference"
    with pytest.raises(sk.DeviceError, match="no triton kernel runs on cpu"):
        choose_attention(EACH, Machine("cpu", forced="triton", built=GPU.built))
