"""Staircase optimizers: every implementation against torch.optim in float64.

Parameters are views cut out of larger buffers. What the step must not touch holds NaN (parameters,
gradients) or a pattern (states), and is compared bit for bit afterwards.
"""

import sys
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sorted_kernels.ops import optimizer
from sorted_kernels.ops.library import load_compiled
from sorted_kernels.staircase import Staircase

try:
    from sorted_kernels import _host as host
except ImportError:
    host = None

ADAMW = torch.ops.sorted_kernels.staircase_adamw_.default
SGD = torch.ops.sorted_kernels.staircase_sgd_.default
HALF = (torch.bfloat16, torch.float16)
NUMPY_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ADAMW_OPTIONS = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
SGD_OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=0.1)


def bits(tensor):
    return tensor.view(NUMPY_BITS[tensor.element_size()])


def padded_view(shape, dtype, fill, generator):
    """A buffer filled with ``fill``, and a view of ``shape`` in it at random offset and stride."""
    pad = torch.randint(0, 4, (3,), generator=generator).tolist()
    if len(shape) == 1:
        step = 1 if pad[2] < 3 else 2
        buffer = torch.full((pad[0] + shape[0] * step + pad[1],), fill, dtype=dtype)
        return buffer, buffer[pad[0] : pad[0] + shape[0] * step : step]
    rows, cols = shape
    buffer = torch.full((rows + 2, pad[0] + cols + pad[1]), fill, dtype=dtype)
    return buffer, buffer[1 : rows + 1, pad[0] : pad[0] + cols]


@dataclass
class Problem:
    """Tensors of one optimizer call, and a mask of the active elements of each."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    bands: list[int] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    lists: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def compute(self):
        return torch.float32 if self.dtype in HALF else self.dtype

    def add_list(self, name, dtype, fill, value, shapes, generator):
        """One tensor a shape: ``value(mask)`` in the active elements, ``fill`` all around."""
        self.lists[name] = []
        for shape, mask in zip(shapes, self.masks, strict=True):
            buffer, view = padded_view(shape, dtype, fill, generator)
            view[mask] = value(mask).to(dtype)
            self.lists[name].append(view)
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside.as_strided(view.shape, view.stride(), view.storage_offset())[mask] = True
            self.buffers.append((buffer, inside))

    def active(self, name):
        """The active elements of a list, as one float64 vector a tensor."""
        pairs = zip(self.lists[name], self.masks, strict=True)
        return [tensor[mask].double() for tensor, mask in pairs]


def make_problem(staircases, dtype, grad_dtype, states, seed):
    """Build a problem from staircases; those of width 1 become one-dimensional parameters."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(dtype, grad_dtype)
    shapes = []
    for index, staircase in enumerate(staircases):
        flat = staircase.cols == 1
        shapes.append((staircase.rows,) if flat else (staircase.rows, staircase.cols))
        mask = torch.zeros(staircase.rows, staircase.cols, dtype=torch.bool)
        for begin, end, cols in staircase.bands():
            problem.bands += [index, begin, end, cols]
            mask[begin:end, :cols] = True
        problem.masks.append(mask[:, 0] if flat else mask)

    def normal(mask):
        return torch.randn(int(mask.sum()), dtype=torch.float64, generator=generator)

    def zeros(mask):
        return torch.zeros(int(mask.sum()))

    nan, pattern = float("nan"), 12345.0
    problem.add_list("params", dtype, nan, normal, shapes, generator)
    problem.add_list("grads", grad_dtype, nan, normal, shapes, generator)
    for name in states:
        problem.add_list(name, problem.compute, pattern, zeros, shapes, generator)
    problem.lists["masters"] = []
    if dtype in HALF:
        exact = iter(map(torch.Tensor.__getitem__, problem.lists["params"], problem.masks))
        problem.add_list(
            "masters", torch.float32, pattern, lambda _: next(exact), shapes, generator
        )
    return problem


def refill_grads(problem, seed):
    """Fresh random gradients in the active elements; returns them in float64."""
    generator = torch.Generator().manual_seed(seed)
    for grad, mask in zip(problem.lists["grads"], problem.masks, strict=True):
        grad[mask] = torch.randn(int(mask.sum()), generator=generator).to(grad.dtype)
    return problem.active("grads")


def as_numpy(tensors):
    """NumPy arrays that share memory; half precision as its bits."""
    return [
        t.view(torch.int16).numpy().view(np.uint16) if t.dtype in HALF else t.numpy()
        for t in tensors
    ]


def host_runner(function, engine):
    """Run one engine of the host module on a problem's tensors."""

    def run(problem, lists, **options):
        half = "float16" if problem.dtype == torch.float16 else "bfloat16"
        arrays = [as_numpy(tensors) for tensors in lists]
        getattr(host, function)(
            *arrays, problem.bands, **options, half=half, engine=engine, chunk_elements=48
        )

    return run


def runner(function, implementation):
    """The named implementation as ``run(problem, lists, **options)``."""
    if implementation == "op":  # whatever a user gets here
        op = ADAMW if function == "run_adamw" else SGD
        return lambda problem, lists, **options: op(*lists, problem.bands, **options)
    if implementation == "fallback":
        fallback = optimizer.adamw_fallback if function == "run_adamw" else optimizer.sgd_fallback
        return lambda problem, lists, **options: fallback(*lists, problem.bands, **options)
    if host is None:
        pytest.skip("sorted_kernels._host was not compiled")
    if implementation == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    return host_runner(function, implementation)


IMPLEMENTATIONS = ["op", "fallback", "simt", "portable", "avx2"]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
DTYPE_IDS = [f"{str(p)[6:]}-{str(g)[6:]}" for p, g in DTYPES]


def fixed_staircases():
    """Odd, wide, tall, single-element, full, empty and one-dimensional parameters."""
    result = []
    for rows, cols, corners in [
        (13, 17, [(13, 5), (7, 9), (3, 17)]),
        (64, 64, [(64, 64)]),
        (5, 200, [(5, 33), (2, 199)]),
        (300, 2, [(299, 1)]),
        (1, 1, [(1, 1)]),
        (9, 8, []),
        (301, 1, [(150, 1)]),
        (64, 1, [(64, 1)]),
    ]:
        staircase = Staircase(rows, cols)
        staircase.update(corners)
        result.append(staircase)
    return result


@st.composite
def random_staircases(draw):
    result = []
    for _ in range(draw(st.integers(1, 4))):
        staircase = Staircase(draw(st.integers(1, 33)), draw(st.integers(1, 33)))
        for _ in range(draw(st.integers(0, 4))):
            m, k = draw(st.integers(1, staircase.rows)), draw(st.integers(1, staircase.cols))
            staircase.add(m, k)
        result.append(staircase)
    return result


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


ADAMW_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")


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
