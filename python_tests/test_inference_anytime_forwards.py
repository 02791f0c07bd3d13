"""Anytime inference of many kinds of forward: exact where work can be shared, refused elsewhere."""

import pytest
import torch

from sorted_kernels import OptionError
from sorted_kernels.inference import anytime
from sorted_kernels.nn import current
from support.anytime import Block, Net, assert_exact, calls, elastic, expected, leftovers


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


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


class ByKeyword(Net):
    """Hidden states and options go by keyword, and the options differ from block to block."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(KeywordBlock(6) for _ in range(5))

    def loop(self, h):
        for i, layer in enumerate(self.layers):
            h = layer(states=h, scale=torch.full((1,), 1.0 + i))
        return h


class KeywordBlock(Block):
    def forward(self, *, states, scale):
        return super().forward(states * scale)


class Repeated(Net):
    """One hidden state in several arguments."""

    def loop(self, h):
        for layer in self.layers:
            h = layer(h, h, [h, {"again": h}])
        return h


class IdentityBlock(Net):
    def __init__(self):
        super().__init__()
        self.layers[0] = torch.nn.Identity()


KINDS = [Sliced, Indexed, Unprepared, Inputs, InPlaceStem, Skips, Dense, Accumulating, Between,
         Tuples, FirstState, ManyStates, ByKeyword, Repeated, IdentityBlock]  # fmt: skip


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


def test_inputs_that_are_not_numbers_or_come_from_inference_mode(x):
    model = elastic(Unprepared())
    with torch.inference_mode():
        made_there = x * 1
        wanted = expected(model, x)
        results = list(anytime(model, made_there))
    assert all(torch.equal(r.output, w) for r, w in zip(results, wanted, strict=True))
    nan = [r.output for r in anytime(model, torch.full((2, 6), float("nan")))]
    assert len(nan) == 5 and all(output.isnan().all() for output in nan)


class Peeking(Net):
    """Looks at what needs no content of every hidden state, and from one depth on at more."""

    look = staticmethod(lambda h: h.shape[0] + h.dim() + h.size(-1))

    def loop(self, h):
        for layer in self.layers:
            h = layer(h)
            assert h.dtype == torch.float32 and h.device.type == "cpu" and self.look(h)
        return h


def test_shapes_of_earlier_hidden_states_may_be_read(x):
    assert_exact(elastic(Peeking()), x)


@pytest.mark.parametrize(
    "look",
    [
        lambda h: h.abs(), lambda h: h[0], lambda h: h.tolist(), lambda h: h.data_ptr(),
        lambda h: bool(h), lambda h: torch.ops.aten.neg.default(h), lambda h: h.untyped_storage(),
    ],
    ids=["method", "index", "list", "pointer", "bool", "op", "storage"],
)  # fmt: skip
def test_late_use_of_an_earlier_hidden_state_is_refused(x, look):
    model = elastic(Peeking())
    generator = anytime(model, x)
    for _ in range(3):
        next(generator)
    model.look = look
    with pytest.raises(OptionError, match="did not use at the depths before"):
        next(generator)
