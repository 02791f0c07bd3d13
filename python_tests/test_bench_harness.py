"""The benchmarks' harness: who is compared, who takes turns with whom, what a sample is.

Time is a fake clock that only the contestants move, so that every sample is known beforehand.
"""

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import harness, limits
from bench.harness import (
    MAX_REPEATS,
    ROUNDS,
    Case,
    Contestant,
    DisagreementError,
    Timer,
    check_agreement,
    interleave,
    make_row,
    relative_difference,
    run_case,
)
from bench.rows import parse_sizes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a contestant says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def make_case(contestants, **options):
    builders = {name: lambda each=each: each for name, each in contestants.items()}
    return Case("kernel", "mode", "n=3", torch.float32, builders, CPU, **options)


def computing(*values):
    """A contestant that computes some tensors and counts its calls."""
    calls = []
    outcome = [torch.tensor(value) for value in values]
    contestant = Contestant(lambda: calls.append(1), lambda: outcome)
    return contestant, calls


def taking(clock, seconds, log=None, name=None):
    """A contestant that takes some time on the fake clock and notes when it was called."""

    def call():
        clock.seconds += seconds
        if log is not None:
            log.append(name)

    return Contestant(call)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.3, 4.4], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([float("nan"), 4.0], [3.0, 4.0], float("inf")),
        ([3.0, 4.0], [float("nan"), 4.0], float("inf")),
        ([float("inf"), 4.0], [float("inf"), 4.0], float("inf")),
    ],
    ids=["same", "tenth", "zeros", "nan-left", "nan-right", "infinite"],
)
def test_relative_difference(a, b, expected):
    difference = relative_difference(torch.tensor(a).double(), torch.tensor(b).double())
    assert difference == pytest.approx(expected)


def test_difference_is_taken_in_float64():
    a, b = torch.full((2,), 6e4, dtype=torch.float16), torch.full((2,), -6e4, dtype=torch.float16)
    assert relative_difference(a, b) == pytest.approx(2.0)  # infinite in float16


def test_agreement_within_the_tolerance():
    contestants = {"B0": computing([1.0, 2.0])[0], "ours": computing([1.0, 2.0001])[0]}
    check_agreement(make_case(contestants, tolerance=1e-3), contestants)
    with pytest.raises(DisagreementError):
        check_agreement(make_case(contestants, tolerance=1e-6), contestants)


@pytest.mark.parametrize(
    "values, message",
    [
        (([1.0, 2.0], [5.0]), r"tensor 1 of ours is 0\.25 away from that of B0; allowed is 0\.001"),
        (([1.0, float("nan")], [4.0]), "tensor 0 of ours is inf away"),
        (([1.0, 2.0],), "ours has the shapes .*, B0 "),
        (([1.0, 2.0], [4.0], [4.0]), "ours has the shapes .*, B0 "),
        (([1.0, 2.0], [[4.0, 4.0], [4.0, 4.0]]), "ours has the shapes .*, B0 "),
    ],
    ids=["values", "nan", "too-few", "too-many", "broadcastable"],
)
def test_a_disagreement_is_refused_and_not_timed(values, message, monkeypatch):
    (baseline, baseline_calls), (ours, our_calls) = computing([1.0, 2.0], [4.0]), computing(*values)
    monkeypatch.setattr(harness, "interleave", lambda *_: pytest.fail("was timed"))
    with pytest.raises(DisagreementError, match=message) as error:
        run_case(make_case({"B0": baseline, "ours": ours}), seconds=0.0)
    assert str(error.value).startswith("kernel mode n=3 float32 hot: ")
    assert len(baseline_calls) == len(our_calls) == 1


def test_nan_in_the_first_outcome_is_a_disagreement():
    contestants = {"B0": computing([float("nan")])[0], "ours": computing([float("nan")])[0]}
    with pytest.raises(DisagreementError, match="tensor 0 of B0"):
        check_agreement(make_case(contestants), contestants)


def test_an_outcome_is_that_of_one_call_and_not_overwritten_by_the_next_contestant():
    """Two contestants that share a buffer are compared by what each of them wrote."""
    shared = torch.zeros(1)
    contestants = {
        name: Contestant(lambda value=value: shared.fill_(value), lambda: [shared])
        for name, value in (("B0", 1.0), ("ours", 2.0))
    }
    with pytest.raises(DisagreementError):
        check_agreement(make_case(contestants), contestants)


@pytest.mark.parametrize("right", [True, False])
def test_contestants_without_an_outcome_are_called_but_not_compared(right):
    silent = []
    contestants = {
        "B1": Contestant(lambda: silent.append(1)),
        "B0": computing([1.0])[0],
        "ours": computing([1.0 if right else 2.0])[0],
    }
    with (
        contextlib.nullcontext() if right else pytest.raises(DisagreementError, match="that of B0")
    ):
        check_agreement(make_case(contestants), contestants)
    assert silent == [1]


def turns(log, names):
    """The log of an interleaved run, after the search for repeats, as one order a round."""
    log = log[len(log) % (2 * len(names)) :]  # hot: as many calls to warm up as in the sample
    assert log[::2] == log[1::2], "who is timed is who was called before"
    return [tuple(log[i : i + 2 * len(names) : 2]) for i in range(0, len(log), 2 * len(names))]


def test_contestants_take_turns_in_a_new_order_every_round(clock):
    log, names = [], ("B0", "B1", "ours")
    contestants = {name: taking(clock, 1.0, log, name) for name in names}
    samples = interleave(make_case(contestants), contestants, seconds=299.0)
    orders = turns(log, names)
    assert all(sorted(order) == sorted(names) for order in orders)
    assert {len(values) for values in samples.values()} == {len(orders)} == {50}
    assert len(set(orders)) == 6, "every order comes up in 50 rounds"
    firsts = [order[0] for order in orders]
    assert all(10 <= firsts.count(name) <= 24 for name in names), "nobody is always first"


def test_samples_are_the_time_of_one_call(clock):
    contestants = {
        "B0": taking(clock, 0.004),
        "ours": taking(clock, 0.00025),
    }
    samples = interleave(make_case(contestants), contestants, seconds=0.0)
    assert samples["B0"] == pytest.approx([0.004] * ROUNDS[0])
    assert samples["ours"] == pytest.approx([0.00025] * ROUNDS[0])


@pytest.mark.parametrize(
    "seconds, rounds", [(0.0, ROUNDS[0]), (0.25, 13), (1e6, ROUNDS[1])], ids=["few", "some", "most"]
)
def test_rounds_end_with_the_time_given(clock, seconds, rounds):
    contestants = {"ours": taking(clock, 0.01)}  # a round is two calls: 20 ms
    assert len(interleave(make_case(contestants), contestants, seconds)["ours"]) == rounds


@pytest.mark.parametrize(
    "seconds, repeats", [(1.0, 1), (2e-3, 1), (1e-4, 20), (1.9e-5, 105), (1e-9, MAX_REPEATS)]
)
def test_repeats_fill_a_sample(clock, seconds, repeats):
    case = make_case({})
    assert Timer(case).repeats_for(taking(clock, seconds).call) == repeats


def test_a_cold_sample_is_one_call_after_the_caches_were_overwritten(clock, monkeypatch):
    monkeypatch.setattr(Timer, "_flush_buffer", lambda self, device: torch.zeros(8))
    case = make_case({}, cache="cold")
    timer, seen = Timer(case), []

    def call():
        clock.seconds += 1e-6
        seen.append(timer.buffer.clone())
        timer.buffer.zero_()

    assert timer.repeats_for(call) == 1 and not seen
    for _ in range(2):
        assert timer.sample(call, 1) == pytest.approx(1e-6)
    assert [bool((buffer == 1).all()) for buffer in seen] == [True, True]
    assert Timer(make_case({})).buffer is None


def test_a_cold_case_has_no_call_between_the_flush_and_the_sample(clock, monkeypatch):
    monkeypatch.setattr(Timer, "_flush_buffer", lambda self, device: torch.zeros(8))
    log = []
    contestants = {name: taking(clock, 1.0, log, name) for name in ("B2", "ours")}
    interleave(make_case(contestants, cache="cold"), contestants, seconds=0.0)
    assert len(log) == 2 * ROUNDS[0]


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile(clock, enabled):
    states = []

    def call():
        states.append(gc.isenabled())
        clock.seconds += 1.0
        if len(states) > 5:
            raise ValueError("broken")

    contestants, before = {"ours": Contestant(call)}, gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ValueError, match="broken"):
            interleave(make_case(contestants), contestants, 0.0)
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert not any(states[1:]) and after is enabled  # the first call is the search for repeats


@pytest.mark.parametrize(
    "clock_name, metric, factor",
    [("device", "ms", 1e3), ("kernel", "ms", 1e3), ("host", "us", 1e6)],
)
def test_row_has_percentiles_in_the_clocks_unit(clock_name, metric, factor):
    values = np.random.default_rng(0).permutation(np.arange(11)) * 1e-3
    case = make_case({}, clock=clock_name, flops=7, bytes=9, cache="cold")
    row = make_row(case, "ours", values)
    assert (row.p20, row.p50, row.p80) == pytest.approx(
        (2e-3 * factor, 5e-3 * factor, 8e-3 * factor)
    )
    assert (row.metric, row.samples, row.flops, row.bytes) == (metric, 11, 7, 9)
    assert (row.kernel, row.mode, row.sizes, row.dtype) == ("kernel", "mode", "n=3", "float32")
    assert (row.provider, row.cache, row.torch) == ("ours", "cold", torch.__version__)


def test_row_of_another_metric_keeps_its_values():
    row = make_row(make_case({}, clock="host"), "torch", [1.0, 2.0, 4.0], "GB/s")
    assert (row.p50, row.metric) == (2.0, "GB/s")


def test_run_case_gives_a_row_a_contestant_in_order(clock):
    contestants = {"B2": taking(clock, 0.002), "B0": taking(clock, 0.008)}
    rows = run_case(make_case(contestants), seconds=0.0)
    assert [(row.provider, round(row.p50, 6)) for row in rows] == [("B2", 2.0), ("B0", 8.0)]


def test_limits_are_bytes_and_operations_over_time(monkeypatch):
    """Copies count what is read and what is written; a multiply-add counts as two."""
    monkeypatch.setattr(limits, "interleave", lambda case, each, seconds: {"torch": [0.5, 0.25, 1]})
    copy, matmul = limits.measure(CPU, quick=True)
    elements, n = parse_sizes(copy.sizes)["elements"], parse_sizes(matmul.sizes)["n"]
    assert (copy.mode, copy.metric, copy.bytes) == ("copy", "GB/s", 8 * elements)
    assert copy.p50 == pytest.approx(8 * elements / 0.5 / 1e9)
    assert (matmul.mode, matmul.metric, matmul.flops) == ("matmul", "TFLOP/s", 2 * n**3)
    assert matmul.p50 == pytest.approx(2 * n**3 / 0.5 / 1e12)


class Calls(TorchFunctionMode):
    """Names of the torch functions called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_limits_are_measured_on_the_work_they_name(monkeypatch):
    done = {}

    def once(case, contestants, seconds):
        with Calls() as calls:
            contestants["torch"].call()
        done[case.mode] = calls.names
        return {"torch": [1.0]}

    monkeypatch.setattr(limits, "interleave", once)
    limits.measure(CPU, quick=True)
    assert done == {"copy": ["copy_"], "matmul": ["mm"]}
