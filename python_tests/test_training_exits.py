"""Sub-models that differ in depth alone share one forward."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import sorted_kernels as sk
from sorted_kernels import Submodel, SubmodelSpace
from sorted_kernels.errors import OptionError
from sorted_kernels.nn import activate, current
from sorted_kernels.training import Sandwich, StochasticSummation, Summation
from sorted_kernels.training.exits import chains, forward_exits

DEPTHS, WIDTHS = [2, 3, 5], [1, 2, 4]
SPACE = SubmodelSpace(depth=DEPTHS, width=WIDTHS)
BATCH = (torch.randn(9, 64, dtype=torch.float64), torch.randint(0, 10, (9,)))


def network():
    torch.manual_seed(5)
    model = sk.models.elastic_residual_mlp(width=24, hidden=24, depth=6, widths=4)
    return model.double()


def runs_of_modules(model):
    """How often each block, the stem and the head compute."""
    runs = Counter()

    def counted(name, forward):
        def run(*args):
            runs.update([name])
            return forward(*args)

        return run

    watched = {f"block {i}": block for i, block in enumerate(model.blocks.all_blocks())}
    for name, module in {**watched, "stem": model.stem, "head": model.head}.items():
        module.forward = counted(name, module.forward)
    return runs


def gradients(model, objective):
    model.zero_grad()
    loss = objective(model, BATCH, 0.5)
    return loss, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


OBJECTIVES = {
    "summation": lambda **kw: Summation(SPACE, **kw),
    "sum": lambda **kw: Summation(SPACE, reduction="sum", **kw),
    "stochastic-summation": lambda **kw: StochasticSummation(SPACE, seed=1, **kw),
    "cross": lambda **kw: StochasticSummation(SPACE, seed=1, cross=True, **kw),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_sharing_changes_no_loss_and_no_gradient(kind):
    model = network()
    shared_loss, shared = gradients(model, OBJECTIVES[kind]())
    own_loss, own = gradients(model, OBJECTIVES[kind](share_depths=False))
    torch.testing.assert_close(shared_loss, own_loss, rtol=1e-13, atol=0)
    for name, gradient in own.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


def test_a_chain_costs_its_deepest_and_a_head_an_exit():
    model = network()
    runs = runs_of_modules(model)
    Summation(SubmodelSpace(depth=DEPTHS, width=[4]))(model, BATCH)
    blocks = {f"block {i}": 1 for i in range(5)}
    assert runs == {**blocks, "stem": 1, "head": 3}
    runs.clear()
    Summation(SPACE)(model, BATCH)
    assert runs == {**{name: 3 for name in blocks}, "stem": 3, "head": 9}
    runs.clear()
    Summation(SPACE, share_depths=False)(model, BATCH)
    assert runs["block 0"] == runs["head"] == 9


def test_dropout_is_drawn_once_for_all_exits():
    model = network()
    model.blocks[0].register_forward_hook(lambda _, __, y: F.dropout(y, 0.5))
    x = BATCH[0]
    chain = [Submodel(depth=d, width=4) for d in (1, 2, 2)]
    torch.manual_seed(0)
    one, two, again = forward_exits(model, chain, lambda: model(x))
    assert torch.equal(two, again) and not torch.equal(one, two)
    torch.manual_seed(0)
    with sk.active(model, chain[1]):
        assert torch.equal(two, model(x))


class DropoutBetween(torch.nn.Module):
    """Its dropout is a module of its own, which runs between the blocks."""

    def __init__(self):
        super().__init__()
        blocks = [sk.nn.Linear(64, 64) for _ in range(4)]
        self.blocks = sk.nn.ModuleList(blocks, depth_dim="depth")
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = x + self.dropout(block(x).tanh())
        return self.head(x)


def test_dropout_between_blocks_is_drawn_once_too():
    model, x = DropoutBetween().double(), BATCH[0]
    drawn = []
    model.dropout.register_forward_hook(lambda _, __, y: drawn.append(y))
    chain = [Submodel(depth=d) for d in (2, 3, 4)]
    outputs = forward_exits(model, chain, lambda: model(x))
    hidden, masked = x, [drawn[0], drawn[4 - 1], drawn[-2], drawn[-1]]
    for y in masked:  # those that the deepest run saw
        hidden = hidden + y
    assert torch.equal(outputs[-1], model.head(hidden))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[0], drawn[5])
    assert torch.equal(drawn[3], drawn[6]), (
        "the second run's draw before block 3 holds from then on"
    )
    torch.stack([F.cross_entropy(output, BATCH[1]) for output in outputs]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_outputs_and_state_are_those_of_separate_forwards():
    model, before = network(), Submodel(depth=4, width=3)
    activate(model, before)
    chain = [Submodel(depth=d, width=2) for d in (1, 4, 6)]
    outputs = forward_exits(model, chain, lambda: model(BATCH[0]))
    assert current(model) == before
    assert all("forward" not in module.__dict__ for module in model.modules())
    for submodel, output in zip(chain, outputs, strict=True):
        with sk.active(model, submodel):
            assert torch.equal(output, model(BATCH[0]))


def test_chains():
    model = network()
    listed = [Submodel(depth=d, width=w) for w, d in ((1, 5), (2, 3), (1, 2), (2, 3))]
    assert chains(model, listed) == [
        [Submodel(depth=2, width=1), Submodel(depth=5, width=1)],
        [Submodel(depth=3, width=2)] * 2,
    ]
    widths = [Submodel(width=1), Submodel(width=1)]
    assert chains(model, widths) == [widths[:1], widths[1:]]
    plain = sk.nn.Linear(4, 4, in_dim="width")
    assert chains(plain, widths) == [widths[:1], widths[1:]]


class Twice(torch.nn.Module):
    """Runs its list twice: exits cannot share it."""

    def __init__(self):
        super().__init__()
        self.blocks = sk.nn.ModuleList(
            [torch.nn.Linear(64, 64) for _ in range(3)], depth_dim="depth"
        )
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = x + block(x)
        return self.head(x)


def test_a_model_that_cannot_share_says_so_and_trains_otherwise():
    model = Twice().double()
    space = SubmodelSpace(depth=[1, 2, 3])
    with pytest.raises(OptionError, match="runs block 0 of 'blocks' twice.*share_depths=False"):
        Summation(space)(model, BATCH)
    assert all(p.grad is None for p in model.parameters())
    loss = Summation(space, share_depths=False)(model, BATCH)
    assert loss.isfinite() and model.blocks[0].weight.grad.any()


def test_the_sandwich_without_distillation_shares_too():
    model = network()
    space = SubmodelSpace(depth=[1, 6], width=[4])
    runs = runs_of_modules(model)
    Sandwich(space, n=2, distill=False)(model, BATCH)
    assert runs["block 0"] == 1 and runs["head"] == 2


def test_hidden_states_die_with_the_backward():
    model = network()
    alive = []
    model.blocks[1].register_forward_hook(lambda _, __, y: alive.append(weakref.ref(y)))
    Summation(SubmodelSpace(depth=DEPTHS))(model, BATCH)
    assert len(alive) == 1 and alive[0]() is None
