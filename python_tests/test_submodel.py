"""Sub-models and spaces: identity, order, copies, weights, sampling."""

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sorted_kernels as sk
from sorted_kernels import Submodel, SubmodelSpace
from sorted_kernels.submodel import parse_size, probabilities

sizes = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9), min_size=1)


@given(sizes, sizes)
def test_equality_hash_and_order_follow_the_sizes(a, b):
    x, y = Submodel(**a), Submodel(**b)
    assert (x == y) == (a == b)
    assert x != y or hash(x) == hash(y)
    assert (x < y) == (sorted(a.items()) < sorted(b.items()))
    assert (x <= y) == (x < y or x == y)
    assert Submodel(**dict(reversed(a.items()))) == x


@given(sizes)
def test_mapping_and_attributes(a):
    submodel = Submodel(**a)
    assert dict(submodel) == a and list(submodel) == list(a) and len(submodel) == len(a)
    assert all(getattr(submodel, name) == submodel[name] == size for name, size in a.items())
    assert "zzz" not in submodel and submodel.get("zzz", 7) == 7


def test_frozen():
    submodel = Submodel(depth=8)
    with pytest.raises(AttributeError, match="frozen"):
        submodel.depth = 4
    with pytest.raises(AttributeError, match="frozen"):
        submodel.other = 4
    with pytest.raises(TypeError):
        submodel["depth"] = 4
    with pytest.raises(AttributeError, match="no dimension 'width'"):
        submodel.width  # noqa: B018


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_equal(clone):
    submodel = Submodel(depth=8, hidden=384)
    twin = clone(submodel)
    assert twin == submodel and hash(twin) == hash(submodel) and list(twin) == ["depth", "hidden"]


def test_replace_and_fits_in():
    submodel = Submodel(depth=8, hidden=384)
    assert submodel.replace(depth=4) == Submodel(depth=4, hidden=384)
    assert submodel.replace(rank=2) == Submodel(depth=8, hidden=384, rank=2)
    assert submodel == Submodel(depth=8, hidden=384)
    assert submodel.fits_in(Submodel(depth=8, hidden=512)) and submodel.fits_in(submodel)
    assert not submodel.fits_in(Submodel(depth=7, hidden=512))
    assert not submodel.fits_in(Submodel(depth=8))


def test_repr_can_be_evaluated():
    submodel = Submodel(depth=8, hidden=384)
    assert repr(submodel) == "Submodel(depth=8, hidden=384)" and eval(repr(submodel)) == submodel


def test_product_space():
    space = SubmodelSpace(depth=[12, 4, 8], hidden=range(192, 385, 192))
    assert space.dimensions == {"depth": (4, 8, 12), "hidden": (192, 384)}
    listed = [Submodel(depth=d, hidden=h) for d in (4, 8, 12) for h in (192, 384)]
    assert list(space) == listed and len(space) == 6 and list(space) == listed
    assert space.smallest == listed[0] and space.largest == listed[-1]
    assert all(s in space for s in listed)
    assert Submodel(depth=5, hidden=192) not in space and Submodel(depth=4) not in space
    assert Submodel(depth=4, hidden=192, rank=1) not in space and "depth" not in space
    assert repr(space) == "SubmodelSpace(depth=[4, 8, 12], hidden=[192, 384])"


def test_listed_space():
    listed = [Submodel(depth=8, hidden=1), Submodel(depth=2, hidden=5), Submodel(depth=2, hidden=3)]
    space = SubmodelSpace.of(iter(listed))
    assert list(space) == sorted(listed) and len(space) == 3
    assert space.dimensions == {"depth": (2, 8), "hidden": (1, 3, 5)}
    assert space.smallest == listed[2] and space.largest == listed[0]
    assert listed[1] in space and Submodel(depth=8, hidden=3) not in space
    assert repr(space) == "SubmodelSpace.of(<3 sub-models>)"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("uniform", [1 / 4] * 4),
        ("geometric", [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        ("geometric:0.1", [1000 / 1111, 100 / 1111, 10 / 1111, 1 / 1111]),
        ("geometric:1", [1 / 4] * 4),
        ([3, 0, 1, 4], [3 / 8, 0, 1 / 8, 1 / 2]),
    ],
    ids=str,
)
def test_probabilities(weights, expected):
    assert probabilities(weights, 4) == pytest.approx(expected)


def frequencies(space, draws=4000):
    generator = torch.Generator().manual_seed(7)
    counts = Counter(space.sample(generator) for _ in range(draws))
    return {submodel: count / draws for submodel, count in counts.items()}


def expected_product(weights, **dimensions):
    names = list(dimensions)
    shares = {name: dict(zip(dimensions[name], weights[name], strict=True)) for name in names}
    for values in itertools.product(*dimensions.values()):
        share = 1.0
        for name, value in zip(names, values, strict=True):
            share *= shares[name][value]
        yield Submodel(**dict(zip(names, values, strict=True))), share


@pytest.mark.parametrize(
    ("option", "shares"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("geometric", [4 / 7, 2 / 7, 1 / 7]),
        ([0.5, 0.0, 0.5], [0.5, 0.0, 0.5]),
        ([0, 0, 1], [0, 0, 1]),
        ([1, 0, 0], [1, 0, 0]),
    ],
    ids=str,
)
def test_sampling_frequencies(option, shares):
    space = SubmodelSpace(weights={"depth": option}, depth=[1, 2, 3], hidden=[5, 6])
    found = frequencies(space)
    wanted = dict(
        expected_product({"depth": shares, "hidden": [0.5] * 2}, depth=[1, 2, 3], hidden=[5, 6])
    )
    for submodel, share in wanted.items():
        assert found.get(submodel, 0) == pytest.approx(share, abs=0.03), submodel
        assert (submodel in found) == (share > 0)


def test_weights_follow_the_order_in_which_sizes_were_given():
    space = SubmodelSpace(weights={"depth": [1, 0, 0]}, depth=[8, 2, 4])
    assert set(frequencies(space, 50)) == {Submodel(depth=8)}
    named = SubmodelSpace(weights={"depth": "geometric:0.001"}, depth=[8, 2, 4])
    assert frequencies(named, 500)[Submodel(depth=2)] > 0.97
    listed = [Submodel(depth=8), Submodel(depth=2)]
    assert set(frequencies(SubmodelSpace.of(listed, weights=[1, 0]), 50)) == {listed[0]}
    assert frequencies(SubmodelSpace.of(listed, weights="geometric:0.001"), 500)[listed[1]] > 0.97


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone():
    space = SubmodelSpace(depth=range(1, 50), hidden=range(1, 50))
    state = torch.get_rng_state()
    first, second = (
        [space.sample(generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(3) for _ in range(2))
    )
    assert first == second and len(set(first)) > 15
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert [space.sample() for _ in range(20)] == first


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_probabilities_sum_to_one(weights):
    found = probabilities(weights, len(weights))
    assert sum(found) == pytest.approx(1)
    assert all((p == 0) == (w == 0) or w < 1e-300 for p, w in zip(found, weights, strict=True))


def test_one_size_a_block():
    mixed = Submodel(depth=2, ffn=(5, 9))
    assert mixed.ffn == (5, 9) and mixed == Submodel(ffn=[5, 9], depth=2)
    assert hash(mixed) == hash(Submodel(depth=2, ffn=(5, 9))) and mixed != Submodel(depth=2, ffn=7)
    assert str(mixed) == "depth=2, ffn=(5, 9)" and eval(repr(mixed)) == mixed
    assert pickle.loads(pickle.dumps(mixed)) == mixed
    same_depth = [Submodel(ffn=f) for f in (6, (5, 8), 7, (5, 9), (7, 7), (6, 9), 8)]
    shuffled = [same_depth[i] for i in (4, 1, 6, 0, 5, 3, 2)]
    assert sorted(shuffled) == same_depth


@pytest.mark.parametrize(
    ("part", "whole", "fits"),
    [
        ((3, 4), (3, 5), True), ((3, 4), (5, 3), False), ((3,), (3, 5), True),
        ((3, 4, 1), (9, 9), False), ((3, 4), 4, True), ((3, 4), 3, False), (3, (3, 4), True),
        (4, (3, 4), False),
    ],
)  # fmt: skip
def test_sizes_by_block_fit_in(part, whole, fits):
    assert Submodel(ffn=part).fits_in(Submodel(ffn=whole)) is fits


@pytest.mark.parametrize("size", [(), (0,), (3, 1.0), (2, True), (1, (2,)), "12", [3, None]])
def test_wrong_sizes_by_block(size):
    with pytest.raises(sk.DimensionError, match="a tuple of one for each block"):
        Submodel(ffn=size)


def test_a_space_of_sizes_by_block():
    space = SubmodelSpace(depth=[2], ffn=[(5, 9), 3, (5, 8)])
    assert space.dimensions["ffn"] == (3, (5, 8), (5, 9)) and space.largest.ffn == (5, 9)
    assert Submodel(depth=2, ffn=(5, 8)) in space
    listed = SubmodelSpace.of([Submodel(ffn=(5, 9)), Submodel(ffn=2)])
    assert listed.largest.ffn == (5, 9) and list(listed)[0].ffn == 2


@pytest.mark.parametrize("size", [7, (5, 9), (5,), (1, 2, 3)])
def test_sizes_are_read_back(size):
    assert parse_size(str(size)) == size


@pytest.mark.parametrize("text", ["", "()", "(,)", "3,4", "(3,,4)", "-1", "3.0", "(3", "x"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(sk.DimensionError, match=r"is not like 768 or \(1536, 768\)"):
        parse_size(text)
