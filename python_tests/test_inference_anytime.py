"""Anytime inference: exact outputs, shared work, the deadline, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sorted_kernels as sk
from sorted_kernels import DimensionError, OptionError, Submodel
from sorted_kernels.inference import anytime
from sorted_kernels.models import elastic_residual_mlp, replay
from sorted_kernels.nn import current
from support.anytime import (
    Block,
    Net,
    assert_exact,
    calls,
    clear_calls,
    elastic,
    expected,
    leftovers,
)


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def test_residual_mlp_at_every_depth_and_several_widths():
    torch.manual_seed(0)
    model = elastic_residual_mlp(5, width=16, hidden=16, depth=6, classes=4, widths=8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 5)
    for width in (1, 3, 8):
        sk.activate(model, Submodel(depth=6, width=width))
        results = list(anytime(model, x))
        assert [r.depth for r in results] == [1, 2, 3, 4, 5, 6]
        wanted = expected(model, x, width=width)
        assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
        assert current(model) == Submodel(depth=6, width=width)


def test_each_block_and_the_stem_are_computed_once(x):
    model = elastic(Net())
    assert_exact(model, x)
    assert calls(model) == [1] * 6


def test_active_depth_is_the_last_exit(x):
    model = elastic(Net())
    sk.activate(model, Submodel(depth=3))
    assert [r.depth for r in anytime(model, x)] == [1, 2, 3]
    assert calls(model) == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("exits", [[5], [1, 5], [2, 3], [1, 3, 4], (2, 4, 5)], ids=str)
def test_given_exits_share_the_blocks_between_them(x, exits):
    model = elastic(Net())
    sk.activate(model, Submodel(depth=2))  # exits may go deeper than what is active
    wanted = expected(model, x, depths=exits)
    clear_calls(model)
    results = list(anytime(model, x, exits=exits))
    assert [r.depth for r in results] == list(exits)
    assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
    assert calls(model) == [1] * (1 + exits[-1]) + [0] * (5 - exits[-1])
    assert current(model) == Submodel(depth=2)


def test_all_exits_cost_at_most_a_tenth_more_than_the_deepest():
    model = elastic_residual_mlp().eval()
    x = torch.randn(3, 64)
    with FlopCounterMode(display=False) as deepest, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as together:
        assert len(list(anytime(model, x))) == 12
    assert together.get_total_flops() <= 1.1 * deepest.get_total_flops()
    # All that is more are eleven heads.
    head = 2 * 3 * 256 * 10
    assert together.get_total_flops() == deepest.get_total_flops() + 11 * head


def test_dimension_with_more_or_fewer_steps_than_blocks(x):
    for full, depths in ((2, [1, 2]), (10, [1, 3, 5, 7, 9])):
        model = Net(depth=5)
        sk.elasticize(model, {"layers": {"depth": "depth"}}, dimensions={"depth": full})
        results = list(anytime(model, x))
        assert [r.depth for r in results] == depths
        wanted = expected(model, x, depths=depths)
        assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
        assert [r.depth for r in anytime(model, x, exits=[full])] == [full]


def test_only_the_last_hidden_state_is_kept(x):
    alive = []

    class Watched(Block):
        def forward(self, h):
            output = super().forward(h)
            alive.append(weakref.ref(output))
            return output

    model = Net()
    model.layers = torch.nn.ModuleList(Watched(6) for _ in range(5))
    generator = anytime(elastic(model), x)
    for count in range(1, 6):
        next(generator)
        gc.collect()
        kept = sum(reference() is not None for reference in alive)
        assert kept <= 2 and (count < 3 or kept == 1)  # two until a run did without the first


def test_hidden_states_go_with_the_results_not_with_the_garbage_collector(x):
    alive = []

    class Watched(Block):
        def forward(self, h):
            output = super().forward(h)
            alive.append(weakref.ref(output))
            return output

    model = Net()
    model.layers = torch.nn.ModuleList(Watched(6) for _ in range(5))
    elastic(model)
    gc.disable()
    try:
        for _ in anytime(model, x):
            pass
        assert len(alive) == 5 and not any(reference() is not None for reference in alive)
        generator = anytime(model, x)
        next(generator)
        generator.close()
        assert len(alive) == 6 and alive[-1]() is None
    finally:
        gc.enable()


def test_forward_function_and_no_gradients(x):
    model = elastic(Net())
    results = list(anytime(model, {"a": x}, forward=lambda m, inputs: m(inputs["a"])))
    wanted = expected(model, x)
    assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
    assert not any(r.output.requires_grad for r in results) and torch.is_grad_enabled()


class Clock:
    """Goes on only when told."""

    def __init__(self):
        self.milliseconds = 0.0

    def __call__(self):
        return self.milliseconds / 1e3


class TimedBlock(Block):
    clock, costs = Clock(), 10.0

    def forward(self, h):
        self.clock.milliseconds += self.costs
        return super().forward(h)


@pytest.fixture
def timed(monkeypatch):
    """A model whose stem takes 50 ms and whose blocks take 10 ms each."""
    TimedBlock.clock = Clock()
    monkeypatch.setattr(replay, "now", TimedBlock.clock)
    model = Net(depth=8)
    model.layers = torch.nn.ModuleList(TimedBlock(6) for _ in range(8))
    model.stem = TimedBlock(6)
    model.stem.costs = 50.0
    return elastic(model)


@pytest.mark.parametrize(
    ("deadline", "depths"),
    [
        (None, 8), (1e9, 8), (float("inf"), 8), (130, 8), (129, 7), (95, 4), (90, 4), (70, 2),
        (69, 1), (10, 1), (0, 1),
    ],
)  # fmt: skip
def test_deadline_stops_before_an_exit_that_would_be_late(timed, x, deadline, depths):
    results = list(anytime(timed, x, deadline))
    assert [r.depth for r in results] == list(range(1, depths + 1))
    times = [50 + 10 * r.depth for r in results]
    assert [r.elapsed_ms for r in results] == pytest.approx(times)
    assert timed.layers.all_blocks()[depths - 1].calls == 1
    assert all(block.calls == 0 for block in timed.layers.all_blocks()[depths:])


def test_deadline_counts_the_blocks_to_the_next_exit(timed, x):
    depths = [r.depth for r in anytime(timed, x, 105, exits=[2, 5, 8])]
    assert depths == [2, 5]  # 70 and 100 ms; the next would end at 130
    assert [r.depth for r in anytime(timed, x, 99, exits=[2, 5, 8])] == [2]


def test_time_that_the_caller_takes_counts(timed, x):
    generator = anytime(timed, x, 100)
    assert next(generator).depth == 1
    TimedBlock.clock.milliseconds += 25
    assert next(generator).elapsed_ms == pytest.approx(95)
    assert next(generator, None) is None


def test_model_is_as_it_was_between_results_and_after_closing(x):
    model = elastic(Net())
    sk.activate(model, Submodel(depth=4))
    list(anytime(model, x))
    before, deepest = leftovers(model), expected(model, x, depths=[4])[0]
    generator = anytime(model, x)
    for _ in range(2):
        next(generator)
        assert leftovers(model) == before and current(model) == Submodel(depth=4)
        assert len(model.layers) == 4 and torch.equal(model(x), deepest)
    generator.close()
    assert leftovers(model) == before and next(generator, None) is None


def test_switching_the_model_between_results_changes_nothing(x):
    model = elastic_residual_mlp(6, width=8, hidden=8, depth=4, classes=3, widths=4).eval()
    sk.activate(model, Submodel(depth=4, width=3))
    wanted, outputs = expected(model, x, width=3), []
    for i, result in enumerate(anytime(model, x)):
        outputs.append(result.output)
        sk.activate(model, Submodel(depth=1 + i % 2, width=1 + i))
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert current(model) == Submodel(depth=2, width=4)


def test_switching_a_part_between_results_changes_nothing(x):
    model = elastic_residual_mlp(6, width=8, hidden=8, depth=4, classes=3, widths=4).eval()
    wanted, outputs = expected(model, x), []
    for result in anytime(model, x):
        outputs.append(result.output)
        sk.activate(model.blocks.all_blocks()[-1], Submodel(width=2))
        sk.activate(model.head, Submodel(width=1))
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


def test_two_generators_at_once(x):
    model = elastic(Net())
    other = x + 1
    pairs = zip(anytime(model, x), anytime(model, other), strict=True)
    wanted = zip(expected(model, x), expected(model, other), strict=True)
    for (a, b), (want_a, want_b) in zip(pairs, wanted, strict=True):
        assert torch.equal(a.output, want_a) and torch.equal(b.output, want_b)


def test_model_is_restored_after_an_error_inside_it(x):
    class Failing(Block):
        def forward(self, h):
            raise RuntimeError("block is broken")

    model = Net()
    model.layers[2] = Failing(6)
    elastic(model)
    current(model)
    before = leftovers(model)
    generator = anytime(model, x)
    assert [next(generator).depth, next(generator).depth] == [1, 2]
    with pytest.raises(RuntimeError, match="block is broken"):
        next(generator)
    assert leftovers(model) == before and len(model.layers) == 5
    assert current(model) == Submodel(depth=5) and not torch.is_inference_mode_enabled()


def test_a_forward_of_the_users_own_on_a_stem_stays(x):
    model = elastic(Net())
    own = model.stem.forward
    model.stem.forward = lambda h: own(h) + 1
    mine = model.stem.forward
    assert_exact(model, x)
    assert model.stem.__dict__["forward"] is mine


def test_models_without_exactly_one_depth_list(x):
    two = Net()
    two.more = torch.nn.ModuleList(Block(6) for _ in range(5))
    rules = {"layers": {"depth": "depth"}, "more": {"depth": "more"}}
    with pytest.raises(DimensionError, match=r"2 lists.*layers \(depth\), more \(more\)"):
        anytime(sk.elasticize(two, rules), x)
    with pytest.raises(DimensionError, match=r"no module list.*\['width'\]"):
        anytime(sk.nn.Linear(3, 4, out_dim="width"), x)
    with pytest.raises(DimensionError, match="no module list.*none"):
        anytime(Net(), x)


@pytest.mark.parametrize("exits", [[], [0], [6], [2, 2], [3, 1], [1.0], [True]], ids=str)
def test_bad_exits(x, exits):
    with pytest.raises(OptionError, match=r"exits=.*'depth' in 1..5"):
        anytime(elastic(Net()), x, exits=exits)


@pytest.mark.parametrize("deadline", [-1, float("nan")])
def test_bad_deadline(x, deadline):
    with pytest.raises(OptionError, match="deadline_ms"):
        anytime(elastic(Net()), x, deadline)
