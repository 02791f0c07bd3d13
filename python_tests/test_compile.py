"""torch.compile: two graphs serve sixteen sizes, and compute what eager does."""

import shutil

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

import sorted_kernels as sk
from sorted_kernels.models import elastic_residual_mlp
from sorted_kernels.ops.gradient import staircase_of

COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
BACKENDS = ["aot_eager", "inductor"] if COMPILER else ["aot_eager"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compile anew: graphs cached on disk bring the guards of the code that they were made from."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def model_of(seed=0):
    torch.manual_seed(seed)
    return elastic_residual_mlp(64, 256, 512, 2, 10, widths=16)


def step(run, model, width):
    """Gradients and output of one sub-model; the same data for the same width."""
    generator = torch.Generator().manual_seed(width)
    sk.activate(model, sk.Submodel(width=width))
    model.zero_grad()
    y = run(torch.randn(8, 64, generator=generator))
    y.backward(torch.randn(8, 10, generator=generator))
    return y.detach(), {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_sizes_two_graphs(backend):
    eager, model = model_of(), model_of()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for width in [16, 3, *range(1, 17)]:
        y, found = step(compiled, model, width)
        expected_y, expected = step(eager, eager, width)
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
        for name, param in eager.named_parameters():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
            assert staircase_of(model.get_parameter(name)) == staircase_of(param), name
    assert counter.frame_count <= 2


def test_gradients_accumulate_over_sizes():
    eager, model = model_of(), model_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for width in (5, 9, 2):
        for run, owner in ((compiled, model), (eager, eager)):
            sk.activate(owner, sk.Submodel(width=width))
            run(torch.ones(8, 64)).square().sum().backward()
    for name, param in eager.named_parameters():
        found = model.get_parameter(name)
        torch.testing.assert_close(found.grad, param.grad, rtol=1e-3, atol=1e-3)
        assert staircase_of(found) == staircase_of(param)


CONVS = {  # how x lies in memory, and what every convolution has
    "contiguous": (torch.contiguous_format, {}),
    "channels-last": (torch.channels_last, {"activation": "gelu"}),
    "dense": (torch.contiguous_format, {"grad_mode": "dense", "activation": "relu"}),
}


def conv_net(**options):
    """A dense, a depthwise and a pointwise convolution that grow with a width of 16."""
    torch.manual_seed(1)
    options = {"in_dim": "width", "out_dim": "width", **options}
    return torch.nn.Sequential(
        sk.nn.Conv2d(64, 64, 3, 2, padding=1, **options),
        sk.nn.Conv2d(64, 64, 5, padding=2, groups=64, kernel_size_dim="taps", **options),
        sk.nn.Conv2d(64, 64, 1, bias=False, **options),
    )


@pytest.mark.parametrize(("form", "options"), CONVS.values(), ids=CONVS)
def test_convolutions_of_sixteen_sizes_two_graphs(form, options):
    eager, model = conv_net(**options), conv_net(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for width in [64, 12, *range(2, 66, 4)]:
        x = torch.randn(2, width, 9, 7).contiguous(memory_format=form)
        submodel = sk.Submodel(width=width, taps=5 if width % 8 else 3)
        outcomes = []
        for run, owner in ((compiled, model), (eager, eager)):
            sk.activate(owner, submodel)
            owner.zero_grad()
            leaf = x.detach().requires_grad_()
            y = run(leaf)
            torch.manual_seed(width)
            y.backward(torch.randn_like(y))
            outcomes.append([y.detach(), leaf.grad, *(p.grad for p in owner.parameters())])
        for mine, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
            assert mine.stride() == theirs.stride()
        for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            # a dense gradient of a compiled graph does not say where it is zero
            assert "grad_mode" in options or staircase_of(mine) == staircase_of(theirs)
    assert counter.frame_count <= 2


OPS = {
    "conv2d": (
        lambda x, w, b: sk.conv2d(
            x.t()[None, ..., None],
            w,
            b,
            out_channels=x.shape[-1] + 1,
            padding=(1, 0),
            activation="gelu",
        ),
        [(40, 40, 3, 1), (40,)],
    ),
    "linear": (
        lambda x, w, b: sk.linear(x, w, b, out_features=x.shape[-1] + 1, activation="gelu"),
        [(40, 40), (40,)],
    ),
    "layer_norm": (lambda x, w, b: sk.layer_norm(x, w, b), [(40,), (40,)]),
    "rms_norm": (lambda x, w: sk.rms_norm(x, w), [(40,)]),
    "embedding": (
        lambda x, w: sk.embedding((x[..., 0].abs() * 9).long() % 40, w, features=x.shape[-1]),
        [(40, 40)],
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_functional_ops(name):
    function, shapes = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for k in (39, 7, 12, 20, 33, 2):
        x = torch.randn(3, k)
        torch._dynamo.mark_dynamic(x, 1) if k == 39 else None
        results = []
        for run in (compiled, function):
            torch.manual_seed(k)
            leaf = x.clone().requires_grad_(name != "embedding")
            params = [torch.randn(shape, requires_grad=True) for shape in shapes]
            y = run(leaf, *params)
            y.backward(torch.randn(y.shape))
            inputs = ([] if name == "embedding" else [leaf]) + params
            results.append([y.detach(), *(value.grad for value in inputs)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_no_grad_and_eval():
    model = model_of().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    with torch.no_grad():
        for width in (16, 4, 7):
            with sk.active(model, sk.Submodel(width=width)):
                torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_model_trains_with_our_optimizer():
    eager, model = model_of(), model_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [sk.optim.AdamW(m.parameters(), 1e-2) for m in (model, eager)]
    for width in (16, 4, 7, 4):
        for run, owner, optimizer in zip(
            (compiled, eager), (model, eager), optimizers, strict=True
        ):
            optimizer.zero_grad()
            sk.activate(owner, sk.Submodel(width=width))
            run(torch.ones(8, 64)).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
