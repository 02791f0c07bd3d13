"""The README's measured section: it says what the CSV files say, of any device and any family."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from bench import report  # noqa: E402
from bench.goals import EXPECTED, LIMIT, Goal, family_of, goals_for  # noqa: E402
from bench.rows import append_rows, parse_sizes  # noqa: E402
from sorted_kernels.ops import promotion  # noqa: E402
from support.bench_rows import ROW  # noqa: E402

GPU = replace(
    ROW, device="NVIDIA H200", dtype="bfloat16", torch="2.11.0", commit="fedcba987654", threads=16
)
LIMITS = [
    replace(GPU, kernel="limit", mode="copy", metric="GB/s", p50=4000.0, dtype="float32"),
    replace(GPU, kernel="limit", mode="matmul", metric="TFLOP/s", p50=800.0),
]
SQUARE = "N=4096 M=4096 K=4096 m=4096 k=4096"
ODD = "N=4096 M=4096 K=4096 m=2047 k=2045"


def rows_of(kernel, mode, sizes, flops=0, work=0, metric="ms", **medians):
    return [
        replace(
            GPU, kernel=kernel, mode=mode, sizes=sizes, flops=flops, bytes=work, metric=metric,
            provider=name, p20=p50, p50=p50, p80=p50,
        )
        for name, p50 in medians.items()
    ]  # fmt: skip


INVENTED = [
    *LIMITS,
    *rows_of("linear", "forward", SQUARE, 2 * 4096**3, B1=0.200, B2=0.19, triton=0.3, ours=0.180),
    *rows_of("linear", "dgrad", SQUARE, 2 * 4096**3, B1=0.200, B2=0.19, ours=0.220),
    *rows_of("linear", "forward", ODD, B1=0.9, padded=0.095, ours=0.25),
    *rows_of("linear", "wgrad", ODD, B1=0.9, ours=0.45),
    *rows_of("host", "forward+backward", "N=1 M=64 K=64 m=8 k=8", metric="us", B0=100.0, ours=42.0),
    *rows_of("adamw", "step", "tensors=8 M=64 K=64 m=16 k=16", work=4000000, B0=1.6, ours=0.002),
    *rows_of("ragged_linear", "forward", "N=4096 submodels=16 spread=even", B1=1.3, ours=1.0),
    *rows_of("telepathy", "read", "minds=2", metric="thoughts/s", B9=3.0, ours=5.0),
    *rows_of("linear_step", "train", "N=512 M=4096 K=4096 m=512 k=512", B0=9.0, B2=0.3, ours=0.25),
]


@pytest.fixture
def results(tmp_path):
    append_rows(tmp_path / "results" / "h200" / "benchmarks.csv", INVENTED)
    return tmp_path / "results"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return path


def run(readme, results, *arguments):
    return report.main([*arguments, "--readme", str(readme), "--results", str(results)])


def line(text, start):
    (found,) = [each for each in text.splitlines() if each.startswith(f"| {start}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_committed_readme_is_what_the_committed_files_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_everything_measured_is_in_the_readme(results, readme):
    assert run(readme, results) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for word in ("NVIDIA H200", "2.11.0", "fedcba987654", "copy 4e+03 GB/s", "800 TFLOP/s"):
        assert word in text
    forward = line(text, "linear forward 4096x4096, 4096 rows, 4096x4096")
    times = ["", "0.20 ms", "0.19 ms", "", "0.30 ms", "0.18 ms"]  # B0, B1, B2, padded, triton, ours
    assert forward[1:] == [*times, "0.95", "", "95%"]
    assert line(text, "telepathy read minds=2")[1:] == ["3 thoughts/s", "5 thoughts/s"]
    assert "spread=even" in text and "42 us" in text and "No figure is from a GPU" not in text
    for name in report.CAPTIONS:
        assert (f"(bench/results/h200/{name})" in text) == (results / "h200" / name).is_file()
    assert "(bench/results/h200/limit_share.png)" in text


def test_goals_are_met_or_missed_by_how_much(results, readme):
    run(readme, results)
    text = readme.read_text()
    aligned = "prefix GEMM, aligned and odd, "
    assert line(text, f"{aligned}forward: at most 1.00x of B1")[1:] == ["1 of 1", ""]
    missed = line(text, f"{aligned}dgrad: at most 1.00x of B1")
    assert missed[1:] == ["0 of 1", "4096 rows, 4096x4096 of 4096x4096 by 10%"]
    assert line(text, f"{aligned}forward: at least 95% of the limit")[1] == "1 of 1"
    assert line(text, f"{aligned}dgrad: at least 95% of the limit")[2].endswith("by 22%")
    assert line(text, f"{aligned}forward: at least 3x faster than B1")[1] == "1 of 1"
    assert line(text, f"{aligned}wgrad: at least 3x faster than B1")[2].endswith("by 50%")
    assert line(text, f"{aligned}wgrad: at most 1.05x of padded")[1:] == [
        "0 of 1", "1 without padded",
    ]  # fmt: skip
    assert line(text, "host time of a call: at least 2.5x faster than B0")[2].endswith("by 5%")
    assert line(text, "ragged batches: at least 1.3x")[1] == "1 of 1"
    assert line(text, "ragged batches: at least 85%")[1:] == ["0 of 1", "1 without limit"]
    assert line(text, "staircase AdamW, step: at least 15.2x faster than B0")[1] == "1 of 1"
    assert line(text, "staircase AdamW, step: at least 92%")[2].endswith("by 84%")
    assert line(text, "training step of a linear layer: at least 39.6x")[2].endswith("by 10%")
    assert line(text, "LoRA")[1] == line(text, "RMS norm")[1] == "not measured"


def test_a_cpu_comes_first_and_has_its_own_goals(results, readme):
    append_rows(results / "cpu" / "benchmarks.csv", [replace(ROW, provider="B2", p50=0.25), ROW])
    run(readme, results)
    text = readme.read_text()
    cpu, gpu = text.split("### NVIDIA H200")
    assert line(cpu, "training step of a linear layer: at most 1.10x of B2")[2].endswith("by 82%")
    assert line(cpu, "training step of a linear layer: at least 8x")[2] == "1 without B0"
    assert "with local changes" in cpu and "LoRA" not in cpu and "LoRA" in gpu


def test_check_sees_any_difference(results, readme, capsys):
    run(readme, results)
    before = readme.read_text()
    assert run(readme, results, "--check") == 0
    readme.write_text(before.replace("0.18 ms", "0.17 ms"))
    assert run(readme, results, "--check") == 1 and "+| linear forward" in capsys.readouterr().out
    assert "0.17 ms" in readme.read_text(), "checking writes nothing"
    readme.write_text(before)
    append_rows(results / "h200" / "benchmarks.csv", rows_of("late", "x", "n=1", ours=1.0))
    assert run(readme, results, "--check") == 1
    said = capsys.readouterr()
    assert "limit_share.png was not drawn from the CSV" in said.out and "late x" in said.out
    assert run(readme, results) == 0 and run(readme, results, "--check") == 0
    (results / "h200" / "limit_share.png").unlink()
    assert run(readme, results, "--check") == 1


def test_check_sees_a_picture_of_other_rows(results, readme, capsys):
    run(readme, results)
    file = results / "h200" / "benchmarks.csv"
    file.write_text(file.read_text().replace(",193,", ",194,"))  # samples: not in the README
    assert run(readme, results, "--check") == 1
    assert "limit_share.png was not drawn from the CSV" in capsys.readouterr().out


def test_a_later_row_replaces_an_earlier_one(results, readme):
    late = rows_of("linear", "dgrad", SQUARE, 2 * 4096**3, ours=0.199)
    append_rows(results / "h200" / "benchmarks.csv", late)
    run(readme, results)
    found = line(readme.read_text(), "prefix GEMM, aligned and odd, dgrad: at most 1.00x of B1")
    assert found[1:] == ["1 of 1", ""]


@pytest.mark.parametrize("text", ["none", f"{report.END} {report.BEGIN}", report.BEGIN * 2])
def test_a_readme_without_its_markers_is_refused(results, readme, text):
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each and in order"):
        run(readme, results)
    assert readme.read_text() == text


def test_no_results_at_all(tmp_path, readme):
    assert run(readme, tmp_path / "nowhere") == 0
    assert "No figure is from a GPU" in readme.read_text()


def test_kernels_that_no_gpu_has_run(monkeypatch, results, readme):
    run(readme, results)
    assert "passed: `linear`, `layer_norm`" in readme.read_text()
    files = {
        path: report.hashlib.sha256((report.machine.ROOT / path).read_bytes()).hexdigest()
        for sources in promotion.SOURCES.values()
        for path in sources
        if path.startswith("csrc/")
    }
    passed = {name: promotion.digest_of(name, files) for name in promotion.SOURCES}
    monkeypatch.setattr(promotion, "recorded", lambda: passed | {"linear": "of older sources"})
    assert report.never_run() == ["linear"]
    run(readme, results)
    assert readme.read_text().count("has passed: `linear`.\n") == 1


def test_the_repository_and_the_build_digest_sources_alike():
    built = promotion.manifest().get("sources", {})
    if not built:
        pytest.skip("nothing was compiled here")
    files = {path for names in promotion.SOURCES.values() for path in names if path in built}
    root = Path(report.machine.ROOT)
    fresh = {path: report.hashlib.sha256((root / path).read_bytes()).hexdigest() for path in files}
    assert fresh == {path: built[path] for path in files}, "or the build is out of date"


@pytest.mark.parametrize(
    ("kernel", "sizes", "gpu", "goals"),
    [
        ("linear", SQUARE, False, ()),
        ("linear", SQUARE, True, (Goal("B1", 1.0), Goal(LIMIT, 1 / 0.95))),
        ("linear", SQUARE.replace("N=4096", "N=512"), True, (Goal("B1", 1.0),)),
        ("linear", ODD, True, (Goal("B1", 1 / 3), Goal("padded", 1 / 0.95))),
        ("linear_step", "N=32 M=64 K=64 m=8 k=8", False, (Goal("B2", 1.1), Goal("B0", 1 / 8))),
        ("linear_step", "N=33 M=64 K=64 m=8 k=8", False, (Goal("B2", 1.1),)),
        (
            "resnet_step",
            "batch=32 pixels=32 WIDTH=16 width=4",
            False,
            (Goal("B2", 1.1), Goal("B0", 1 / 1.5)),
        ),
        (
            "resnet_step",
            "batch=32 pixels=32 WIDTH=16 width=12",
            False,
            (Goal("B2", 1.1), Goal("B0", 1.0)),
        ),
        ("resnet_step", "batch=32 pixels=32 WIDTH=16 width=16", False, (Goal("B2", 1.1),)),
        ("linear_step", "N=512 M=4096 K=4096 m=1001 k=999", True, (Goal("B2", 1.1),)),
        ("unknown", "a=1", True, ()),
    ],
)
def test_goals_of_a_problem(kernel, sizes, gpu, goals):
    assert goals_for(kernel, "any", parse_sizes(sizes), "bfloat16", gpu) == goals


def test_families():
    assert family_of("linear", True) == "linear" and family_of("linear_step", True) == "linear_step"
    assert family_of("ragged_norm", True) == "ragged" and family_of("linearity", True) is None
    assert family_of("lora", False) is None and set(EXPECTED) == {False, True}
