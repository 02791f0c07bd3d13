"""MultiheadAttention: torch's at full size, heads and features by dimension, gradients, export."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from support.attention import Problem, exact
from support.poison import assert_same_bits

E, H, D = 24, 6, 5
SUBMODELS = [sk.Submodel(hidden=h, heads=n) for h, n in ((24, 6), (7, 1), (13, 3), (24, 2), (1, 5))]
submodels = pytest.mark.parametrize("submodel", SUBMODELS, ids=str)
kinds = pytest.mark.parametrize("kv_heads", [6, 3], ids=["heads", "groups"])


def layer(kv_heads=H, **options):
    torch.manual_seed(0)
    made = sk.nn.MultiheadAttention(E, H, kv_heads, D, dim="hidden", heads_dim="heads", **options)
    with torch.no_grad():
        for param in made.parameters():
            param.normal_(std=0.3)
    return made


def by_hand(model, submodel, query, key, value, mask=None, causal=False):
    """The float64 definition on the blocks of the weights."""
    group = H // model.num_kv_heads
    heads = -(-submodel.heads // group) * group
    hidden = submodel.hidden

    def project(linear, x, heads):
        weight, bias = linear.weight[: heads * D, :hidden], linear.bias[: heads * D]
        return (x @ weight.T + bias).unflatten(-1, (heads, D)).transpose(1, 2)

    q = project(model.q_proj, query, heads)
    k = project(model.k_proj, key, heads // group)
    v = project(model.v_proj, value, heads // group)
    p = Problem("", *q.shape[:2], group, q.shape[2], k.shape[2], D, causal=causal)
    y = exact(q, k, v, mask, p).transpose(1, 2).flatten(2)
    return y @ model.out_proj.weight[:hidden, : heads * D].T + model.out_proj.bias[:hidden]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "rows-first"])
def test_full_size_equals_torch(bias, batch_first):
    ours = sk.nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first)
    stock = torch.nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first)
    with torch.no_grad():
        for param in stock.parameters():
            param.normal_(std=0.3)
        for i, part in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            part.weight.copy_(stock.in_proj_weight[i * E : (i + 1) * E])
            if bias:
                part.bias.copy_(stock.in_proj_bias[i * E : (i + 1) * E])
        ours.out_proj.load_state_dict(stock.out_proj.state_dict())
    shapes = [(2, 5), (2, 7), (2, 7)]
    inputs = [torch.randn(*(s if batch_first else s[::-1]), E) for s in shapes]
    mask = torch.rand(5, 7) < 0.5
    mask[:, 0] = True
    for allowed in (None, mask):
        leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
        y = ours(*leaves[0], mask=allowed)
        not_allowed = None if allowed is None else ~allowed  # torch's mask says what not to do
        expected, _ = stock(*leaves[1], attn_mask=not_allowed, need_weights=False)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        for mine, theirs in zip(*leaves, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    weights = [part.weight.grad for part in (ours.q_proj, ours.k_proj, ours.v_proj)]
    torch.testing.assert_close(torch.cat(weights), stock.in_proj_weight.grad)


def test_initialised_as_torchs():
    """By its bounds: Xavier uniform of each projection, biases zero."""
    made = sk.nn.MultiheadAttention(64, 8, 2)
    for part in (made.q_proj, made.k_proj, made.v_proj):
        bound = (6 / (part.in_features + part.out_features)) ** 0.5
        assert 0.9 * bound < part.weight.abs().max() <= bound
    assert not any(part.bias.any() for part in (made.q_proj, made.k_proj, made.out_proj))


@submodels
@kinds
@pytest.mark.parametrize("rule", ["plain", "cross", "causal", "padding"])
def test_submodels_compute_with_their_blocks(submodel, kv_heads, rule):
    model = layer(kv_heads, dtype=torch.float64)
    query = torch.randn(2, 5, submodel.hidden, dtype=torch.float64)
    key = torch.randn(2, 8, submodel.hidden, dtype=torch.float64) if rule == "cross" else query
    mask = torch.tensor([[True] * 5, [False] * 3 + [True] * 2]).view(2, 1, 1, 5)
    options = {"causal": {"causal": True}, "padding": {"mask": mask, "causal": True}}.get(rule, {})
    with sk.active(model, submodel):
        y = model(query, key, **options) if rule == "cross" else model(query, **options)
    expected = by_hand(model, submodel, query, key, key, **options)
    torch.testing.assert_close(y, expected)


@submodels
@kinds
def test_gradients_in_place_equal_the_dense_ones(submodel, kv_heads):
    found = []
    for mode in ("inplace", "dense"):
        model = layer(kv_heads, grad_mode=mode, dtype=torch.float64)
        x = torch.randn(2, 5, submodel.hidden, dtype=torch.float64)
        torch.manual_seed(1)
        for _ in range(2):  # they accumulate
            leaf = x.clone().requires_grad_()
            with sk.active(model, submodel):
                y = model(leaf, causal=True)
                y.backward(torch.randn_like(y))
        found.append([leaf.grad, *(p.grad for p in model.parameters())])
        rows, cols = staircase_of(model.q_proj.weight).corners[0]
        assert cols == submodel.hidden and rows == model.num_heads // 6 * D * (
            -(-submodel.heads // (H // kv_heads)) * (H // kv_heads)
        )
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_nothing_inactive_is_read():
    model = layer(3)
    submodel = sk.Submodel(hidden=13, heads=3)
    x = torch.randn(2, 5, 13)
    with sk.active(model, submodel):
        clean = model(x)
        shapes = {n: p.active_shapes() for n, p in model.named_children()}
        with torch.no_grad():
            for name, part in model.named_children():
                for kind, shape in shapes[name].items():
                    param = getattr(part, kind)
                    block = param[tuple(slice(size) for size in shape)].clone()
                    param.fill_(torch.nan)
                    param[tuple(slice(size) for size in shape)] = block
        y = model(x)
        assert_same_bits(y, clean)
        y.backward(torch.randn_like(y))
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_dimensions():
    model = torch.nn.Sequential(layer(3), torch.nn.Identity())
    assert sk.nn.dimensions(model) == {"hidden": E, "heads": H}
    for heads in range(1, H + 1):
        sk.activate(model, sk.Submodel(heads=heads))
        rounded = -(-heads // 2) * 2
        assert model[0].q_proj.out_axis.active == model[0].out_proj.in_axis.active == rounded * D
        assert (
            model[0].k_proj.out_axis.active == model[0].v_proj.out_axis.active == rounded // 2 * D
        )
    fixed = sk.nn.MultiheadAttention(E, H)
    assert sk.nn.dimensions(fixed) == {} and fixed.head_dim == E // H
    assert "6, 3" in repr(model)


@submodels
@kinds
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "rows-first"])
def test_export_computes_the_same(submodel, kv_heads, batch_first):
    model = torch.nn.ModuleDict({"attention": layer(kv_heads, batch_first=batch_first)})
    exported = sk.export(model, submodel)
    plain = exported["attention"]
    for module in exported.modules():
        assert type(module).__module__.startswith("torch.")
    assert sk.count_parameters(model, submodel) == sum(p.numel() for p in plain.parameters())
    x, other = (torch.randn(2, 5, submodel.hidden) for _ in range(2))
    mask = torch.randn(5, 5) if batch_first else torch.randn(2, 2)
    buffer = io.BytesIO()
    torch.save(exported, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)["attention"]
    with sk.active(model, submodel):
        ours = model["attention"]
        for call in (
            lambda m: m(x),
            lambda m: m(x, other),
            lambda m: m(x, other, x),
            lambda m: m(x, key=other),
            lambda m: m(x, value=other, causal=True),
            lambda m: m(x, other, value=x, mask=mask),
            lambda m: m(query=x, mask=mask, causal=True),
        ):
            torch.testing.assert_close(call(plain), call(ours))
            assert_same_bits(call(again), call(plain))


def test_an_exports_training_flag_and_state():
    model = layer(3).eval()
    plain = sk.export(model, SUBMODELS[2])
    assert not plain.training and list(plain.state_dict()) == list(model.state_dict())
    other = sk.export(layer(3), SUBMODELS[2])
    other.load_state_dict(plain.state_dict())


def test_flops():
    """Projections and both products of attention, a multiply-add counted as 2."""
    model = layer(3)
    for submodel, heads in ((sk.Submodel(hidden=13, heads=3), 4), (sk.Submodel(heads=6), 6)):
        hidden = submodel.get("hidden", E)
        projections = 2 * 2 * 7 * hidden * D * (2 * heads + 2 * heads // 2)
        products = 2 * 2 * 2 * heads * 7 * 7 * D
        assert sk.count_flops(model, submodel, (2, 7, hidden)) == projections + products


def test_compiles_twice_for_all_heads():
    torch._dynamo.reset()
    model = sk.nn.MultiheadAttention(117, 17, head_dim=4, heads_dim="heads", dim="hidden")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for heads in (17, 3, *range(2, 18)):
        x = torch.randn(2, 5, heads + 100)
        sk.activate(model, sk.Submodel(heads=heads, hidden=heads + 100))
        results = []
        for run in (compiled, model):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            y = run(leaf, causal=True)
            y.backward(torch.ones_like(y))
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((24, 5), "num_heads=5 does not divide embed_dim=24"),
        ((24, 6, 4), "num_kv_heads=4 does not divide num_heads=6"),
        ((24, 0), "num_heads=0"),
        ((24, 6, 6, 0), "head_dim=0"),
        ((24, 6.0), r"num_heads=6\.0"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(sk.ShapeError, match=message):
        sk.nn.MultiheadAttention(*arguments)


def test_bad_inputs():
    model = layer()
    with pytest.raises(sk.ShapeError, match=r"query has shape \(5, 24\); three axes"):
        model(torch.randn(5, 24))
    with pytest.raises(sk.ShapeError, match="active input width is 24"):
        model(torch.randn(2, 5, 23))
    with pytest.raises(sk.ShapeError, match=r"mask has shape \(4, 4\)"):
        model(torch.randn(2, 5, 24), mask=torch.zeros(4, 4))
