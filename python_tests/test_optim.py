"""AdamW and SGD on the staircase against torch.optim."""

import copy
import io
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sorted_kernels as sk
from sorted_kernels.ops.gradient import slot_of, staircase_of
from sorted_kernels.ops.optimizer import adamw_fallback, sgd_fallback
from support.poison import assert_same_bits, outside, pattern, prefix

ADAMW = [
    {},
    {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 0.01, "weight_decay": 0.0, "maximize": True},
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
]
CASES = [("AdamW", options) for options in ADAMW] + [("SGD", options) for options in SGD]
IDS = ["-".join([kind, *(f"{k}={v}" for k, v in options.items())]) for kind, options in CASES]
optimizers = pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
SHAPES = [(5, 7), (6,), (3, 4, 2, 2), (1, 1), (8, 1)]


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients_of(params, step, dtype=None):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).to(dtype or p.dtype) for p in params]


def set_gradients(params, step):
    for param, grad in zip(params, gradients_of(params, step), strict=True):
        param.grad = grad


def give(param, grad, corners):
    """Put a gradient where a backward would have: in the slot's buffer, with these corners."""
    slot = slot_of(param)
    for m, k in corners:
        view, _ = slot.prefix(m, k)
        view.copy_(grad[prefix((m, k)[: grad.dim()])])
    assert param.grad is slot.buffer


@optimizers
def test_whole_equals_torch(kind, options):
    ours, theirs = parameters(), parameters()
    mine = getattr(sk.optim, kind)(ours, **options, update="whole")
    stock = getattr(torch.optim, kind)(theirs, **options)
    for step in range(30):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 3:  # a parameter without a gradient stays, and its step count with it
            ours[0].grad = theirs[0].grad = None
        mine.step()
        stock.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_whole_with_groups_and_a_schedule():
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [
            {"params": params[:2], "lr": 0.02, "weight_decay": 0.3},
            {"params": params[2:], "betas": (0.7, 0.9)},
        ]

    mine = sk.optim.AdamW(groups(ours), 0.01, update="whole")
    stock = torch.optim.AdamW(groups(theirs), 0.01)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=30) for o in (mine, stock)
    ]
    for step in range(30):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        stock.step()
        for schedule in schedules:
            schedule.step()
        assert mine.param_groups[1]["lr"] == stock.param_groups[1]["lr"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@optimizers
@pytest.mark.parametrize("shape", [(5, 7), (6,), (4, 5, 2, 3)], ids=str)
def test_active_moves_the_rectangle_as_if_it_stood_alone(kind, options, shape):
    """Outside of it parameters are NaN and states patterned, and stay so to the bit."""
    m, k = 3, 1 if len(shape) == 1 else 4
    block = (m,) if len(shape) == 1 else (m, k, *shape[2:])
    param, alone = torch.nn.Parameter(torch.randn(shape)), None
    alone = torch.nn.Parameter(param.detach()[prefix(block)].clone())
    mask = outside(shape, block)
    param.data[mask] = torch.nan
    mine = getattr(sk.optim, kind)([param], **options)
    stock = getattr(torch.optim, kind)([alone], **options)
    for step in range(12):
        mine.zero_grad()
        grad = gradients_of([param], step)[0]
        give(param, grad, [(m, k)])
        alone.grad = grad[prefix(block)].clone()
        mine.step()
        stock.step()
        if step == 0:
            states = {n: s for n, s in mine.state[param].items() if isinstance(s, torch.Tensor)}
            for state in states.values():
                assert not state[mask].any()
                state[mask] = pattern((int(mask.sum()),), state.dtype)
        before = {name: state.clone() for name, state in states.items()}
        torch.testing.assert_close(
            param.detach()[prefix(block)], alone.detach(), rtol=2e-5, atol=2e-6
        )
        assert param[mask].isnan().all()
        for name, state in states.items():
            assert_same_bits(state[mask], pattern((int(mask.sum()),), state.dtype))
            assert state[prefix(block)].isfinite().all() and before[name] is not state


corner_lists = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 11)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(steps=st.lists(corner_lists, min_size=1, max_size=4), case=st.sampled_from(CASES))
def test_staircases_of_several_corners(steps, case):
    """Against a masked step of torch's: an element moves by torch's rule if covered, else not."""
    kind, options = case
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(9, 11, dtype=torch.float64))
    twin = torch.nn.Parameter(param.detach().clone())
    mine = getattr(sk.optim, kind)([param], **options)
    stock = getattr(torch.optim, kind)([twin], **options)
    for step, corners in enumerate(steps):
        mine.zero_grad()
        grad = gradients_of([param], step)[0]
        give(param, grad, corners)
        mask = torch.zeros(9, 11, dtype=torch.bool)
        for m, k in corners:
            mask[:m, :k] = True
        twin.grad = grad * mask
        before = [twin.detach().clone()] + [
            s.clone() for s in stock.state[twin].values() if torch.is_tensor(s) and s.dim()
        ]
        mine.step()
        stock.step()
        after = [twin.data] + [
            s for s in stock.state[twin].values() if torch.is_tensor(s) and s.dim()
        ]
        for old, new in zip(before, after, strict=False):  # undo what torch did outside
            new[~mask] = old[~mask]
        for new in after[len(before) :]:  # states that this step made
            new[~mask] = 0
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide_gradient", [False, True], ids=["half-gradient", "float32-gradient"])
@optimizers
def test_half_precision_follows_a_float32_master(kind, options, dtype, wide_gradient):
    params = parameters(dtype)
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    mine = getattr(sk.optim, kind)(params, **options, update="whole")
    stock = getattr(torch.optim, kind)(masters, **options)
    for step in range(10):
        for param, master in zip(params, masters, strict=True):
            grad = gradients_of([param], step)[0]
            if wide_gradient:
                if hasattr(param, "grad_dtype"):
                    param.grad_dtype = None
                param.grad = grad.float()
            else:
                param.grad = grad
            master.grad = grad.float()
        mine.step()
        stock.step()
    for param, master in zip(params, masters, strict=True):
        kept = mine.state[param]["master"]
        torch.testing.assert_close(kept, master.detach(), rtol=2e-5, atol=2e-6)
        assert_same_bits(param.detach(), kept.to(dtype))
        assert all(
            s.dtype == torch.float32 for s in mine.state[param].values() if torch.is_tensor(s)
        )


@optimizers
@pytest.mark.parametrize("update", ["active", "whole"])
def test_clear_grads(kind, options, update):
    """The same steps as with zero_grad, and gradients that are zero after each."""
    found = []
    for clear in (True, False):
        params = parameters()
        optimizer = getattr(sk.optim, kind)(params, **options, update=update, clear_grads=clear)
        for step in range(6):
            if not clear:
                optimizer.zero_grad()
            for param, grad in zip(params, gradients_of(params, step), strict=True):
                rows = 1 + (step + param.shape[0]) % param.shape[0]
                give(param, grad, [(rows, 1 if param.dim() == 1 else param.shape[1])])
            optimizer.step()
            if clear:
                assert not any(p.grad.any() or staircase_of(p) for p in params)
        found.append(params)
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_a_step_without_gradients_does_nothing():
    params = parameters()
    for kind in ("AdamW", "SGD"):
        for update in ("active", "whole"):
            optimizer = getattr(sk.optim, kind)(params, update=update)
            optimizer.step()
            assert not optimizer.state_dict()["state"]


def test_closure_and_version_counters():
    layer = sk.nn.Linear(4, 3)
    optimizer = sk.optim.SGD(layer.parameters(), 0.01)
    x = torch.randn(2, 4)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    y = layer(x).square().sum()
    with torch.no_grad():
        layer.weight.grad.zero_()
    optimizer.step()
    x = x.requires_grad_()
    y = layer(x).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def trained(kind, options, dtype, steps, params=None, optimizer=None, start=0):
    params = parameters(dtype) if params is None else params
    if optimizer is None:
        optimizer = getattr(sk.optim, kind)(params, **options)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for param, grad in zip(params, gradients_of(params, step), strict=True):
            give(param, grad, [(param.shape[0], 1)])
        optimizer.step()
    return params, optimizer


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_continued_run_equals_an_uninterrupted_one(kind, options, dtype, how):
    expected, _ = trained(kind, options, dtype, 6)
    params, optimizer = trained(kind, options, dtype, 3)
    if how in ("pickle", "deepcopy"):
        clone = copy.deepcopy if how == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        optimizer.update = "active"
        optimizer = clone(optimizer)
        params = optimizer.param_groups[0]["params"]
        assert (optimizer.update, optimizer.clear_grads) == ("active", False)
    else:
        state = optimizer.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)  # weights only: nothing but tensors and numbers
        params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = getattr(sk.optim, kind)(params, lr=77.0)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == options.get("lr", 1e-3)
    trained(kind, options, dtype, 3, params, optimizer, start=3)
    for a, b in zip(params, expected, strict=True):
        assert_same_bits(a, b)


def test_add_param_group_and_late_momentum():
    params = parameters()
    optimizer = sk.optim.SGD(params[:2], 0.1)
    optimizer.add_param_group({"params": params[2:], "momentum": 0.5})
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9  # from now on there is a buffer, of zeros
    stock = parameters()
    twin = torch.optim.SGD([{"params": stock[:2]}, {"params": stock[2:], "momentum": 0.5}], 0.1)
    set_gradients(stock, 0)
    twin.step()
    twin.param_groups[0]["momentum"] = 0.9
    for step in (1, 2):
        set_gradients(params, step)
        set_gradients(stock, step)
        optimizer.step()
        twin.step()
    for a, b in zip(params, stock, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_equals_torch(norm_type, max_norm):
    params, stock = parameters(), parameters()
    for param, twin, grad in zip(params, stock, gradients_of(params, 0), strict=True):
        corners = [(1, param.shape[1] if param.dim() > 1 else 1), (param.shape[0], 1)]
        give(param, grad, corners)
        twin.grad = param.grad.clone()
    found = sk.optim.clip_grad_norm_(params, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(stock, max_norm, norm_type)
    torch.testing.assert_close(found, expected)
    for param, twin in zip(params, stock, strict=True):
        torch.testing.assert_close(param.grad, twin.grad)
        assert not staircase_of(param).covers(2, 2)


def test_clipping_reads_the_staircase_only():
    layer = sk.nn.Linear(8, 6, in_dim="i", out_dim="o")
    sk.activate(layer, sk.Submodel(i=5, o=3))
    layer(torch.randn(2, 5)).square().sum().backward()
    mask = outside((6, 8), (3, 5))
    layer.weight.grad.data[mask] = torch.nan
    assert sk.optim.clip_grad_norm_(layer.parameters(), 0.1).isfinite()
    assert layer.weight.grad[mask].isnan().all() and layer.weight.grad[~mask].isfinite().all()


def test_clipping_corner_cases():
    param = torch.nn.Parameter(torch.ones(3))
    assert sk.optim.clip_grad_norm_(param, 1.0) == 0
    param.grad = torch.full((3,), torch.inf)
    with pytest.raises(sk.OptionError, match="norm is inf"):
        sk.optim.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    with pytest.raises(sk.OptionError, match=r"max_norm=0.* above 0"):
        sk.optim.clip_grad_norm_([param], 0)
    for _ in range(2):  # clipping is no foreign write: the buffer goes on being used
        layer = sk.nn.Linear(4, 3)
        layer(torch.randn(2, 4)).sum().backward()
        place = layer.weight.grad.data_ptr()
        sk.optim.clip_grad_norm_(layer.parameters(), 0.1)
        layer.zero_grad()
        layer(torch.randn(2, 4)).sum().backward()
        assert layer.weight.grad.data_ptr() == place


def test_scalar_parameters():
    """A learned temperature, as in CLIP."""
    for kind in ("AdamW", "SGD"):
        param, twin = (torch.nn.Parameter(torch.tensor(2.0)) for _ in range(2))
        mine, stock = getattr(sk.optim, kind)([param], 0.1), getattr(torch.optim, kind)([twin], 0.1)
        for _ in range(3):
            for p, o in ((param, mine), (twin, stock)):
                o.zero_grad()
                (p * p).backward()
                o.step()
        torch.testing.assert_close(param, twin)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("native", [True, False], ids=["as-built", "fallback"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_gradient_with_a_graph(kind, native, monkeypatch):
    """After create_graph=True a step differentiates nothing, and zeroing drops the graph."""
    if not native:
        ops = torch.ops.sorted_kernels
        for name, fallback in (("adamw", adamw_fallback), ("sgd", sgd_fallback)):
            monkeypatch.setattr(ops, f"staircase_{name}_", SimpleNamespace(default=fallback))
    layer = sk.nn.Linear(4, 3, activation="silu", grad_mode="dense")
    extra = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(sk.optim, kind)(layer.parameters(), 0.1, **extra)
    layer(torch.randn(2, 4)).square().sum().backward(create_graph=True)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before) and layer.weight.grad.requires_grad
    states = [s for s in optimizer.state[layer.weight].values() if torch.is_tensor(s)]
    assert states and not any(state.requires_grad for state in states)
    optimizer.zero_grad(set_to_none=False)
    assert not layer.weight.grad.requires_grad and not layer.weight.grad.any()


def test_step_hooks_and_the_profiler_see_a_step():
    params = parameters()
    optimizer = sk.optim.SGD(params, 0.1)
    set_gradients(params, 0)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["before", "after"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())


BACKENDS = """
import sys, torch
import sorted_kernels as sk
from sorted_kernels.ops.optimizer import use_native
sys.path.insert(0, sys.argv[1])
from test_optim import CASES, trained
result = {"native": use_native("cpu")}
for i, (kind, options) in enumerate(CASES):
    for dtype in (torch.float32, torch.bfloat16):
        result[i, dtype] = [p.detach() for p in trained(kind, options, dtype, 5)[0]]
torch.save(result, sys.argv[2])
"""


def test_compiled_kernel_and_fallback_agree(tmp_path):
    found = []
    for without in ("0", "1"):
        path = str(tmp_path / without)
        env = {**os.environ, "SORTED_KERNELS_NO_LIBRARY": without}
        here = os.path.dirname(__file__)
        subprocess.run([sys.executable, "-c", BACKENDS, here, path], env=env, check=True, cwd=here)
        found.append(torch.load(path, weights_only=False))
    native, fallback = found
    assert fallback.pop("native") is False
    native.pop("native")  # False where nothing was compiled: then both are the fallback
    for key, params in native.items():
        tolerance = {"rtol": 2e-5, "atol": 2e-6} if key[1] == torch.float32 else {}
        for a, b in zip(params, fallback[key], strict=True):
            torch.testing.assert_close(a, b, **tolerance)
