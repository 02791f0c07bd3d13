"""Functional ops against the float64 oracle: sizes, dtypes, layouts, poison, second derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sorted_kernels as sk
from support.oracle import DTYPES, EMBEDDING, FAMILIES, TRAINED, assert_outcome, judged, outcome
from support.poison import assert_same_bits, in_larger_buffer, poisoned, prefix, transposed

families = pytest.mark.parametrize("family", FAMILIES, ids=str)
all_families = pytest.mark.parametrize("family", [*FAMILIES, EMBEDDING], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@st.composite
def sizes(draw):
    """``(M, K, m, k, leading)``: odd and even, 1, full."""
    full = draw(st.integers(1, 19)), draw(st.integers(1, 37))
    block = tuple(draw(st.one_of(st.just(1), st.just(n), st.integers(1, n))) for n in full)
    leading = draw(st.sampled_from([(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 2)]))
    return *full, *block, leading


def make(family, dtype, M, K, m, k, leading):
    """Input, blocks, NaN-poisoned parents and a random upstream gradient."""
    blocks = family.parameters(m, k, dtype)
    full = family.shapes(M, K)
    if family is EMBEDDING:
        blocks = family.parameters(M, k, dtype)
    parents = {name: poisoned(block, full[name]) for name, block in blocks.items()}
    x = family.input((*leading, k), M, dtype)
    width = m if family.name.startswith("linear") else k
    return x, blocks, parents, torch.randn(*leading, width).to(dtype)


def ours(family, m, k):
    if family is EMBEDDING:
        return lambda x, p: sk.embedding(x, p["weight"], features=k)
    return lambda x, p: family.ours(x, p, m)


@all_families
@dtypes
@settings(max_examples=25)
@given(size=sizes(), seed=st.integers(0, 99))
def test_matches_oracle_with_poison_outside_the_block(family, dtype, size, seed):
    M, K, m, k, leading = size
    torch.manual_seed(seed)
    x, blocks, parents, dy = make(family, dtype, M, K, m, k, leading)
    actual = outcome(ours(family, m, k), x, parents, dy)
    assert_outcome(actual, *judged(family, x, blocks, dy), what=f"{size}")


@families
@dtypes
@pytest.mark.parametrize(
    "form", ["x-cut", "x-transposed", "dy-cut", "dy-transposed", "dy-expanded"]
)
def test_any_layout_of_inputs(family, dtype, form):
    x, blocks, parents, dy = make(family, dtype, 12, 17, 7, 11, (3, 5))
    if form == "dy-expanded":
        dy = torch.randn(1, 1, dy.shape[-1]).to(dtype).expand_as(dy)
    which, layout = form.split("-")
    change = {"cut": in_larger_buffer, "transposed": transposed, "expanded": lambda t: t}[layout]
    given_x, given_dy = (change(x), dy) if which == "x" else (x, change(dy))
    actual = outcome(ours(family, 7, 11), given_x, parents, given_dy)
    assert_outcome(actual, *judged(family, x, blocks, dy), what=form)


def test_embedding_takes_int32_and_any_layout():
    indices = torch.randint(9, (4, 3))
    weight = torch.randn(9, 6)
    expected = weight[indices][..., :5]
    for form in (indices.int(), indices.T.contiguous().T, indices.expand(2, 4, 3)):
        assert_same_bits(
            sk.embedding(form, weight, features=5), expected.expand(*form.shape, 5).contiguous()
        )


@all_families
@dtypes
def test_prefix_view_and_contiguous_copy_give_the_same_bits(family, dtype):
    x, blocks, parents, dy = make(family, dtype, 24, 40, 13, 27, (9,))
    views = {name: in_larger_buffer(parent) for name, parent in parents.items()}
    copy, view, cut = (outcome(ours(family, 13, 27), x, p, dy) for p in (blocks, parents, views))
    for other in (view, cut):
        assert_same_bits(other.y, copy.y)
        if copy.dx is not None:
            assert_same_bits(other.dx, copy.dx)
        for name, gradient in copy.gradients.items():
            found = other.gradients[name][prefix(gradient.shape)]
            assert_same_bits(found.contiguous(), gradient)


@all_families
def test_inputs_and_parameters_are_not_changed(family):
    x, blocks, parents, dy = make(family, torch.float32, 12, 17, 7, 11, (3,))
    before = [tensor.clone() for tensor in (x, dy, *parents.values())]
    outcome(ours(family, 7, 11), x, parents, dy)
    for tensor, old in zip((x, dy, *parents.values()), before, strict=True):
        assert_same_bits(tensor, old)


@pytest.mark.parametrize("family", [*FAMILIES, EMBEDDING], ids=str)
@pytest.mark.parametrize("leading", [(), (2, 2)], ids=["vector", "batch"])
def test_first_and_second_derivatives(family, leading):
    x, blocks, _, _ = make(family, torch.float64, 4, 5, 3, 4, leading)
    parents = [
        torch.nn.functional.pad(block, [0, 1] * block.dim()).requires_grad_()
        for block in blocks.values()
    ]
    if family is EMBEDDING:
        call = lambda *p: sk.embedding(x, *p, features=4)  # noqa: E731
        inputs = parents
    else:
        call = lambda x, *p: family.ours(x, dict(zip(blocks, p, strict=True)), 3)  # noqa: E731
        inputs = [x.requires_grad_(), *parents]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("family", TRAINED, ids=str)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_wanted_gradients(family, wanted):
    """Each input alone: what needs no gradient gets none, and the rest is right."""
    if wanted == "bias" and "bias" not in family.shapes(1, 1):
        wanted = "weight"
    if wanted == "x" and family.indices:
        wanted = "weight"
    x, blocks, parents, dy = make(family, torch.float32, 12, 17, 7, 11, (3,))
    plain, exact = judged(family, x, blocks, dy)
    leaf = x.detach().requires_grad_() if wanted == "x" else x.detach()
    leaves = {n: p.detach().requires_grad_(n == wanted) for n, p in parents.items()}
    ours(family, 7, 11)(leaf, leaves).backward(dy)
    grads = {"x": leaf.grad, **{n: p.grad for n, p in leaves.items()}}
    assert [name for name, grad in grads.items() if grad is not None] == [wanted]
    reference = exact.dx if wanted == "x" else exact.gradients[wanted]
    torch.testing.assert_close(
        grads[wanted][prefix(reference.shape)].double(), reference, rtol=1e-5, atol=1e-5
    )


def test_embedding_padding_row_gets_no_gradient():
    indices = torch.tensor([[0, 2], [2, 4]])
    for padding, row in ((2, 2), (-1, 4), (-5, 0)):
        weight, stock = (torch.ones(5, 3, requires_grad=True) for _ in range(2))
        dy = torch.randn(2, 2, 2)
        sk.embedding(indices, weight, features=2, padding_idx=padding).backward(dy)
        torch.nn.functional.embedding(indices, stock, padding_idx=padding)[..., :2].backward(dy)
        assert not weight.grad[row].any()
        torch.testing.assert_close(weight.grad, stock.grad)


@all_families
def test_no_grad_gives_the_same_output(family):
    x, _, parents, dy = make(family, torch.float32, 12, 17, 7, 11, (3,))
    call = ours(family, 7, 11)
    with torch.no_grad():
        quiet = call(x, parents)
    with torch.inference_mode():
        quieter = call(x, parents)
    loud = outcome(call, x, parents, dy).y
    assert not quiet.requires_grad
    assert_same_bits(quiet, loud)
    assert_same_bits(quieter.clone(), loud)
