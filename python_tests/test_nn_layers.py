"""Elastic layers and lists as drop-in replacements of torch.nn's."""

import pytest
import torch

import sorted_kernels as sk
from support.oracle import DTYPES
from support.poison import assert_same_bits

PAIRS = {
    "linear": (lambda nn, d: nn.Linear(9, 7, dtype=d), (4, 9)),
    "linear-nobias": (lambda nn, d: nn.Linear(9, 7, False, dtype=d), (2, 3, 9)),
    "layer_norm": (lambda nn, d: nn.LayerNorm(9, 1e-3, dtype=d), (4, 9)),
    "layer_norm-nobias": (lambda nn, d: nn.LayerNorm([9], bias=False, dtype=d), (4, 9)),
    "layer_norm-plain": (lambda nn, d: nn.LayerNorm((9,), elementwise_affine=False), (9,)),
    "rms_norm": (lambda nn, d: nn.RMSNorm(9, 1e-3, dtype=d), (4, 9)),
    "rms_norm-default-eps": (lambda nn, d: nn.RMSNorm(9, dtype=d), (4, 9)),
    "rms_norm-plain": (lambda nn, d: nn.RMSNorm(9, elementwise_affine=False), (9,)),
    "embedding": (lambda nn, d: nn.Embedding(7, 9, dtype=d), None),
    "embedding-padding": (lambda nn, d: nn.Embedding(7, 9, padding_idx=-2, dtype=d), None),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_full_size_equals_torch(name, dtype):
    """Same constructor, same state_dict, same output; bit for bit where torch has one kernel."""
    make, shape = PAIRS[name]
    ours, stock = make(sk.nn, dtype), make(torch.nn, dtype)
    assert isinstance(ours, type(stock)) and list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        for param in stock.parameters():
            param.normal_()
    ours.load_state_dict(stock.state_dict())
    x = torch.randint(7, (4, 3)) if shape is None else torch.randn(shape).to(dtype) * 0.1
    y, expected = ours(x), stock(x)
    if name.startswith("rms"):  # torch's own formula rounds in another order
        torch.testing.assert_close(y, expected)
    else:
        assert_same_bits(y, expected)
    if list(stock.parameters()):
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
            rtol = 1e-5 if dtype == torch.float32 else 2e-2  # sums in another order
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rms_norm_default_eps_is_torchs_for_tiny_inputs(dtype):
    x = (torch.randn(4, 8) * 1e-3).to(dtype)
    torch.testing.assert_close(
        sk.nn.RMSNorm(8, dtype=dtype)(x), torch.nn.RMSNorm(8, dtype=dtype)(x)
    )


def test_fused_activation():
    for activation in ("relu", "gelu", "silu"):
        layer = sk.nn.Linear(9, 7, activation=activation)
        x = torch.randn(4, 9)
        z = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), getattr(torch.nn.functional, activation)(z))


def test_extra_repr():
    layer = sk.nn.Linear(9, 8, in_dim="w", out_dim=("h", 4))
    sk.activate(layer, sk.Submodel(w=3, h=1))
    assert layer.extra_repr() == (
        "in_features=9, out_features=8, bias=True, in=(w: 3 of 9), out=(h: 4 of 8)"
    )
    assert sk.nn.Linear(9, 8).extra_repr() == torch.nn.Linear(9, 8).extra_repr()
    assert sk.nn.Embedding(9, 8, dim="w").extra_repr() == "9, 8, features=(w: 8 of 8)"


def test_state_dict_is_complete_whatever_is_active():
    model = sk.models.elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sk.activate(model, sk.Submodel(depth=1, width=1))
    after = model.state_dict()
    assert list(after) == list(before) and len(list(model.parameters())) == len(before)
    for name, value in after.items():
        assert_same_bits(value, before[name])
    other = sk.models.elastic_residual_mlp(6, 16, 24, 3, 4, widths=8)
    sk.activate(other, sk.Submodel(depth=2, width=3))
    assert not other.load_state_dict(after).missing_keys
    sk.activate(other, sk.nn.current(model))
    x = torch.randn(5, 6)
    assert_same_bits(other(x), model(x))


def blocks(count=4):
    return [torch.nn.Linear(3, 3) for _ in range(count)]


def test_module_list_yields_the_active_prefix():
    given = blocks()
    listed = sk.nn.ModuleList(given, depth_dim="d")
    sk.activate(listed, sk.Submodel(d=3))
    assert len(listed) == 3 and list(listed) == given[:3]
    assert listed[0] is given[0] and listed[-1] is given[2] and listed[2] is given[2]
    assert list(listed[1:]) == given[1:3] and list(listed[:-1]) == given[:2]
    assert isinstance(listed[:2], torch.nn.ModuleList) and list(listed[::2]) == given[:3:2]
    assert list(reversed(listed)) == given[2::-1]
    assert [m for _, m in enumerate(listed)] == given[:3] and given[3] not in list(listed)
    with pytest.raises(IndexError):
        listed[3]
    assert len(list(listed.parameters())) == 8 and listed.all_blocks() == given


def test_sequential_runs_the_active_prefix():
    given = blocks()
    chain = sk.nn.Sequential(*given, depth_dim=("d", 2))
    x = torch.randn(2, 3)
    for depth, expected in ((1, 2), (2, 2), (3, 4), (4, 4)):
        sk.activate(chain, sk.Submodel(d=depth))
        assert len(chain) == expected
        y = x
        for block in given[:expected]:
            y = block(y)
        assert_same_bits(chain(x), y)
    assert_same_bits(chain[1:3](x), given[2](given[1](x)))
    assert isinstance(chain[1:3], torch.nn.Sequential)


@pytest.mark.parametrize("kind", ["list", "sequential"])
def test_changing_a_list_sees_every_block(kind):
    given, extra = blocks(), blocks()
    made = (
        sk.nn.ModuleList(given, depth_dim="d")
        if kind == "list"
        else sk.nn.Sequential(*given, depth_dim="d")
    )
    sk.activate(made, sk.Submodel(d=2))
    made.append(extra[0])
    assert made.all_blocks() == [*given, extra[0]] and len(made) == 5
    made.extend([extra[1]])
    made.insert(0, extra[2])
    made[1] = extra[3]
    del made[2]
    expected = [extra[2], extra[3], *given[2:], extra[0], extra[1]]
    assert made.all_blocks() == expected and list(made) == expected
    assert made.pop(-1) is extra[1] and len(made) == 5
    assert list(made._modules) == [str(i) for i in range(5)]


def test_a_list_may_start_empty():
    made = sk.nn.ModuleList(depth_dim=("d", 2))
    assert len(made) == 0 and made.axes == {}
    for block in blocks():
        made.append(block)
    made += blocks(2)
    assert sk.nn.dimensions(made) == {"d": 6}
    sk.activate(made, sk.Submodel(d=3))
    assert len(made) == 4


def test_play_replaces_the_blocks_for_a_while():
    given, other = blocks(), blocks(2)
    made = sk.nn.ModuleList(given, depth_dim="d")
    with pytest.raises(KeyError), made.play(other):
        assert list(made) == other and len(made) == 2
        raise KeyError
    assert list(made) == given


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: sk.nn.Linear(9, 7, in_dim="w"), (4, 9)),
        (lambda: sk.nn.LayerNorm(9, dim="w"), (4, 9)),
        (lambda: sk.nn.RMSNorm(9, dim="w"), (4, 9)),
    ],
    ids=["linear", "layer_norm", "rms_norm"],
)
def test_the_input_has_the_active_width(layer, x):
    made = layer()
    sk.activate(made, sk.Submodel(w=5))
    with pytest.raises(sk.ShapeError, match=r"shape \(4, 9\).* 5 of 9 \(dimension 'w'\)"):
        made(torch.randn(x))
    with pytest.raises(sk.ShapeError, match=r"shape \(\)"):
        made(torch.tensor(1.0))
    with pytest.raises(sk.ShapeError, match=r"shape \(4, 1\)"):  # nor is it broadcast
        made(torch.randn(4, 1))
    sk.activate(made, sk.Submodel(w=1))
    with pytest.raises(sk.ShapeError, match=r"shape \(4, 9\)"):
        made(torch.randn(x))
    with pytest.raises(sk.DTypeError, match="int64"):
        made(torch.ones(4, 1, dtype=torch.int64))
