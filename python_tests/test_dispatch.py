"""Which back end a linear product gets: the pure function, what calls it, and what prints it."""

import importlib
import importlib.util
import re
from dataclasses import replace

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.cli import app, main
from sorted_kernels.ops import backend, dispatch
from sorted_kernels.ops.dispatch import PRODUCTS, LinearProblem, Machine, choose_linear
from sorted_kernels.reference import linear as reference

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BOTH = frozenset({"cuda", "triton"})
CPU = Machine("cpu", built=BOTH)
A100 = Machine("cuda", (8, 0), built=BOTH, promoted=BOTH)
H100 = Machine("cuda", (9, 0), built=BOTH, promoted=BOTH)
B200 = replace(H100, capability=(10, 0))
TRITON = replace(H100, built=frozenset({"triton"}), promoted=frozenset({"triton"}))
WAITING = replace(H100, promoted=frozenset())
TRYING = replace(WAITING, experimental=True)
T4 = replace(H100, capability=(7, 5))


def problem(product="forward", rows=4096, m=1024, k=1024, dtype=BF16, stride=4096, **more):
    own = {"forward": (k,), "dgrad": (m,), "wgrad": (m, k)}[product]
    return LinearProblem(product, rows, m, k, dtype, (*own, stride), **more)


ODD, DECODE = problem(m=1001), problem(rows=16)
GELU = problem(k=512, activation="gelu")
CASES = {
    "cpu": (problem(), CPU, "library", "oneDNN or MKL"),
    "cpu-odd": (ODD, CPU, "library", "strided views"),
    "other-device": (problem(), Machine("mps"), "library", "mps"),
    "aligned": (problem(), H100, "library", "nothing is expected"),
    "aligned-experimental": (problem(), TRYING, "library", "nothing is expected"),
    "odd": (ODD, H100, "cuda", "odd sizes"),
    "odd-k": (problem(k=1001, stride=4096, rows=40), A100, "triton", "odd sizes"),
    "odd-parent-stride": (problem(stride=4095), H100, "triton", "strides"),
    "odd-address": (problem(misplaced=(1,)), H100, "triton", "addresses"),
    "odd-address-of-x": (
        problem(misplaced=(0,)), H100, "cuda", "addresses; x copied into aligned rows",
    ),
    "odd-stride-of-x": (problem(k=1001), H100, "cuda", "; x copied into"),
    "odd-stride-of-dy": (problem("dgrad", m=1001), H100, "cuda", "; dy copied into"),
    "odd-but-x-is-aligned": (ODD, H100, "cuda", "odd sizes, strides or addresses"),
    "odd-float16": (problem(m=1001, dtype=F16), H100, "cuda", "odd"),
    "odd-float32": (problem(m=1001, dtype=F32), H100, "library", "nothing"),
    "odd-rows-are-aligned": (problem(rows=4095), H100, "library", "nothing"),
    "odd-on-sm_80": (ODD, A100, "triton", "odd"),
    "odd-on-sm_100": (ODD, B200, "triton", "odd"),
    "odd-on-sm_75": (ODD, T4, "library", "nothing"),
    "odd-no-cuda-kernel": (ODD, TRITON, "triton", "odd"),
    "odd-nothing-promoted": (ODD, WAITING, "reference", "cuda kernel is experimental; the triton"),
    "odd-experimental": (ODD, TRYING, "cuda", "(experimental)"),
    "odd-one-promoted": (
        ODD, replace(WAITING, promoted=frozenset({"triton"})), "triton", "odd sizes",
    ),
    "odd-nothing-there": (
        ODD, Machine("cuda", (9, 0)), "reference", "not built; Triton is not installed",
    ),
    "decode": (DECODE, H100, "cuda", "16 rows"),
    "decode-float32": (problem(rows=1, dtype=F32), H100, "triton", "16 rows"),
    "one-row-more": (problem(rows=17), H100, "library", "nothing"),
    "decode-large": (problem(rows=1, m=4096, k=4096), H100, "cuda", "rows"),
    "decode-too-large": (problem(rows=1, m=4104, k=4096), H100, "library", "nothing"),
    "decode-dgrad": (problem("dgrad", rows=16), H100, "cuda", "rows"),
    "decode-wgrad": (problem("wgrad", rows=16), H100, "library", "nothing"),
    "wgrad-odd": (
        problem("wgrad", m=999, k=999), H100, "cuda", "odd sizes, strides or addresses; dy and x",
    ),
    "wgrad-odd-parent-stride": (problem("wgrad", stride=4095), H100, "cuda", "addresses"),
    "wgrad-odd-address": (problem("wgrad", misplaced=(2,)), H100, "cuda", "addresses"),
    "into-float32": (problem("wgrad", rows=3200, widens=True), H100, "cuda", "a float32 gradient"),
    "into-float32-long": (problem("wgrad", rows=3300, widens=True), H100, "library", "nothing"),
    "into-float32-triton": (problem("wgrad", rows=668, widens=True), A100, "triton", "float32"),
    "into-float32-triton-long": (
        problem("wgrad", rows=669, widens=True), A100, "library", "nothing",
    ),
    "ragged": (problem(ragged=True), H100, "cuda", "many sizes in one launch"),
    "ragged-odd": (problem("dgrad", m=1001, ragged=True), H100, "cuda", "; dy copied"),
    "ragged-parent-stride": (problem(ragged=True, stride=4095), H100, "triton", "in one launch"),
    "ragged-wgrad": (problem("wgrad", ragged=True, stride=4095), H100, "cuda", "in one launch"),
    "ragged-float32": (problem(dtype=F32, ragged=True), H100, "triton", "in one launch"),
    "ragged-on-sm_80": (problem(ragged=True), A100, "triton", "in one launch"),
    "ragged-on-sm_75": (problem(ragged=True), T4, "library", "nothing"),
    "ragged-waiting": (problem(ragged=True), WAITING, "reference", "cuda kernel is experimental"),
    "ragged-trying": (problem(ragged=True), TRYING, "cuda", "launch (experimental)"),
    "ragged-cpu": (problem(ragged=True), CPU, "library", "strided views"),
    "sm_90-with-a-minor-number": (ODD, replace(H100, capability=(9, 1)), "triton", "odd"),
    "too-many-rows": (problem(m=1001, rows=1 << 30), H100, "triton", "odd"),
    "most-rows": (problem(m=1001, rows=(1 << 30) - 1), H100, "cuda", "odd"),
    "gelu": (GELU, TRITON, "triton", "gelu is fused"),
    "gelu-long": (problem(k=1024, activation="gelu"), A100, "library", "nothing"),
    "gelu-long-not-built": (
        problem(k=1024, activation="gelu"), TRITON, "reference", "CUDA kernel is not built",
    ),
    "gelu-long-cuda": (problem(k=1024, activation="gelu"), H100, "cuda", "fused"),
    "silu-longer-cuda": (problem(k=4096, activation="silu"), H100, "library", "nothing"),
    "relu-float32": (problem(k=256, dtype=F32, activation="relu"), TRITON, "library", "nothing"),
    "float64": (replace(ODD, dtype=F64), replace(H100, forced="triton"), "reference", "oracle"),
    "forced-reference": (ODD, replace(H100, forced="reference"), "reference", "=reference"),
    "forced-triton": (problem(), replace(TRITON, forced="triton"), "triton", "BACKEND=triton"),
    "forced-triton-cpu": (
        problem(), replace(CPU, forced="triton", interpreter=True), "triton", "BACKEND=triton",
    ),
    "forced-cuda": (problem(), replace(H100, forced="cuda"), "cuda", "BACKEND=cuda"),
    "forced-cuda-float32": (
        problem(dtype=F32), replace(H100, forced="cuda"), "reference", "takes bfloat16",
    ),
    "forced-cuda-sm_80": (problem(), replace(A100, forced="cuda"), "reference", "needs sm_90a"),
    "forced-cuda-cpu": (problem(), replace(CPU, forced="cuda"), "reference", "no cuda kernel runs"),
    "forced-cuda-stride": (
        problem(stride=4095), replace(H100, forced="cuda"), "reference", "TMA needs the weight's",
    ),
    "forced-cuda-copies": (
        problem(k=1001), replace(H100, forced="cuda"), "cuda", "=cuda; x copied into aligned rows",
    ),
    "forced-cuda-too-large": (
        problem(rows=1 << 30), replace(H100, forced="cuda"), "reference", "takes sizes up to",
    ),
    "forced-cuda-ragged": (
        problem(ragged=True), replace(WAITING, forced="cuda"), "cuda", "BACKEND=cuda",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_choice(name):
    asked, machine, wanted, why = CASES[name]
    choice = choose_linear(asked, machine)
    assert choice.backend == wanted, choice
    assert why in choice.reason and len(choice.reason) < 120
    assert choose_linear(asked, machine) == choice


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (replace(CPU, forced="triton"), "no triton kernel runs on cpu tensors"),
        (replace(T4, forced="triton"), "needs sm_80"),
        (Machine("cuda", (9, 0), forced="triton"), "Triton is not installed"),
    ],
    ids=["cpu", "sm_75", "not-installed"],
)
def test_a_forced_back_end_that_cannot_run_is_an_error(machine, why):
    with pytest.raises(sk.DeviceError, match=f"SORTED_KERNELS_BACKEND=triton, but .*{why}"):
        choose_linear(problem(), machine)


def test_one_pass_of_sums_pays_where_its_bytes_take_longer_than_the_lost_rate():
    for name, share in dispatch.PEAK_SHARE.items():
        rows, m, k, balance = dispatch.in_place_rows(name), 64, 64, dispatch.FLOPS_PER_BYTE[2]
        flops = 2 * rows * m * k
        assert flops / (share * balance) == pytest.approx(flops / balance + 4 * m * k)


def test_fusing_pays_where_the_saved_bytes_take_longer_than_the_lost_rate():
    """At the threshold both ways take the same time on a machine with these two rates."""
    for name, share in dispatch.PEAK_SHARE.items():
        for itemsize, balance in dispatch.FLOPS_PER_BYTE.items():
            rows, m, k = 4096, 1024, dispatch.fused_in_features(name, itemsize)
            flops, bytes_saved = 2 * rows * m * k, 2 * rows * m * itemsize
            library = flops / balance + bytes_saved
            assert flops / (share * balance) == pytest.approx(library)


@pytest.fixture
def fake_gpu(monkeypatch):
    """CPU tensors count as the GPU's; yields the problems that the choice was asked for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    asked = []

    def choose(question, machine):
        asked.append(question)
        return choose_linear(question, TRITON)

    class Tensor(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda:0")

        is_cuda = True

    monkeypatch.setattr(backend, "_module", lambda op, device_type: None)
    monkeypatch.setattr(backend, "_machine", lambda device: None)
    monkeypatch.setattr(backend, "choose_linear", choose)
    backend._linear_module.cache_clear()
    yield asked, lambda tensor: tensor.as_subclass(Tensor)
    backend._linear_module.cache_clear()


def test_what_a_call_says_of_itself(fake_gpu):
    asked, on_gpu = fake_gpu
    parent = torch.empty(64, 40, dtype=BF16)
    x, weight = on_gpu(torch.empty(3, 5, 24, dtype=BF16)), on_gpu(parent)
    backend.linear_implementation("forward", (x, weight), 32, 24, "gelu")
    dy, wide = on_gpu(torch.empty(15, 32, dtype=BF16)), torch.empty(15, 30, dtype=BF16)[:, :24]
    backend.linear_implementation("dgrad", (dy, on_gpu(parent[:, 1:])), 32, 24)
    out = on_gpu(parent[:32, :24])
    backend.linear_implementation("wgrad", (dy, on_gpu(wide), out), *out.shape, ragged=True)
    backend.linear_implementation("forward", (x[:, :, ::2], weight), 32, 12)
    half = torch.empty(20, 32, dtype=F16)
    backend.linear_implementation("wgrad", (on_gpu(half), on_gpu(half), out.float()), 32, 24)
    backend.linear_implementation("wgrad", (on_gpu(half), on_gpu(half[:, 1:]), out), 32, 24)
    most = dispatch.row_regime(20)
    assert asked == [
        LinearProblem("forward", 16, 32, 24, BF16, (24, 40), (), "gelu"),
        LinearProblem("dgrad", 16, 32, 24, BF16, (32, 40), (1,)),
        LinearProblem("wgrad", 16, 32, 24, BF16, (32, 30, 40), ragged=True),
        LinearProblem("forward", 16, 32, 12, BF16, (12, 40)),
        LinearProblem("wgrad", most, 32, 24, F16, (32, 32, 24), widens=True),
        LinearProblem("wgrad", most, 32, 24, F16, (32, 32, 40), (1,)),
    ]


def test_the_choice_is_made_once_a_regime_and_not_once_a_batch_size(fake_gpu):
    asked, on_gpu = fake_gpu
    weight = on_gpu(torch.empty(64, 64, dtype=BF16))
    found = []
    for rows in (1, 1, 17, 300, 4096, 5000, 1):
        x = on_gpu(torch.empty(rows, 64, dtype=BF16))
        module = backend.linear_implementation("forward", (x, weight), 64, 64)
        found.append(module.__name__.split(".")[1])
    assert found == ["triton", "triton", *["reference"] * 4, "triton"]
    assert [question.rows for question in asked] == [16, 668, dispatch.MOST_ELEMENTS]


@pytest.mark.parametrize("machine", [H100, A100, TRYING, WAITING], ids=["h100", "a100", "t", "w"])
def test_all_batches_of_a_regime_are_chosen_alike(machine):
    kinds = [problem(), problem("wgrad", widens=True), ODD, GELU, problem(ragged=True)]
    for asked in kinds:
        for rows in (1, 15, 16, 17, 600, 668, 669, 3240, 3241, 9999, (1 << 30) - 1, 1 << 30):
            regime = replace(asked, rows=dispatch.row_regime(rows))
            assert choose_linear(replace(asked, rows=rows), machine) == choose_linear(
                regime, machine
            )


def test_each_product_runs_in_the_module_chosen_for_it(monkeypatch):
    """Forward, dgrad and wgrad of one layer may go different ways."""
    calls = []

    def pick(product, operands, m, k, activation="none"):
        calls.append((product, m, k, activation, [tuple(t.shape) for t in operands]))
        return reference

    module = importlib.import_module("sorted_kernels.ops.linear")
    monkeypatch.setattr(module, "linear_implementation", pick)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    sk.linear(x, weight, out_features=5, activation="silu").backward(torch.randn(3, 5))
    assert calls == [
        ("forward", 5, 4, "silu", [(3, 4), (9, 8)]),
        ("dgrad", 5, 4, "none", [(3, 5), (9, 8)]),
        ("wgrad", 5, 4, "none", [(3, 5), (3, 4), (5, 4)]),
    ]


def test_where_no_kernel_of_ours_may_run_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(backend, "choose_linear", lambda *_: pytest.fail("asked"))
    x = torch.randn(2, 3)
    found = backend.linear_implementation("forward", (x, torch.randn(4, 3)), 4, 3)
    assert found is backend.implementation("linear", x)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
def test_the_sanitizer_sees_the_kernel(dtype):
    """The sizes that bench.exercise_kernels runs must not end in the library."""
    from bench.exercise_kernels import ACTIVE, FEATURES, ROWS

    activation = "gelu" if dtype is F32 else "none"
    asked = problem(
        rows=ROWS, m=ACTIVE, k=ACTIVE, stride=FEATURES, dtype=dtype, activation=activation
    )
    assert choose_linear(asked, replace(TRITON, promoted=frozenset(), experimental=True))[0] == (
        "triton"
    )


BUILT = {
    "nothing": (False, False), "triton": (True, False), "cuda": (False, True), "both": (True, True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("built", "setting", "passed", "wanted", "why"),
    [
        ("nothing", "", (), "reference", "Triton is not installed"),
        ("triton", "", (), "reference", "the Triton kernel is experimental"),
        ("cuda", "", (), "reference", "the CUDA kernel is experimental"),
        ("both", "", (), "reference", "the Triton and CUDA kernels are experimental"),
        ("cuda", "1", (), "cuda", "experimental, turned on"),
        ("both", "1", (), "triton", "experimental, turned on"),
        ("both", "", ("cuda_linear",), "cuda", "passed a recorded GPU run"),
        ("both", "", ("linear", "cuda_linear"), "triton", "passed"),
        ("both", "1", ("cuda_linear",), "cuda", "passed"),
        ("triton", "", ("cuda_linear",), "reference", "experimental"),
    ],
)
def test_whether_anything_of_ours_may_run(monkeypatch, built, setting, passed, wanted, why):
    """Triton where both may: it also sums bias gradients."""
    triton, cuda = BUILT[built]
    monkeypatch.setattr(backend, "has_triton", lambda: triton)
    monkeypatch.setattr(backend, "has_cuda_gemm", lambda: cuda)
    monkeypatch.setattr(backend, "promoted", lambda kernel: kernel in passed)
    monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", setting)
    choice = backend.choose("linear", "cuda")
    assert choice.backend == wanted and why in choice.reason
    assert backend.choose("linear", "cpu").backend == "reference"
    facts = backend.machine(torch.device("cuda"))
    kernels = {"triton": (triton, "linear"), "cuda": (cuda, "cuda_linear")}
    assert facts.built == {name for name, (there, _) in kernels.items() if there}
    assert facts.promoted == {n for n, (there, k) in kernels.items() if there and k in passed}
    assert backend.machine(torch.device("cuda"), "attention").built <= {"triton"}


@pytest.mark.parametrize(
    ("op", "device", "built", "wanted", "why"),
    [
        ("linear", "cuda", "cuda", "cuda", "BACKEND=cuda, where it can run"),
        ("linear", "cuda", "triton", "reference", "the CUDA kernel is not built"),
        ("linear", "cpu", "cuda", "reference", "no cuda kernel runs on cpu"),
        ("layer_norm", "cuda", "both", "reference", "layer_norm has no CUDA kernel"),
    ],
)
def test_the_cuda_back_end_by_force(monkeypatch, op, device, built, wanted, why):
    monkeypatch.setattr(backend, "has_triton", lambda: BUILT[built][0])
    monkeypatch.setattr(backend, "has_cuda_gemm", lambda: BUILT[built][1])
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", "cuda")
    choice = backend.choose(op, device)
    assert choice.backend == wanted and why in choice.reason


@pytest.mark.parametrize("missing", ["host", "arch", "library", None])
def test_the_compiled_gemm_needs_its_planner_and_its_architecture(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (
            None
            if name == "sorted_kernels._host" and missing == "host"
            else find("sorted_kernels" if name == "sorted_kernels._host" else name)
        ),
    )
    archs = ["80"] if missing == "arch" else ["80", "90a"]
    monkeypatch.setattr(backend, "manifest", lambda: {"archs": archs})
    monkeypatch.setattr(backend, "load_compiled", lambda: missing != "library")
    assert backend.has_cuda_gemm() is (missing is None)


def doctor(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(app.console, "width", 200)  # whoever imported it first
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--explain", *map(str, arguments)])
    printed = capsys.readouterr()
    return exit_.value.code, printed.out, printed.err


@pytest.fixture
def everything_built(monkeypatch):
    """Both kernels are there, and no GPU has run them."""
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "has_cuda_gemm", lambda: True)
    monkeypatch.setattr(backend, "promoted", lambda op: False)


def explained(capsys, monkeypatch, *arguments):
    """The back end that ``doctor`` prints, by product and machine, and its reasons."""
    code, out, _ = doctor(capsys, monkeypatch, *arguments)
    assert code == 0
    rows = (re.split(r"\s*│\s*", line.strip("│ \n")) for line in out.splitlines())
    return {(row[0], row[1].removeprefix("here: ")): tuple(row[2:4]) for row in rows if row[3:]}


@pytest.mark.parametrize("experimental", ["0", "1"])
def test_doctor_explains(capsys, monkeypatch, everything_built, experimental):
    monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", experimental)
    sizes = ("linear", 8, 4096, 4096, 1000, 1000, "bfloat16")
    found = explained(capsys, monkeypatch, *sizes, "--activation", "relu")
    for product in (*PRODUCTS, "wgrad into float32"):
        assert found[product, "cpu"][0] == "library"
        for gpu, kernel in (("an sm_90 GPU", "cuda"), ("an sm_80 GPU", "triton")):
            wanted = kernel if experimental == "1" else "reference"
            assert found[product, gpu][0] == ("library" if product == "wgrad" else wanted)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sizes", [(40, 64, 48, 37, 21), (9, 64, 48, 64, 48), (700, 24, 17, 24, 9)])
def test_doctor_prints_what_dispatch_does(
    capsys, monkeypatch, everything_built, fake_gpu, sizes, ragged
):
    """The problems of real calls are those that are explained, but for the batch's regime."""
    asked, on_gpu = fake_gpu
    monkeypatch.setenv("SORTED_KERNELS_EXPERIMENTAL", "1")
    found = explained(
        capsys, monkeypatch, "linear", *sizes, "bfloat16", *(["--ragged"] if ragged else [])
    )
    rows, full_m, full_k, m, k = sizes
    parent = on_gpu(torch.empty(full_m, full_k, dtype=BF16))
    wide = on_gpu(torch.empty(full_m, full_k))
    x, dy = (on_gpu(torch.empty(rows, size, dtype=BF16)) for size in (k, m))
    for product, *operands in (
        ("forward", x, parent),
        ("dgrad", dy, parent),
        ("wgrad", dy, x, parent[:m, :k]),
        ("wgrad", dy, x, wide[:m, :k]),
    ):
        backend.linear_implementation(product, tuple(operands), m, k, ragged=ragged)
    assert len(asked) == 4
    for problem in asked:
        for name, machine in (
            ("an sm_90 GPU", TRYING),
            ("an sm_80 GPU", replace(TRYING, capability=(8, 0))),
        ):
            assert found[problem.label, name] == tuple(choose_linear(problem, machine))


def test_doctor_says_what_a_forced_back_end_cannot(capsys, monkeypatch):
    monkeypatch.setenv("SORTED_KERNELS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, _ = doctor(capsys, monkeypatch, "linear", 8, 64, 64, 8, 8, "float32")
    assert code == 0 and "SORTED_KERNELS_BACKEND=triton, but" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("norm", 1, 2, 2, 1, 1, "float32"), "--explain is 'norm'; allowed is linear"),
        (("linear", 0, 2, 2, 1, 1, "float32"), "N is 0; at least 1"),
        (("linear", 1, 2, 2, 3, 1, "float32"), "m is 3; allowed are 1 to M, which is 2"),
        (("linear", 1, 2, 2, 1, 0, "float32"), "k is 0; allowed are 1 to K, which is 2"),
        (("linear", 1, 2, 2, 1, 1, "int8"), "dtype is 'int8'; allowed are float32, bfloat16"),
        (("linear", 1, 2, 2, 1, 1), "--explain.* requires 7 arguments"),
        (("linear", "x", 2, 2, 1, 1, "float32"), "--explain"),
        (
            ("linear", 1, 2, 2, 1, 1, "float32", "--activation", "tanh"),
            "--activation is 'tanh'; allowed are none, relu",
        ),
    ],
    ids=["op", "rows", "m", "k", "dtype", "too-few", "no-number", "activation"],
)
def test_doctor_refuses(capsys, monkeypatch, arguments, message):
    code, out, err = doctor(capsys, monkeypatch, *arguments)
    assert code == 2 and out == "" and re.match(f"error: .*{message}", err)
