"""The cross-entropy of a layer: where its gradients land, what it computes, what it keeps."""

import functools
import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops import compiled_cross_entropy
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.reference import linear_cross_entropy as reference
from support.cross_entropy import (
    DIFFERENT,
    EQUAL,
    check,
    exact,
    gradients_of,
    ours,
    plain,
    problem,
    reductions,
    upstream,
)
from support.oracle import DTYPES, assert_within_twice
from support.poison import assert_same_bits, outside


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

    run = functools.partial(reference.linear_cross_entropy, stage=counted)
    for module in (reference, compiled_cross_entropy):
        monkeypatch.setattr(module, "linear_cross_entropy", run)
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
