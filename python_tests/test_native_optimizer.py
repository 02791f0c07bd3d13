"""Staircase optimizers: every implementation against torch.optim in float64.

What the step must not touch is compared bit for bit afterwards.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sorted_kernels.ops.library import load_compiled
from support.optimizer_problems import (
    ADAMW_OPTIONS,
    DTYPE_IDS,
    DTYPES,
    HALF,
    IMPLEMENTATIONS,
    Problem,
    fixed_staircases,
    host,
    make_problem,
    random_staircases,
    refill_grads,
    runner,
)
from support.poison import bits

ADAMW_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")
SGD_OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=0.1)


def assert_as_good_as_torch(problem, name, oracle, same_dtype):
    """Error against float64 at most twice that of torch in the compute dtype, plus 1e-6."""
    for own, exact, torch_result in zip(problem.active(name), oracle, same_dtype, strict=True):
        if exact.numel():
            allowed = 2 * (torch_result.detach().double() - exact).abs().max() + 1e-6
            assert (own - exact.detach()).abs().max() <= allowed, name


def run_and_check(problem, run, torch_optimizer, call_lists, state_names, clear_grads, **options):
    """Three steps beside torch.optim in float64 and in the compute dtype, then all the checks."""
    value = "masters" if problem.dtype in HALF else "params"
    vectors = [
        [torch.nn.Parameter(x.to(dtype)) for x in problem.active(value)]
        for dtype in (torch.float64, problem.compute)
    ]
    oracles = [torch_optimizer(parameters) for parameters in vectors]
    untouched = [bits(buffer)[~inside].clone() for buffer, inside in problem.buffers]
    for step in range(1, 4):
        grads = refill_grads(problem, step)
        for parameters, oracle in zip(vectors, oracles, strict=True):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.to(parameter.dtype)
            oracle.step()
        if "steps" in options:
            options["steps"] = [step] * len(problem.masks)
        run(problem, [problem.lists[n] for n in call_lists], clear_grads=clear_grads, **options)

    assert_as_good_as_torch(problem, value, *vectors)
    for name, key in state_names.items():
        states = [[o.state[p][key] for p in ps] for o, ps in zip(oracles, vectors, strict=True)]
        assert_as_good_as_torch(problem, name, *states)
    for before, (buffer, inside) in zip(untouched, problem.buffers, strict=True):
        assert torch.equal(bits(buffer)[~inside], before), "touched an inactive element"
    for kept, grad in zip(grads, problem.active("grads"), strict=True):
        assert torch.equal(grad, torch.zeros_like(grad) if clear_grads else kept)
    if problem.dtype in HALF:
        for param, master, mask in zip(
            problem.lists["params"], problem.lists["masters"], problem.masks, strict=True
        ):
            assert torch.equal(param[mask], master[mask].to(problem.dtype))


def check_adamw(staircases, dtypes, run, seed=0, maximize=False, clear_grads=False):
    problem = make_problem(staircases, *dtypes, ("exp_avgs", "exp_avg_sqs"), seed)
    options = dict(ADAMW_OPTIONS)

    def torch_optimizer(parameters):
        return torch.optim.AdamW(
            parameters,
            lr=options["lr"],
            betas=(options["beta1"], options["beta2"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            maximize=maximize,
            foreach=False,
        )

    run_and_check(
        problem,
        run,
        torch_optimizer,
        ADAMW_LISTS,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"},
        clear_grads,
        steps=None,
        maximize=maximize,
        **options,
    )


def check_sgd(staircases, dtypes, run, seed=0, momentum=0.9, nesterov=False, **flags):
    states = ("momentums",) if momentum else ()
    problem = make_problem(staircases, *dtypes, states, seed)
    problem.lists.setdefault("momentums", [])
    options = SGD_OPTIONS | dict(momentum=momentum, nesterov=nesterov)
    maximize, clear_grads = flags.get("maximize", False), flags.get("clear_grads", False)
    run_and_check(
        problem,
        run,
        lambda parameters: torch.optim.SGD(parameters, **options, maximize=maximize, foreach=False),
        ("params", "grads", "momentums", "masters"),
        {"momentums": "momentum_buffer"} if momentum else {},
        clear_grads,
        maximize=maximize,
        **options,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("clear_grads", [False, True], ids=["keep", "clear"])
def test_adamw(implementation, dtypes, clear_grads):
    check_adamw(
        fixed_staircases(), dtypes, runner("run_adamw", implementation), clear_grads=clear_grads
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "momentum, nesterov",
    [(0.0, False), (0.9, False), (0.9, True)],
    ids=["plain", "momentum", "nag"],
)
def test_sgd(implementation, dtypes, momentum, nesterov):
    run = runner("run_sgd", implementation)
    check_sgd(
        fixed_staircases(), dtypes, run, momentum=momentum, nesterov=nesterov, clear_grads=nesterov
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maximize(implementation):
    dtypes = DTYPES[0]
    check_adamw(fixed_staircases(), dtypes, runner("run_adamw", implementation), maximize=True)
    check_sgd(fixed_staircases(), dtypes, runner("run_sgd", implementation), maximize=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_staircases(implementation):
    adamw, sgd = runner("run_adamw", implementation), runner("run_sgd", implementation)

    @settings(max_examples=25, deadline=None)
    @given(random_staircases(), st.sampled_from(DTYPES), st.integers(0, 2**31), st.booleans())
    def check(staircases, dtypes, seed, flag):
        check_adamw(staircases, dtypes, adamw, seed, clear_grads=flag)
        check_sgd(staircases, dtypes, sgd, seed, nesterov=flag)

    check()


@pytest.mark.skipif(host is None, reason="sorted_kernels._host was not compiled")
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_all_compiled_implementations_give_the_same_bits(dtypes):
    results = {}
    for implementation in ("op", "simt", "portable") if load_compiled() else ("simt", "portable"):
        problem = make_problem(fixed_staircases(), *dtypes, ("exp_avgs", "exp_avg_sqs"), seed=3)
        run = runner("run_adamw", implementation)
        lists = [problem.lists[name] for name in ADAMW_LISTS]
        steps = list(range(1, len(problem.masks) + 1))
        run(problem, lists, steps=steps, maximize=False, clear_grads=True, **ADAMW_OPTIONS)
        results[implementation] = [bits(buffer).clone() for buffer, _ in problem.buffers]
    first = results.pop("simt")
    for implementation, other in results.items():
        assert all(map(torch.equal, first, other)), implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_every_half_precision_value_converts_as_in_torch(implementation, dtype):
    """All 65536 gradients widen exactly; masters at, between and beyond them round to even."""
    run = runner("run_sgd", implementation)
    grads = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    lower, upper = grads.float(), (grads.view(torch.int16) + 1).view(dtype).float()
    between = ((lower.double() + upper.double()) / 2).float()
    masters = torch.cat([lower, between, torch.nextafter(between, upper), -between])
    bands = [0, 0, len(masters), 1]

    def step(grads, masters, lr):
        problem = Problem(dtype, dtype, bands)
        params = torch.zeros(len(masters), dtype=dtype)
        options = dict(SGD_OPTIONS, lr=lr, momentum=0.0, weight_decay=0.0)
        flags = dict(nesterov=False, maximize=False, clear_grads=False)
        run(problem, [[params], [grads], [], [masters]], **options, **flags)
        return params

    rounded = step(torch.zeros(len(masters), dtype=dtype), masters, lr=0.0)
    torch.testing.assert_close(rounded, masters.to(dtype), rtol=0, atol=0, equal_nan=True)
    moved = torch.zeros(len(masters))
    step(grads.repeat(4), moved, lr=-1.0)
    torch.testing.assert_close(moved, lower.repeat(4), rtol=0, atol=0, equal_nan=True)
