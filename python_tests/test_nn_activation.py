"""Switching between sub-models: axes, dimensions, nesting, exceptions, and no allocation."""

import copy
import gc
import tracemalloc

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.nn.axis import ElasticAxis


@pytest.fixture
def model():
    return elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)


def axes_of(model):
    return {
        f"{path}.{name}": axis.active
        for path, module in model.named_modules()
        for name, axis in getattr(module, "axes", {}).items()
        if axis.dimension
    }


def test_dimensions_and_current(model):
    assert sk.nn.dimensions(model) == {"width": 8, "depth": 3}
    assert sk.nn.current(model) == sk.Submodel(depth=3, width=8)


def test_activate_sets_every_axis_in_proportion(model):
    sk.activate(model, sk.Submodel(depth=2, width=3))
    assert sk.nn.current(model) == sk.Submodel(depth=2, width=3)
    found = axes_of(model)
    assert found["blocks.depth"] == 2 and found["stem.out"] == 6 and found["head.in"] == 6
    for i in range(
        3
    ):  # inactive blocks follow too: a depth change alone must not need a second look
        assert found[f"blocks.{i}.fc1.out"] == 9 and found[f"blocks.{i}.fc2.in"] == 9
        assert found[f"blocks.{i}.norm.features"] == 6
    assert model(torch.randn(5, 6)).shape == (5, 4)


def test_a_dimension_that_is_not_named_is_full(model):
    sk.activate(model, sk.Submodel(depth=2, width=3))
    sk.activate(model, sk.Submodel(width=4))
    assert len(model.blocks) == 3 and axes_of(model)["stem.out"] == 8


def test_active_nests_and_restores_after_exceptions(model):
    outer, inner = sk.Submodel(depth=2, width=3), sk.Submodel(depth=1, width=1)
    start = axes_of(model)
    with pytest.raises(KeyError), sk.active(model, outer) as same:
        assert same is model
        at_outer = axes_of(model)
        with sk.active(model, inner):
            assert sk.nn.current(model) == inner
            sk.activate(model, sk.Submodel(depth=3, width=2))  # also undone
        assert sk.nn.current(model) == outer and axes_of(model) == at_outer
        raise KeyError
    assert axes_of(model) == start and sk.nn.current(model) == sk.Submodel(depth=3, width=8)


def test_a_part_activated_meanwhile_is_set_again(model):
    other = elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)
    submodel = sk.Submodel(depth=2, width=3)
    sk.activate(model, submodel)
    wanted = axes_of(model)
    for part in (model.stem, model.blocks[1].norm):
        sk.activate(part, sk.Submodel(width=1))
        assert axes_of(model) != wanted
        sk.activate(model, submodel)
        assert axes_of(model) == wanted
    sk.activate(other, sk.Submodel(depth=1, width=1))
    sk.activate(model, submodel.replace(depth=1))
    assert axes_of(model) == {**wanted, "blocks.depth": 1}
    assert axes_of(other)["stem.out"] == 2


def test_a_copy_is_activated_by_itself(model):
    sk.activate(model, sk.Submodel(depth=2, width=3))
    wanted, copied = axes_of(model), copy.deepcopy(model)
    sk.activate(copied, sk.Submodel(depth=2, width=5))
    assert axes_of(model) == wanted and axes_of(copied)["stem.out"] == 10
    sk.activate(model, sk.Submodel(depth=3, width=3))
    assert axes_of(copied)["blocks.depth"] == 2 and axes_of(model)["blocks.depth"] == 3


@pytest.mark.parametrize(
    "wrong",
    [{"widht": 3}, {"depth": 4}, {"width": 9, "depth": 1}, {"depth": 1, "rank": 1}],
    ids=str,
)
def test_a_wrong_submodel_changes_nothing(model, wrong):
    sk.activate(model, sk.Submodel(depth=2, width=3))
    before = axes_of(model)
    with pytest.raises(sk.DimensionError):
        sk.activate(model, sk.Submodel(**wrong))
    with pytest.raises(sk.DimensionError), sk.active(model, sk.Submodel(**wrong)):
        pass
    assert axes_of(model) == before and sk.nn.current(model) == sk.Submodel(depth=2, width=3)


@pytest.mark.parametrize(
    ("full", "step", "of", "expected"),
    [
        (16, 1, 100, {50: 8, 1: 1, 100: 16, 99: 16, 7: 2, 6: 1}),
        (64, 8, 100, {50: 32, 1: 8, 13: 16, 100: 64}),
        (20, 8, 20, {1: 8, 8: 8, 9: 16, 17: 20, 20: 20}),
        (5, 1, 2, {1: 3, 2: 5}),
        (3, 1, 8, {1: 1, 3: 2, 4: 2, 8: 3}),
    ],
)
def test_proportion_rounds_up_to_multiples(full, step, of, expected):
    axis = ElasticAxis(("d", step), full)
    assert {count: axis.scaled(count, of) for count in expected} == expected


def test_multiples_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Linear(24, 5))
    sk.elasticize(model, {"0": {"out": ("d", 8)}, "1": {"in": ("d", 8)}})
    for count, expected in ((1, 8), (8, 8), (9, 16), (24, 24)):
        sk.activate(model, sk.Submodel(d=count))
        assert model[0](torch.randn(2, 6)).shape[-1] == expected
        assert model(torch.randn(2, 6)).shape == (2, 5)
        assert sk.nn.current(model).d == count


def test_a_plan_made_late_knows_what_is_active(model):
    sk.activate(model, sk.Submodel(depth=2, width=4))
    assert sk.nn.current(model.norm) == sk.Submodel(width=8)  # of its own 16
    with sk.active(model.norm, sk.Submodel(width=1)):
        assert model.norm(torch.randn(3, 1)).shape == (3, 1)
    assert model.norm.features_axis.active == 8
    assert model(torch.randn(5, 6)).shape == (5, 4)


def test_one_layer_can_be_activated():
    layer = sk.nn.Linear(8, 6, in_dim="i", out_dim="o")
    sk.activate(layer, sk.Submodel(i=5, o=2))
    assert layer(torch.randn(3, 5)).shape == (3, 2)
    assert "in=(i: 5 of 8), out=(o: 2 of 6)" in repr(layer)


def test_declared_sizes_of_a_models_own():
    class Declared(torch.nn.Module):
        dimensions = {"width": 4}

        def __init__(self):
            super().__init__()
            self.a = sk.nn.Linear(6, 16, out_dim="width")
            self.b = sk.nn.Linear(16, 8, in_dim="width")

    model = Declared()
    sk.activate(model, sk.Submodel(width=1))
    assert (model.a.out_axis.active, model.b.in_axis.active) == (4, 4)
    model = Declared()
    model.b.dimensions = {"width": 5}
    with pytest.raises(sk.DimensionError, match=r"'width' is declared as 4 and, by b, as 5"):
        sk.nn.dimensions(model)


def test_axes_that_disagree_need_a_declaration():
    model = torch.nn.Sequential(sk.nn.Linear(6, 16, out_dim="w"), sk.nn.Linear(12, 8, in_dim="w"))
    with pytest.raises(sk.DimensionError, match=r"0\.out has 16, 1\.in has 12.*dimensions="):
        sk.activate(model, sk.Submodel(w=3))


def test_a_model_without_dimensions():
    with pytest.raises(sk.DimensionError, match="no elastic dimension"):
        sk.nn.current(torch.nn.Linear(3, 3))
    with pytest.raises(sk.DimensionError, match="'w' is unknown"):
        sk.activate(torch.nn.Linear(3, 3), sk.Submodel(w=3))


def test_switching_allocates_nothing(monkeypatch):
    """After a first round over 96 sub-models, only integers and shared probes are assigned."""
    model = elastic_residual_mlp(6, 16, 16, 12, 4, widths=8)
    space = list(sk.SubmodelSpace(depth=range(1, 13), width=range(1, 9)))
    assert len(space) == 96
    for submodel in space:
        sk.activate(model, submodel)
    versions = [param._version for param in model.parameters()]
    made = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(args))
    gc.collect()
    tracemalloc.start()
    try:
        for submodel in space:  # the tracer's own first allocations
            sk.activate(model, submodel)
        before = tracemalloc.take_snapshot()
        for submodel in space:
            sk.activate(model, submodel)
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    grown = [
        entry
        for entry in after.compare_to(before, "filename")
        if entry.size_diff > 0 and "sorted_kernels" in entry.traceback[0].filename
    ]
    assert grown == [] and made == []
    assert [param._version for param in model.parameters()] == versions


def test_one_size_a_block():
    model = sk.models.ResidualMLP(6, 16, 24, 3, 4)
    sk.elasticize(
        model,
        {
            "blocks": {"depth": "depth"},
            "blocks.*.fc1": {"out": "ffn"},
            "blocks.*.fc2": {"in": "ffn"},
        },
    )
    x = torch.randn(5, 6)
    sk.activate(model, sk.Submodel(depth=2, ffn=(5, 9)))
    assert [axes_of(model)[f"blocks.{i}.fc1.out"] for i in range(2)] == [5, 9]
    mixed = sk.export(model, sk.Submodel(depth=2, ffn=(5, 9)))
    assert [block.fc2.in_features for block in mixed.blocks] == [5, 9]
    torch.testing.assert_close(mixed(x), model(x))
    sk.activate(model, sk.Submodel(depth=2, ffn=(9, 5)))
    assert axes_of(model)["blocks.0.fc1.out"] == 9
    sk.activate(model, sk.Submodel(ffn=24))
    assert [block.fc1.out_axis.active for block in model.blocks] == [24] * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn": (5, 9)}, r"ffn=\(5, 9\) has 2 sizes; 'blocks' has 3 active blocks"),
        ({"depth": 1, "ffn": (5, 9)}, "'blocks' has 1 active blocks"),
        ({"depth": 2, "ffn": (5, 25)}, r"ffn=\(5, 25\) is not in 1\.\.24"),
        ({"depth": (1, 1, 1)}, r"not all axes of 'depth' lie in the blocks"),
        ({"hidden": (16, 16, 16)}, r"not all axes of 'hidden' lie in the blocks"),
    ],
)
def test_sizes_by_block_that_do_not_fit(sizes, message):
    model = sk.models.ResidualMLP(6, 16, 24, 3, 4)
    rules = {
        "blocks": {"depth": "depth"}, "blocks.*.fc1": {"out": "ffn", "in": "hidden"},
        "blocks.*.fc2": {"in": "ffn"}, "head": {"in": "hidden"},
    }  # fmt: skip
    sk.elasticize(model, rules)
    before = axes_of(model)
    with pytest.raises(sk.DimensionError, match=message):
        sk.activate(model, sk.Submodel(**sizes))
    assert axes_of(model) == before
