from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from sorted_kernels import Submodel, SubmodelSpace
from sorted_kernels.errors import CheckpointError, DimensionError, OptionError, SpaceError
from sorted_kernels.nn import activate, current
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.staircase import Staircase
from sorted_kernels.training import Sandwich, Stochastic, StochasticSummation, Summation
from support.training import CLASSES, Net, leaves, random_data, sliced_logits

SPACE = SubmodelSpace(width=[3, 8, 16], depth=[1, 2, 3])
BATCH = random_data(7, seed=1, dtype=torch.float64)


def hand_written_gradients(model, weighted_losses):
    """Gradients of ``weighted_losses(params)``, a scalar computed by plain slicing."""
    params = leaves(model)
    total = weighted_losses(params)
    total.backward()
    return {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in params.items()
    }


def label_loss(params, submodel):
    return F.cross_entropy(sliced_logits(params, submodel, BATCH[0]), BATCH[1])


def assert_gradients(model, expected):
    for name, param in model.named_parameters():
        got = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def below_one_at_a_time(drawn):
    names = [drawn]
    names += [Submodel(width=w, depth=drawn.depth) for w in (3, 8, 16) if w < drawn.width]
    names += [Submodel(width=drawn.width, depth=d) for d in (1, 2, 3) if d < drawn.depth]
    return names


def below_in_all(drawn):
    widths = [w for w in (3, 8, 16) if w <= drawn.width]
    return [Submodel(width=w, depth=d) for w in widths for d in (1, 2, 3) if d <= drawn.depth]


ALL = [Submodel(width=w, depth=d) for w in (3, 8, 16) for d in (1, 2, 3)]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("objective", "members", "mean"),
    [
        pytest.param(Stochastic(SPACE, seed=3), lambda drawn: [drawn], False, id="stochastic"),
        pytest.param(
            StochasticSummation(SPACE, seed=5), below_one_at_a_time, False, id="summation-by-axis"
        ),
        pytest.param(
            StochasticSummation(SPACE, seed=5, cross=True), below_in_all, False, id="cross"
        ),
        pytest.param(
            StochasticSummation(SPACE, seed=5, reduction="mean"),
            below_one_at_a_time,
            True,
            id="summation-by-axis-mean",
        ),
        pytest.param(Summation(SPACE), lambda drawn: ALL, True, id="mean-of-all"),
        pytest.param(Summation(SPACE, reduction="sum"), lambda drawn: ALL, False, id="sum-of-all"),
    ],
)
def test_gradient_is_that_of_the_summed_losses(objective, members, mean, scale):
    model = Net().double()
    for _ in range(4):  # several draws, each on its own
        model.zero_grad()
        loss = objective(model, BATCH, scale)
        chosen = members(objective.last_submodels[0])
        assert sorted(chosen) == sorted(objective.last_submodels)
        factor = scale / len(chosen) if mean else scale
        expected = hand_written_gradients(
            model, lambda p, c=chosen, f=factor: f * sum(label_loss(p, s) for s in c)
        )
        assert_gradients(model, expected)
        by_hand = sum(label_loss(leaves(model), s).detach() for s in chosen) / len(chosen)
        torch.testing.assert_close(loss, by_hand)
        assert not loss.requires_grad


@pytest.mark.parametrize("distill", [True, False], ids=["distilled", "labels"])
def test_sandwich_gradient(distill):
    model, scale = Net().double(), 0.5
    objective = Sandwich(SPACE, n=5, distill=distill, seed=2)
    loss = objective(model, BATCH, scale)
    largest, smallest, *drawn = objective.last_submodels
    assert largest == Submodel(width=16, depth=3)
    assert smallest == Submodel(width=3, depth=1)
    assert len(drawn) == 3

    def losses(params):
        teacher = sliced_logits(params, largest, BATCH[0]).detach().softmax(dim=1)
        yield label_loss(params, largest)
        for submodel in [smallest, *drawn]:
            if distill:
                logits = sliced_logits(params, submodel, BATCH[0])
                yield -(teacher * logits.log_softmax(dim=1)).sum(dim=1).mean()
            else:
                yield label_loss(params, submodel)

    assert_gradients(model, hand_written_gradients(model, lambda p: scale * sum(losses(p))))
    torch.testing.assert_close(loss, sum(losses(leaves(model))).detach() / 5)


def test_micro_batches_accumulate_over_the_union_of_their_submodels():
    model, objective = Net().double(), Stochastic(SPACE, seed=11)
    drawn, total = [], None
    for part in range(3):
        batch = random_data(5, seed=part, dtype=torch.float64)
        objective(model, batch, 1 / 3)
        submodel = objective.last_submodels[0]
        drawn.append(submodel)
        part_gradients = hand_written_gradients(
            model,
            lambda p, s=submodel, b=batch: F.cross_entropy(sliced_logits(p, s, b[0]), b[1]) / 3,
        )
        total = {n: g + (total[n] if total else 0) for n, g in part_gradients.items()}
    assert len(set(drawn)) > 1
    assert_gradients(model, total)
    for i in range(3):
        expected = Staircase(16, 16)
        for submodel in drawn:
            if submodel.depth > i:
                expected.add(submodel.width, submodel.width)
        assert staircase_of(model.blocks.all_blocks()[i].weight) == expected


def test_draws_follow_the_distribution_of_the_space():
    space = SubmodelSpace(width=[3, 8, 16], depth=[1, 3], weights={"width": [5, 3, 2]})
    objective, count = Stochastic(space, seed=0), 6000
    drawn = Counter(objective.choose()[0] for _ in range(count))
    for width, share in ((3, 0.5), (8, 0.3), (16, 0.2)):
        for depth in (1, 3):
            expected = share / 2
            deviation = (expected * (1 - expected) / count) ** 0.5
            assert abs(drawn[Submodel(width=width, depth=depth)] / count - expected) < 4 * deviation


def test_a_list_space_sums_over_its_members_only():
    listed = [Submodel(width=3, depth=3), Submodel(width=8, depth=1), Submodel(width=16, depth=3)]
    objective = StochasticSummation(SubmodelSpace.of(listed, weights=[0, 0, 1]))
    assert objective.choose() == [listed[2], listed[0]]
    crossed = StochasticSummation(SubmodelSpace.of(listed, weights=[0, 0, 1]), cross=True)
    assert sorted(crossed.choose()) == sorted(listed)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share_depths", [True, False])
def test_summation_weighs_as_the_space_does(share_depths, reduction):
    """The gradient that drawing from the space has on average; what is never drawn is not run."""
    listed = [Submodel(width=8, depth=d) for d in (3, 1, 2)] + [Submodel(width=3, depth=1)]
    chances = [0.5, 0.0, 0.2, 0.3]
    space = SubmodelSpace.of(listed, weights=chances)
    assert [space.probability(submodel) for submodel in listed] == chances
    assert space.probability(Submodel(width=16, depth=3)) == 0
    model = Net().double()
    objective = Summation(space, reduction=reduction, share_depths=share_depths)
    mean_loss = objective(model, BATCH)
    assert objective.last_submodels == [listed[0], listed[2], listed[3]]
    factor = 3 if reduction == "sum" else 1

    def expected(params):
        pairs = zip(listed, chances, strict=True)
        return factor * sum(chance * label_loss(params, submodel) for submodel, chance in pairs)

    assert_gradients(model, hand_written_gradients(model, expected))
    losses = [label_loss(leaves(model), submodel) for submodel in objective.last_submodels]
    torch.testing.assert_close(mean_loss, torch.stack(losses).mean().detach())


def test_probabilities_of_a_product_space():
    space = SubmodelSpace(weights={"width": [3, 1]}, width=[8, 16], depth=[1, 2, 3])
    assert space.probability(Submodel(width=8, depth=2)) == pytest.approx(0.25)
    assert space.probability(Submodel(width=16, depth=3)) == pytest.approx(1 / 12)
    assert space.probability(Submodel(width=9, depth=3)) == 0
    assert sum(map(space.probability, space)) == pytest.approx(1)


@pytest.mark.parametrize("kind", [Stochastic, StochasticSummation, Sandwich])
def test_draws_depend_on_the_seed_and_go_on_from_a_saved_state(kind):
    objective = kind(SPACE, seed=7)
    first = [objective.choose() for _ in range(5)]
    state = objective.state_dict()
    rest = [objective.choose() for _ in range(20)]
    assert [kind(SPACE, seed=7).choose() for _ in range(1)] == first[:1]
    other = kind(SPACE, seed=8)
    assert [other.choose() for _ in range(20)] != rest
    other.load_state_dict(state)
    assert [other.choose() for _ in range(20)] == rest


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Stochastic(SPACE).choose()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [Stochastic, StochasticSummation, Summation, Sandwich])
def test_the_active_submodel_is_put_back(kind):
    model, before = Net().double(), Submodel(width=5, depth=2)
    activate(model, before)
    kind(SPACE)(model, BATCH)
    assert current(model) == before

    def broken(logits, targets):
        raise RuntimeError("broken loss")

    with pytest.raises(RuntimeError, match="broken loss"):
        kind(SPACE, loss=broken)(model, BATCH)
    assert current(model) == before


def test_own_loss_and_forward():
    seen = []

    def forward(model, batch):
        seen.append(current(model))
        return model(batch["x"]), batch["y"]

    model = Net().double()
    objective = Stochastic(SPACE, forward=forward, loss=F.mse_loss, seed=1)
    target = torch.randn(7, CLASSES, dtype=torch.float64)
    loss = objective(model, {"x": BATCH[0], "y": target})
    assert seen == objective.last_submodels
    by_hand = F.mse_loss(sliced_logits(leaves(model), seen[0], BATCH[0]), target)
    torch.testing.assert_close(loss, by_hand.detach())


@pytest.mark.parametrize("n", [1, 0, -3, 2.0, True, "4"])
def test_bad_n(n):
    with pytest.raises(OptionError, match=r"n is .*at least 2"):
        Sandwich(SPACE, n=n)


@pytest.mark.parametrize("kind", [Stochastic, StochasticSummation, Summation, Sandwich])
@pytest.mark.parametrize("space", [[], None, [Submodel(width=3)]], ids=["empty", "none", "list"])
def test_what_is_no_space(kind, space):
    with pytest.raises(SpaceError, match="SubmodelSpace"):
        kind(space)


def test_other_bad_options():
    with pytest.raises(SpaceError, match="at least 2"):
        Sandwich(SubmodelSpace(width=[16]))
    with pytest.raises(OptionError, match="reduction is 'max'"):
        Summation(SPACE, reduction="max")
    with pytest.raises(CheckpointError, match="'nonsense'"):
        Stochastic(SPACE).load_state_dict({"nonsense": 1})


@pytest.mark.parametrize(
    "space", [SubmodelSpace(height=[1]), SubmodelSpace(width=[17])], ids=["unknown", "too-large"]
)
def test_a_space_that_does_not_fit_the_model(space):
    model = Net().double()
    with pytest.raises(DimensionError, match="height|width"):
        Stochastic(space)(model, BATCH)
    assert current(model) == Submodel(width=16, depth=3)
