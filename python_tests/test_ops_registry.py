"""torch.library.opcheck on every op of the namespace: one that has no samples fails the test."""

import itertools
import re

import pytest
import torch

import sorted_kernels.ops.optimizer  # noqa: F401  (defines the optimizers' ops)
from sorted_kernels.ops.gradient import slot_of
from sorted_kernels.ops.library import NAMESPACE, load_compiled
from support.poison import pattern


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def slot(*shape):
    """A slot whose parameter lives as long as the test session."""
    param = torch.nn.Parameter(torch.randn(*shape))
    _kept.append(param)
    made = slot_of(param)
    return made.token, made.handle


_kept: list[torch.Tensor] = []


def linear():
    for activation in ("none", "relu", "gelu", "silu"):
        yield leaf(3, 4), leaf(5, 6), leaf(5), 2, activation, activation != "none"
    yield leaf(2, 3, 4), leaf(5, 6), None, 5, "none", False


def linear_dgrad():
    yield torch.randn(3, 2), torch.randn(5, 6), 4


def linear_wgrad():
    yield torch.randn(3, 2), torch.randn(3, 4), torch.randn(5, 6)


def linear_accumulate():
    yield torch.randn(3, 2), torch.randn(3, 4), *slot(5, 6)


def accumulate_prefix():
    yield torch.randn(2, 4), *slot(5, 6)
    yield torch.randn(2), *slot(5)


def layer_norm():
    yield leaf(3, 4), leaf(6), leaf(6), 1e-5
    yield leaf(2, 3, 4), leaf(4), None, 1e-5
    yield leaf(3, 4, dtype=torch.bfloat16), None, None, 1e-5


def layer_norm_backward():
    x = torch.randn(3, 4)
    mean, rstd = torch.randn(3, 1), torch.rand(3, 1) + 1
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        yield torch.randn(3, 4), x, mean, rstd, torch.randn(6), *needs


def batch_norm():
    statistics = torch.randn(6), torch.rand(6) + 1
    for x in (leaf(3, 4), leaf(3, 4, 2), leaf(3, 4, 2, 5)):
        yield x, leaf(6), leaf(6), *statistics, True, 0.1, 1e-5
        yield x, leaf(6), None, *statistics, False, 0.1, 1e-5
    last = torch.randn(3, 4, 2, 5).contiguous(memory_format=torch.channels_last)
    yield last.requires_grad_(), leaf(6), leaf(4), None, None, True, 0.0, 1e-5
    yield leaf(3, 4, dtype=torch.bfloat16), None, None, *statistics, True, 0.1, 1e-5


def batch_norm_backward():
    statistics = torch.randn(4), torch.rand(4) + 1
    for training in (True, False):
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            values = torch.randn(3, 4, 2), torch.randn(3, 4, 2), *statistics, torch.randn(6)
            yield *values, training, *needs


def group_norm():
    for x in (leaf(3, 4), leaf(3, 4, 2), leaf(3, 4, 2, 5)):
        yield x, leaf(6), leaf(4), 2, 1e-5
    last = torch.randn(3, 4, 2, 5).contiguous(memory_format=torch.channels_last)
    yield last.requires_grad_(), leaf(6), None, 4, 1e-5
    yield leaf(3, 4, 3, dtype=torch.bfloat16), None, None, 1, 1e-5


def group_norm_backward():
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        statistics = torch.randn(6), torch.rand(6) + 1
        yield torch.randn(3, 4, 5), torch.randn(3, 4, 5), *statistics, torch.randn(6), 2, *needs


def rms_norm():
    yield leaf(3, 4), leaf(6), 1e-5
    yield leaf(3, 4, dtype=torch.bfloat16), None, 1e-5


def rms_norm_backward():
    for needs in ((True, True), (False, True), (True, False)):
        yield torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 1) + 1, torch.randn(6), *needs


def embedding():
    yield torch.randint(5, (3, 2)), leaf(5, 6), 4, -1
    yield torch.randint(5, (3,)), leaf(5, 6), 6, 2


def embedding_backward():
    yield torch.randn(3, 2, 4), torch.randint(5, (3, 2)), 5, -1


def embedding_accumulate():
    yield torch.randn(3, 2, 4), torch.randint(5, (3, 2)), *slot(5, 6), 5, 1


def images(*shape, form=torch.contiguous_format):
    return torch.randn(*shape).contiguous(memory_format=form)


CONVS = {  # stored weight; channels of x; block; geometry, the last of which is active groups
    "dense": ((5, 4, 3, 3), 3, [2, 3, 3, 3], [2, 1, 1, 0, 1, 1, 1]),
    "pointwise": ((5, 4, 1, 1), 3, [4, 3, 1, 1], [1, 1, 0, 0, 1, 1, 1]),
    "cropped depthwise": ((6, 1, 5, 5), 4, [4, 1, 3, 3], [1, 1, 1, 1, 1, 2, 4]),
}


def convs():
    """Stored weight, block, geometry, x, and dy of x's memory format."""
    for shape, channels, block, geometry in CONVS.values():
        for form in (torch.contiguous_format, torch.channels_last):
            x, weight = images(2, channels, 6, 7, form=form), torch.randn(shape)
            op = torch.ops.sorted_kernels.conv2d
            y, _ = op(x, weight, None, block, geometry, "none", False)
            yield weight, block, geometry, x, torch.randn_like(y)


def heads():
    """Hidden states, a head that is wider, its bias, targets, and their options."""
    for bias in (torch.randn(7), None):
        target = torch.tensor([0, 6, -100, 3])
        yield torch.randn(4, 5), torch.randn(7, 8), bias, target, -100, 0.1
    yield torch.randn(1, 5).bfloat16(), torch.randn(7, 5).bfloat16(), None, target[:1].int(), 3, 0.0


def linear_cross_entropy():
    yield from heads()


def linear_cross_entropy_backward():
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        for hidden, weight, bias, *rest in heads():
            wanted = needs[:2] + (needs[2] and bias is not None,)
            yield torch.randn(hidden.shape[0]), hidden, weight, bias, *rest, *wanted


def conv2d():
    names = itertools.cycle(("gelu", "none", "relu", "silu"))
    for (weight, block, geometry, x, _), activation in zip(convs(), names, strict=False):
        tensors = x.requires_grad_(), weight.requires_grad_(), leaf(weight.shape[0])
        yield *tensors, block, geometry, activation, activation != "none"
    yield x.requires_grad_(), weight.requires_grad_(), None, block, geometry, "none", False


def conv2d_dgrad():
    for weight, block, geometry, x, dy in convs():
        yield dy, weight, block, geometry, list(x.shape[2:])


def conv2d_wgrad():
    for _, block, geometry, x, dy in convs():
        yield dy, x, block, geometry


def conv2d_accumulate():
    for weight, block, geometry, x, dy in convs():
        yield dy, x, block, geometry, *slot(*weight.shape)


RUNS = [2, 5, 4, 1, 3, 4, 1, 3, 1]  # four rows of widths 4, 4, 4 and 1


def ragged_linear():
    for activation in ("none", "relu", "gelu", "silu"):
        yield leaf(4, 4), leaf(5, 6), leaf(5), RUNS, activation, activation != "none"
    yield leaf(4, 4), leaf(7, 4), None, RUNS, "none", False


def ragged_linear_dgrad():
    yield torch.randn(4, 5), torch.randn(6, 5), RUNS


def ragged_linear_wgrad():
    yield torch.randn(4, 5), torch.randn(4, 4), torch.randn(6, 5), RUNS


def ragged_linear_bias_grad():
    yield torch.randn(4, 5), torch.randn(6), RUNS


def ragged_layer_norm():
    yield leaf(4, 4), leaf(6), leaf(6), RUNS, 1e-5
    yield leaf(4, 4, dtype=torch.bfloat16), None, None, RUNS, 1e-5


def ragged_layer_norm_backward():
    statistics = torch.randn(4, 1), torch.rand(4, 1) + 1
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        yield torch.randn(4, 4), torch.randn(4, 4), *statistics, torch.randn(6), RUNS, *needs


def ragged_rms_norm():
    yield leaf(4, 4), leaf(6), RUNS, 1e-5
    yield leaf(4, 4, dtype=torch.bfloat16), None, RUNS, 1e-5


def ragged_rms_norm_backward():
    for needs in ((True, True), (False, True), (True, False)):
        rstd = torch.rand(4, 1) + 1
        yield torch.randn(4, 4), torch.randn(4, 4), rstd, torch.randn(6), RUNS, *needs


def ragged_embedding():
    yield torch.randint(5, (4,)), leaf(5, 6), RUNS, -1


def ragged_embedding_backward():
    yield torch.randn(4, 4), torch.randint(5, (4,)), 5, RUNS, 2


def ragged_linear_accumulate():
    yield torch.randn(4, 5), torch.randn(4, 4), *slot(6, 5), RUNS


def ragged_embedding_accumulate():
    yield torch.randn(4, 4), torch.randint(5, (4,)), *slot(5, 6), 5, RUNS, 2


def ragged_product_():
    runs, x, weight, dy = RUNS, torch.randn(4, 4), torch.randn(5, 6), torch.randn(4, 5)
    yield 0, x, weight, torch.randn(5), runs, torch.empty(4, 5), False
    yield 1, dy, weight, None, runs, torch.empty(4, 4), False
    yield 2, dy, x, None, runs, torch.zeros(5, 4), True


def narrow_conv2d_():
    x, w, geometry = torch.randn(2, 3, 5, 6), torch.randn(4, 3, 3, 3), [1, 1, 1, 1, 1, 1, 1, 1]
    yield x, w, torch.randn(4), geometry, torch.empty(2, 4, 5, 6), False
    yield torch.randn(2, 4, 5, 6), w, None, geometry, torch.empty(2, 3, 5, 6), True


def narrow_conv2d_wgrad_():
    dy, x, geometry = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6), [1, 1, 1, 1, 1, 1, 1, 1]
    yield dy, x, geometry, torch.zeros(4, 3, 3, 3), True


def cross_entropy_rows_():
    target, scale, losses = torch.tensor([1, -100, 4]), torch.rand(3), torch.empty(3)
    yield torch.randn(3, 5), target, None, -100, 0.0, True, losses
    yield torch.randn(3, 5).bfloat16(), target, scale, -100, 0.1, True, losses


def add_transposed_():
    yield torch.zeros(4, 3), torch.randn(3, 4), True
    yield torch.zeros(4, 3), torch.randn(3, 4).half(), False


def attention():
    q, k, v = leaf(2, 4, 3, 5), leaf(2, 2, 6, 5), leaf(2, 2, 6, 5)
    counts = torch.tensor([4, 2])
    yield q, k, v, None, None, False, 0.5
    yield q, k, v, torch.rand(2, 1, 1, 6) < 0.5, counts, True, 0.5
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    yield *half, torch.randn(1, 4, 3, 6).bfloat16(), counts.int(), False, 0.5


def attention_backward():
    for q, k, v, *options in attention():
        q, k, v = (t.detach() for t in (q, k, v))
        out, lse = torch.ops.sorted_kernels.attention(q, k, v, *options)
        mask, counts, causal, scale = options
        yield torch.randn_like(out), q, k, v, mask, counts, out, lse, causal, scale


def staircase_adamw_():
    bands, options = [0, 0, 2, 3, 0, 2, 4, 1, 1, 0, 3, 1], (1e-3, 0.9, 0.99, 1e-8, 0.1)
    for dtype, masters in ((torch.float32, []), (torch.bfloat16, [(4, 5), (5,)])):
        lists = [[pattern(shape, torch.float32) for shape in ((4, 5), (5,))] for _ in range(3)]
        params = [pattern(shape, dtype) for shape in ((4, 5), (5,))]
        wide = [pattern(shape, torch.float32) for shape in masters]
        yield params, *lists, wide, bands, [1, 7], *options, False, True


def staircase_sgd_():
    lists = [[pattern(shape, torch.float32) for shape in ((4, 5), (5,))] for _ in range(3)]
    yield *lists, [], [0, 0, 2, 3, 1, 0, 3, 1], 0.1, 0.9, 0.1, True, False, False


SAMPLES = {
    function.__name__: function
    for function in (
        linear, linear_dgrad, linear_wgrad, linear_accumulate, accumulate_prefix, layer_norm,
        layer_norm_backward, rms_norm, rms_norm_backward, embedding, embedding_backward,
        embedding_accumulate, staircase_adamw_, staircase_sgd_, ragged_linear,
        ragged_linear_dgrad, ragged_linear_wgrad, ragged_linear_bias_grad, ragged_layer_norm,
        ragged_layer_norm_backward, ragged_rms_norm, ragged_rms_norm_backward, ragged_embedding,
        ragged_embedding_backward, ragged_linear_accumulate, ragged_embedding_accumulate,
        batch_norm, batch_norm_backward, group_norm, group_norm_backward,
        conv2d, conv2d_dgrad, conv2d_wgrad, conv2d_accumulate,
        narrow_conv2d_, narrow_conv2d_wgrad_, ragged_product_,
        cross_entropy_rows_, add_transposed_,
        attention, attention_backward,
        linear_cross_entropy, linear_cross_entropy_backward,
    )
}  # fmt: skip
SAMPLES["linear_wgrad_"] = linear_wgrad  # the same arguments; the last one is changed


COMPILED = {  # have no fallback
    "add_transposed_", "cross_entropy_rows_", "narrow_conv2d_", "narrow_conv2d_wgrad_",
    "ragged_product_",
}  # fmt: skip


def op_names():
    registered = torch._C._dispatch_get_all_op_names()
    start = f"{NAMESPACE}::"
    return sorted({n.removeprefix(start).split(".")[0] for n in registered if n.startswith(start)})


@pytest.mark.parametrize("name", op_names())
def test_opcheck(name):
    op = getattr(torch.ops.sorted_kernels, name)
    if name == "native_gemm":  # has no public twin: sorted_kernels.cuda plans its calls
        return
    if name in COMPILED and not load_compiled():
        pytest.skip("the compiled library is absent")
    if name.startswith("native_"):  # the compiled CUDA twin: its public op decides to call it
        public = getattr(torch.ops.sorted_kernels, name.removeprefix("native_"))
        twin = str(op.default._schema).replace("native_", "")
        assert twin == str(public.default._schema)
        return
    assert name in SAMPLES, f"{name} has no opcheck samples"
    for args in SAMPLES[name]():
        torch.library.opcheck(op.default, args)


def test_every_sample_names_an_op():
    assert set(SAMPLES) <= set(op_names())


def test_sizes_in_schemas_are_symbolic():
    """A plain int in a schema would compile a graph for every size."""
    sizes = (
        "out_features", "in_features", "features", "rows", "handle", "padding_idx", "num_groups",
        "ignore_index",
        r"\[\] block", r"\[\] geometry", r"\[\] input_size",
    )  # fmt: skip
    for name in op_names():
        text = str(getattr(torch.ops.sorted_kernels, name).default._schema)
        for size in sizes:
            assert not re.search(rf"(?<!Sym)[Ii]nt ?{size}\b", text), text
