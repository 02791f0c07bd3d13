"""Anytime inference: exact outputs, shared work, the deadline, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sorted_kernels as sk
from sorted_kernels import DimensionError, OptionError, Submodel
from sorted_kernels.inference import anytime, replay
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.nn import current, dimensions


class Block(torch.nn.Module):
    """Counts its calls."""

    def __init__(self, width):
        super().__init__()
        self.fc = torch.nn.Linear(width, width)
        self.calls = 0

    def forward(self, h, *rest, **options):
        self.calls += 1
        return h + torch.tanh(self.fc(h))


class Net(torch.nn.Module):
    """Stem, blocks, head; what is special about a network is its ``loop``."""

    def __init__(self, width=6, depth=5):
        super().__init__()
        self.stem = Block(width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 3)

    def prepare(self, x):
        return self.stem(x)

    def loop(self, h):
        for layer in self.layers:
            h = layer(h)
        return h

    def forward(self, x):
        return self.head(self.norm(self.loop(self.prepare(x))))


def elastic(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return sk.elasticize(model, {"layers": {"depth": "depth"}}).eval()


def expected(model, x, depths=None, **sizes):
    """Outputs of plain forwards at each depth."""
    outputs = []
    for depth in depths or range(1, dimensions(model)["depth"] + 1):
        with torch.no_grad(), sk.active(model, Submodel(depth=depth, **sizes)):
            outputs.append(model(x.clone()))
    return outputs


def assert_exact(model, x, **options):
    wanted = expected(model, x, **options)
    calls(model).clear()
    results = list(anytime(model, x, exits=options.get("depths")))
    assert len(results) == len(wanted)
    for result, output in zip(results, wanted, strict=True):
        assert torch.equal(result.output, output), f"depth {result.depth}"
    return results


class calls:  # noqa: N801 - reads like a function
    """Call counters of a model's blocks."""

    def __init__(self, model):
        self.blocks = [m for m in model.modules() if isinstance(m, Block)]

    def clear(self):
        for block in self.blocks:
            block.calls = 0

    def __eq__(self, counts):
        return [block.calls for block in self.blocks] == counts


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
    calls(model).clear()
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


class Sliced(Net):
    """As in transformers: a slice, an index, a mask made anew in each forward, keywords."""

    def loop(self, h):
        mask = torch.ones(h.shape[0], 1) * float("nan")
        kinds = ["a", "b"] * 3
        for i, layer in enumerate(self.layers[: len(self.layers)]):
            h = layer(h, mask, kind=kinds[i], first=i == 0)
        return h


class Indexed(Net):
    def loop(self, h):
        for i in range(len(self.layers)):
            assert self.layers[i].fc.in_features == 6  # a stand-in answers for its block
            h = self.layers[i](h)
        return h


class Unprepared(Net):
    """The stem is a function: its result is another tensor each time."""

    def prepare(self, x):
        return (x + 1).relu()


class Inputs(Net):
    """Two stems, of which one is called twice on the other's output."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([Block(6), Block(6)])

    def prepare(self, x):
        h = self.parts[0](x.flatten(1) * 2)
        return self.parts[1](self.parts[1](h)) + self.stem(h)


class InPlaceStem(Net):
    """As in convolutional networks: an in-place activation changes the stem's output."""

    def __init__(self):
        super().__init__()
        self.relu = torch.nn.ReLU(inplace=True)

    def prepare(self, x):
        return self.relu(self.stem(x))


class Skips(Net):
    """The stem's output is used again after the blocks."""

    def forward(self, x):
        h = self.prepare(x)
        return self.head(self.loop(h) * h)


class Dense(Net):
    """Every hidden state is used outside of the blocks."""

    def loop(self, h):
        states = [h]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return torch.stack(states).mean(0)


class Accumulating(Net):
    def loop(self, h):
        total = torch.zeros_like(h)
        for layer in self.layers:
            h = layer(h)
            total += h
        return total


class Between(Net):
    """Work between the blocks."""

    def loop(self, h):
        for i, layer in enumerate(self.layers):
            h = self.norm(layer(h * (1 + i)))
        return h


class TupleBlock(Block):
    def forward(self, h, state=None):
        return super().forward(h), h.mean()


class Tuples(Net):
    """Blocks that return tuples, of which the loop takes the first."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(TupleBlock(6) for _ in range(5))

    def loop(self, h):
        for layer in self.layers:
            h = layer(h)[0]
        return h


class FirstState(Tuples):
    """As T5's position bias: what the first block returns is given to all others."""

    def loop(self, h):
        state = None
        for layer in self.layers:
            h, new = layer(h, state)
            state = new if state is None else state
            h = h + state
        return h


class ManyStatesBlock(Block):
    def forward(self, states):
        return super().forward(states[-1])


class ManyStates(Net):
    """Blocks are given all hidden states and use the last."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(ManyStatesBlock(6) for _ in range(5))

    def loop(self, h):
        states = [h]
        for layer in self.layers:
            states = [*states, layer(states)]
        return torch.stack(states).mean(0)


class IdentityBlock(Net):
    def __init__(self):
        super().__init__()
        self.layers[0] = torch.nn.Identity()


KINDS = [Sliced, Indexed, Unprepared, Inputs, InPlaceStem, Skips, Dense, Accumulating, Between,
         Tuples, FirstState, ManyStates, IdentityBlock]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("depths", [None, [2, 3, 5], [3, 5]], ids=["all", "2-3-5", "3-5"])
def test_other_forwards_are_exact_too(x, kind, depths):
    model = elastic(kind())
    assert_exact(model, x, depths=depths)
    if kind is not ManyStates:  # its blocks may take part in finding out what is needed
        assert all(getattr(block, "calls", 1) == 1 for block in model.layers.all_blocks())


def test_stems_are_replayed_through_functions_and_containers(x):
    model = elastic(Inputs())
    assert_exact(model, x)
    assert [part.calls for part in model.parts] == [1, 2] and model.stem.calls == 1


def test_hidden_states_are_exact_when_returned(x):
    class Returning(Net):
        def forward(self, x):
            h, states = self.stem(x), []
            for layer in self.layers:
                h = layer(h)
                states.append(h)
            return {"logits": self.head(h), "states": states}

    model = elastic(Returning())
    wanted = expected(model, x)
    for result, output in zip(anytime(model, x), wanted, strict=True):
        assert torch.equal(result.output["logits"], output["logits"])
        assert len(result.output["states"]) == result.depth
        pairs = zip(result.output["states"], output["states"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_sequential_with_elastic_depth(x):
    class Sequence(Net):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*(Block(6) for _ in range(4)))

        def loop(self, h):
            return self.layers(h)

    model = elastic(Sequence())
    assert_exact(model, x)
    assert calls(model) == [1] * 5


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


def test_inputs_that_are_not_numbers_or_come_from_inference_mode(x):
    model = elastic(Unprepared())
    with torch.inference_mode():
        made_there = x * 1
        wanted = expected(model, x)
        results = list(anytime(model, made_there))
    assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
    nan = [r.output for r in anytime(model, torch.full((2, 6), float("nan")))]
    assert len(nan) == 5 and all(output.isnan().all() for output in nan)


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


def leftovers(model):
    """Whatever a run might leave on a model."""
    assert model.layers._playing is None
    return [
        (
            sorted(m.__dict__.keys() - {"_playing"}),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            m.training,
        )
        for m in model.modules()
    ]


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


class InPlaceBlock(Block):
    def forward(self, h):
        h += self.fc(h)
        return h


class InPlaceHead(Net):
    def forward(self, x):
        return self.head(self.loop(self.prepare(x)).relu_())


class Twice(Net):
    def loop(self, h):
        return super().loop(super().loop(h))


class Reversed(Net):
    def loop(self, h):
        for layer in reversed(list(self.layers)):
            h = layer(h)
        return h


class Unused(Net):
    def loop(self, h):
        for layer in list(self.layers)[1:]:
            h = layer(h)
        return h


class DepthDependent(Net):
    def loop(self, h):
        return super().loop(h / len(self.layers))


def in_place_blocks():
    model = Net()
    model.layers = torch.nn.ModuleList(InPlaceBlock(6) for _ in range(5))
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (in_place_blocks, "block 0 of 'layers' changes its input in place"),
        (InPlaceHead, "changed in place after it ran"),
        (Twice, "runs block 0 of 'layers' twice"),
        (Reversed, "other arguments at another depth"),
        (Unused, "leaves out block 0 of 'layers'"),
        (DepthDependent, "other arguments at another depth"),
    ],
    ids=["in-place-blocks", "in-place-head", "twice", "reversed", "unused", "depth-dependent"],
)
def test_forwards_that_cannot_be_shared_are_refused_not_wrong(x, make, says):
    model = elastic(make())
    current(model)
    before, wanted = leftovers(model), expected(model, x)
    outputs = []
    with pytest.raises(OptionError, match=says):
        for result in anytime(model, x):
            outputs.append(result.output)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=False))
    assert leftovers(model) == before


def test_changing_a_result_that_is_the_hidden_state_is_refused(x):
    class Headless(Net):
        def forward(self, x):
            return self.loop(self.stem(x))

    generator = anytime(elastic(Headless()), x)
    next(generator).output.zero_()
    with pytest.raises(OptionError, match="in place"):
        next(generator)


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
