"""Layers of norms over channels: torch's modules at full size, their prefixes on every route."""

import copy
import gc
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from support.channel_norms import LAYOUTS, TRAINED, affine, values
from support.oracle import DTYPES, Outcome, assert_outcome, outcome
from support.poison import assert_same_bits, pattern, poisoned
from support.routes import ROUTES, in_place_routes, take

norms = pytest.mark.parametrize("norm", TRAINED, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# (N, C, c, spatial) for two-dimensional layers, and for batch norm and group norm fewer axes.
SHAPES = [(3, 9, 6, (4, 5)), (2, 8, 8, (3, 3)), (4, 7, 1, (2, 3)), (5, 12, 10, ()), (3, 9, 4, (6,))]


def layer_with(norm, C, p, x, **options):
    """A layer that is NaN past the blocks, in parameters and statistics."""
    c = x.shape[1]
    layer = norm.layer(C, c, x.dim(), dtype=x.dtype, **options)
    with torch.no_grad():
        for name, tensor in {
            **dict(layer.named_parameters()),
            **dict(layer.named_buffers()),
        }.items():
            block = p.get(name.removeprefix("running_"))
            if block is not None:
                tensor.copy_(poisoned(block, tuple(tensor.shape)))
    sk.activate(layer, sk.Submodel(i=c))
    return layer


def run(layer, x, dy):
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return Outcome(y.detach(), leaf.grad, {n: p.grad for n, p in layer.named_parameters()})


def judged(norm, x, p, dy):
    fixed = {name: p[name] for name in ("mean", "var")}
    wide = {name: value.double() for name, value in fixed.items()}
    plain = outcome(lambda x, q: norm.plain(x, q | fixed), x, affine(p), dy)
    blocks = {name: value.double() for name, value in affine(p).items()}
    return plain, outcome(lambda x, q: norm.exact(x, q | wide), x.double(), blocks, dy.double())


@norms
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_layer_matches_oracle(norm, dtype, shape, route, monkeypatch):
    n, C, c, spatial = shape
    if norm.name.startswith("instance") and len(spatial) != 2:
        return
    x, p = torch.randn(n, c, *spatial).to(dtype), values(norm, c, dtype)
    dy = torch.randn_like(x)
    layer = layer_with(norm, C, p, x, **take(monkeypatch, route))
    actual = run(layer, x, dy)
    assert_outcome(actual, *judged(norm, x, p, dy), what=route)
    assert all(staircase_of(param).area == c for param in layer.parameters())
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name, None)
        assert buffer is None or (buffer[:c].isfinite().all() and buffer[c:].isnan().all())


@norms
@in_place_routes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(norm, route, layout, monkeypatch):
    x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    layer = layer_with(norm, 9, p, x, **take(monkeypatch, route))
    y = run(layer, LAYOUTS[layout](x), LAYOUTS[layout](dy))
    assert_outcome(y, *judged(norm, x, p, dy))
    if layout == "channels_last":
        assert y.y.is_contiguous(memory_format=torch.channels_last)
    if layout != "contiguous":
        expanded = dy[:1, :, :1].expand_as(dy)
        sk.optim.SGD(layer.parameters(), 1).zero_grad()
        assert_outcome(run(layer, x, expanded), *judged(norm, x, p, expanded))


@norms
@in_place_routes
@dtypes
def test_only_the_prefix_of_gradients_and_statistics_is_written(norm, route, dtype, monkeypatch):
    """A pattern laid past the channels, behind the slot's back, is there after a backward."""
    x, p = torch.randn(3, 6, 4, 5).to(dtype), values(norm, 6, dtype)
    layer = layer_with(norm, 9, p, x, **take(monkeypatch, route))
    run(layer, x, torch.randn_like(x))
    marks = pattern((9,), dtype)
    watched = [param.grad.data for param in layer.parameters()]
    watched += [b for b in layer.buffers() if b.dim()]
    before = []
    with torch.no_grad():
        for tensor in watched:
            tensor.data[6:] = marks[6:]
            before.append(tensor[:6].clone())
    run(layer, x, torch.randn_like(x))
    fixed = 2 if norm.name.startswith("batch-eval") else 0
    for i, (tensor, old) in enumerate(zip(watched, before, strict=True)):
        assert_same_bits(tensor[6:].clone(), marks[6:].clone())
        assert torch.equal(tensor[:6], old) == (i >= len(watched) - fixed)


@norms
@in_place_routes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_input_that_needs_no_gradient(norm, route, layout, monkeypatch):
    x, p = LAYOUTS[layout](torch.randn(3, 6, 4, 5)), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    layer = layer_with(norm, 9, p, x, **take(monkeypatch, route))
    layer(x).backward(dy)
    _, exact = judged(norm, x, p, dy)
    for name, gradient in exact.gradients.items():
        found = getattr(layer, name).grad[:6].double()
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@norms
def test_gradients_accumulate_over_sizes(norm, monkeypatch):
    """What lands in place adds up to what autograd adds up."""
    found = []
    for route in ROUTES:
        torch.manual_seed(1)
        x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
        layer = layer_with(norm, 6, p, x, **take(monkeypatch, route))
        for c in (3, 6, 3):
            sk.activate(layer, sk.Submodel(i=c))
            layer(x[:, :c]).mul(torch.randn(3, c, 4, 5)).sum().backward()
        found.append([param.grad.clone() for param in layer.parameters()])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@norms
@in_place_routes
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_graph_of_gradients_in_place_is_an_error(norm, route, monkeypatch):
    x, p = torch.randn(3, 6, 4, 5, requires_grad=True), values(norm, 6, torch.float32)
    layer = layer_with(norm, 9, p, x, **take(monkeypatch, route))
    with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
        layer(x).sum().backward(create_graph=True)


@norms
def test_double_backward(norm):
    """Batch norm on blocks runs in PyTorch's own nodes; others refuse, but on the dense path."""
    x, p = torch.randn(3, 6, 4, 5, requires_grad=True), values(norm, 6, torch.float32)
    found = {}
    for mode in ("dense", "inplace"):
        layer = layer_with(norm, 9, p, x, grad_mode=mode)
        if mode == "inplace" and not norm.name.startswith("batch"):
            with pytest.raises(sk.GradientError, match="grad_mode='dense'"):
                torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
            continue
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(dx.pow(2).sum(), x, retain_graph=True)
        assert layer.weight.grad is None
        dx.pow(2).sum().backward()
        found[mode] = dx.detach(), twice, layer.weight.grad
        assert layer.weight.grad[:6].isfinite().all() and not layer.weight.grad[6:].any()
    if "inplace" in found:
        torch.testing.assert_close(found["inplace"], found["dense"], rtol=1e-4, atol=1e-3)


def test_a_layer_that_is_gone_before_its_backward():
    """The graph keeps what a gradient lands on."""
    layer, x = sk.nn.BatchNorm2d(9, dim="i"), torch.randn(3, 6, 4, 5, requires_grad=True)
    sk.activate(layer, sk.Submodel(i=6))
    y = layer(x)
    del layer
    gc.collect()
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def replace_buffer(layer, fresh):
    layer.running_mean = fresh


def replace_storage(layer, fresh):
    layer.running_mean.data = fresh


def load_assigned(layer, fresh):
    layer.load_state_dict({**layer.state_dict(), "running_mean": fresh}, assign=True)


@pytest.mark.parametrize("change", [replace_buffer, replace_storage, load_assigned])
def test_a_training_step_finds_replaced_statistics(change):
    """Views kept from the last step are not those of a buffer that has been replaced since."""
    layer, x = sk.nn.BatchNorm2d(9, dim="i", momentum=0.5), torch.randn(3, 6, 4, 5) + 2
    sk.activate(layer, sk.Submodel(i=6))
    for _ in range(2):
        layer(x).sum().backward()
    old, fresh = layer.running_mean.clone(), torch.full((9,), 8.0)
    kept = layer.running_mean.data
    change(layer, fresh)
    layer(x).sum().backward()
    assert_same_bits(kept, old)
    wanted = torch.cat((4 + 0.5 * x.mean((0, 2, 3)), torch.full((3,), 8.0)))
    torch.testing.assert_close(layer.running_mean, wanted)


@norms
def test_a_hook_selects_the_dense_path(norm):
    x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
    dy = torch.randn_like(x)
    plain = run(layer_with(norm, 9, p, x), x, dy)
    hooked = layer_with(norm, 9, p, x)
    hooked.weight.register_hook(lambda gradient: gradient * 2)
    actual = run(hooked, x, dy)
    torch.testing.assert_close(actual.gradients["weight"], plain.gradients["weight"] * 2)
    assert staircase_of(hooked.weight).area == 6


@norms
def test_parametrized_weights(norm):
    class Double(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    x, p = torch.randn(3, 6, 4, 5), values(norm, 6, torch.float32)
    layer, other = layer_with(norm, 9, p, x), layer_with(norm, 9, p, x)
    parametrize.register_parametrization(layer, "weight", Double())
    with torch.no_grad():
        other.weight.mul_(2)
    torch.testing.assert_close(layer(x), other(x))


FULL = {
    "batch1d": (lambda nn: nn.BatchNorm1d(7), (5, 7)),
    "batch1d-3": (lambda nn: nn.BatchNorm1d(7, 1e-3, 0.3), (2, 7, 4)),
    "batch2d": (lambda nn: nn.BatchNorm2d(7, momentum=None), (3, 7, 2, 4)),
    "batch2d-plain": (lambda nn: nn.BatchNorm2d(7, affine=False), (3, 7, 2, 4)),
    "batch2d-untracked": (lambda nn: nn.BatchNorm2d(7, track_running_stats=False), (3, 7, 2, 4)),
    "group": (lambda nn: nn.GroupNorm(3, 12), (3, 12, 5)),
    "group-plain": (lambda nn: nn.GroupNorm(2, 6, affine=False), (3, 6, 2, 2)),
    "instance": (lambda nn: nn.InstanceNorm2d(7, affine=True), (3, 7, 4, 2)),
    "instance-plain": (lambda nn: nn.InstanceNorm2d(7), (3, 7, 4, 2)),
    "instance-one": (lambda nn: nn.InstanceNorm2d(7), (7, 4, 2)),
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_full_size_equals_torch(name, training):
    """Same constructor, state_dict and class behaviour; the same numbers over several steps."""
    make, shape = FULL[name]
    ours, stock = make(sk.nn).train(training), make(torch.nn).train(training)
    assert isinstance(ours, type(stock)) and list(ours.state_dict()) == list(stock.state_dict())
    assert ours.extra_repr() == stock.extra_repr()
    swapped = sk.elasticize(make(torch.nn).train(training), {"": {"features": "w"}})
    with torch.no_grad():
        for param in stock.parameters():
            param.normal_()
    for other in (ours, swapped):
        other.load_state_dict(stock.state_dict())
        assert isinstance(other, type(ours))
    for _ in range(3):
        x, dy = torch.randn(2, *shape)
        found = []
        for layer in (stock, ours, swapped):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            found.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for other in found[1:]:
            for mine, theirs in zip(other, found[0], strict=True):
                if name.startswith("instance"):  # torch has another formula
                    torch.testing.assert_close(mine, theirs)
                else:
                    assert_same_bits(mine, theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    layer = sk.nn.BatchNorm1d(8, dim="w")
    x = torch.randn(4, 5)
    sk.activate(layer, sk.Submodel(w=5))
    layer(x).sum().backward()
    other = copied(layer)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    sk.activate(other, sk.Submodel(w=3))
    other(x[:, :3]).sum().backward()
    assert layer(x).shape == (4, 5) and int(layer.num_batches_tracked) == 2
    assert int(other.num_batches_tracked) == 2
    assert_same_bits(other.running_mean[3:].clone(), kept["running_mean"][3:].clone())


@norms
@pytest.mark.parametrize("c", [1, 4, 9])
def test_export(norm, c):
    shape = (3, c, 4, 5) if norm.name.startswith("instance") else (3, c, 6)
    x, p = torch.randn(shape), values(norm, c, torch.float32)
    layer = layer_with(norm, 9, p, x)
    plain = sk.export(layer, sk.Submodel(i=c))
    assert type(plain).__module__.startswith("torch.nn") and plain.training == layer.training
    for tensor in (*plain.parameters(), *plain.buffers()):
        assert tensor.is_contiguous() and (tensor.dim() == 0 or tensor.shape == (c,))
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    torch.testing.assert_close(plain(x), layer(x))
    assert sk.count_parameters(layer, sk.Submodel(i=c)) == c * len(norm.names)
    for (name, mine), (other, theirs) in zip(
        plain.named_buffers(), layer.named_buffers(), strict=True
    ):
        assert name == other
        assert_same_bits(mine, theirs[:c].clone() if theirs.dim() else theirs)


ERRORS = {
    "width": (lambda: sk.nn.BatchNorm1d(9, dim="w"), (4, 9), r"\(4, 9\).* 5 of 9 \(dimension 'w'"),
    "axes": (lambda: sk.nn.BatchNorm2d(9, dim="w"), (4, 5), r"\(4, 5\); 4 axes wanted"),
    "one": (lambda: sk.nn.BatchNorm1d(9, dim="w"), (1, 5), "more than 1 value per channel"),
    "group": (lambda: sk.nn.GroupNorm(3, 9, dim="w"), (4, 5), "groups of 3.*multiple_of=3"),
    "instance": (lambda: sk.nn.InstanceNorm2d(9, dim="w"), (4, 5), "3 or 4 axes wanted"),
    "instance-one": (lambda: sk.nn.InstanceNorm2d(9, dim="w"), (4, 5, 1, 1), "1 spatial element"),
    "dtype": (lambda: sk.nn.BatchNorm1d(9, dim="w").half(), (4, 5), "weight has dtype"),
    "dtype-group": (lambda: sk.nn.GroupNorm(9, 9, dim="w").double(), (4, 5, 3), "weight has dtype"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_change_nothing(name):
    make, shape, message = ERRORS[name]
    layer = make()
    sk.activate(layer, sk.Submodel(w=5))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises((sk.ShapeError, sk.DTypeError), match=message):
        layer(torch.randn(shape))
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key])


def test_running_statistics_of_instances_are_refused():
    with pytest.raises(sk.OptionError, match="track_running_stats=True"):
        sk.nn.InstanceNorm2d(4, track_running_stats=True)
    stock = torch.nn.InstanceNorm2d(4, track_running_stats=True)
    with pytest.raises(sk.RuleError, match="track_running_stats=True"):
        sk.elasticize(stock, {"": {"features": "w"}})
    assert type(stock) is torch.nn.InstanceNorm2d


class Net(torch.nn.Module):
    """Linear layers with a norm of each kind in between."""

    def __init__(self, width=64):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, width), torch.nn.Linear(width, width)
        self.bn = torch.nn.BatchNorm1d(width)
        self.gn = torch.nn.GroupNorm(width // 4, width)
        self.inorm = torch.nn.InstanceNorm2d(width, affine=True)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x):
        y = self.gn(torch.relu(self.bn(self.fc1(x))))
        y = self.fc2(y)
        y = self.inorm(y[:, :, None, None] * x[:, None, :, None])
        return self.head(y.square().mean((2, 3)))


def net(widths=16):
    torch.manual_seed(0)
    rules = {name: {"features": "w"} for name in ("bn", "gn", "inorm")}
    rules |= {"fc1": {"out": "w"}, "fc2": {"in": "w", "out": "w"}, "head": {"in": "w"}}
    return sk.elasticize(Net(), rules, dimensions={"w": widths})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sixteen_sizes_two_graphs(mode):
    torch._dynamo.reset()
    eager, model = (net().train(mode == "train") for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for w in [16, 3, *(range(1, 17) if mode == "train" else (8, 1))]:
        x, dy = torch.randn(8, 6), torch.randn(8, 3)
        for call, owner in ((compiled, model), (eager, eager)):
            sk.activate(owner, sk.Submodel(w=w))
            owner.zero_grad()
            y = call(x)
            y.backward(dy)
        for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
            assert staircase_of(mine) == staircase_of(theirs), name
        for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 2


def test_autocast():
    layer = sk.nn.BatchNorm1d(8, dim="w")
    stock = torch.nn.BatchNorm1d(8)
    x = torch.randn(5, 8)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x.to(dtype)), stock(x.to(dtype))
        assert_same_bits(y, expected)
    group, stock_group = sk.nn.GroupNorm(2, 8), torch.nn.GroupNorm(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(group(x.bfloat16()), stock_group(x.bfloat16()))
