"""A recorded GPU run: what is written about it, and which kernels it promotes."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from bench import environment, machine, promote
from sorted_kernels.ops import backend, optimizer, promotion

KERNELS = tuple(promotion.SOURCES)
MODULES = sorted(set(itertools.chain(*promote.TESTS.values())))
LOGS = ("environment.json", "tests.log", "sanitizer.log", "benchmarks.csv")
JUNIT = """<testsuites><testsuite>
<testcase classname="python_tests.test_triton_norm" name="test_a[3]"/>
<testcase classname="python_tests.test_triton_norm" name="test_b"><failure message="no"/></testcase>
<testcase classname="python_tests.test_triton_norm" name="test_c"><error message="no"/></testcase>
<testcase classname="python_tests.test_triton_linear.TestIt" name="test_d"/>
<testcase classname="python_tests.test_triton_linear.TestIt" name="test_e"><skipped message="why"/>
</testcase></testsuite></testsuites>"""


@pytest.fixture
def record(monkeypatch, tmp_path):
    """A place for ``promoted.json``, and digests of sources that are no real ones."""
    path = tmp_path / "package" / "promoted.json"
    path.parent.mkdir()
    monkeypatch.setattr(promotion, "RECORD", path)
    monkeypatch.setattr(promotion, "digest", lambda kernel: f"digest of {kernel}")
    return path


def good_run():
    """What ``environment.json`` says of a run in which all went well."""
    passed = {"passed": 12, "failed": [], "skipped": ["test_x: no Triton"]}
    return {
        "gpu": {"name": "GPU"},
        "stages": [
            {"stage": stage, "outcome": "passed", "seconds": 3}
            for stage in ("build", "tests", "exercise", "memcheck", "racecheck", "benchmarks")
        ],
        "tests": {f"python_tests.{name}": dict(passed) for name in MODULES},
        "kernels": {kernel: f"digest of {kernel}" for kernel in KERNELS},
    }


@pytest.fixture
def results(tmp_path):
    """A folder that holds a run's files; its ``environment.json`` is written by the test."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in LOGS[1:]:
        (folder / name).write_text("something\n")
    return folder


def promote_run(results, run):
    (results / "environment.json").write_text(json.dumps(run))
    return promote.main([str(results)])


def change(run, **stages):
    """The run with other outcomes of some stages; None: the stage is not there."""
    for name, outcome in stages.items():
        run["stages"] = [
            stage | {"outcome": outcome if stage["stage"] == name else stage["outcome"]}
            for stage in run["stages"]
            if stage["stage"] != name or outcome
        ]
    return run


def test_every_kernel_has_tests_and_a_gpu_run_selects_them():
    """By the fixture or by the module's constant: see ``conftest.py``."""
    assert set(promote.TESTS) == set(KERNELS)
    for name in MODULES:
        text = (Path(__file__).parent / f"{name}.py").read_text()
        assert re.search(r"^def \w+\(device\b|^from .*\bDEVICE\b|^    DEVICE,$", text, re.M)


def test_a_run_in_which_all_passed_promotes_everything(record, results, capsys):
    assert promote_run(results, good_run()) == 0
    assert json.loads(record.read_text()) == {kernel: f"digest of {kernel}" for kernel in KERNELS}
    assert list(record.parent.iterdir()) == [record]
    assert capsys.readouterr().out == "".join(f"{kernel}: promoted\n" for kernel in KERNELS)
    for kernel in KERNELS:  # the reader of the record agrees
        assert promotion.promoted.__wrapped__(kernel)


def test_only_kernels_of_the_sources_built_are_promoted(record, results, capsys):
    run = good_run()
    run["kernels"]["linear"] = "digest of other sources"
    del run["kernels"]["embedding"]
    record.write_text(json.dumps({"linear": "old", "rms_norm": "older"}))
    assert promote_run(results, run) == 0
    passed = {kernel: f"digest of {kernel}" for kernel in KERNELS if kernel != "embedding"}
    assert json.loads(record.read_text()) == passed | {"linear": "old"}
    out = capsys.readouterr().out
    assert "linear: experimental: its sources are not those of the run\n" in out
    assert "embedding: experimental: the run did not use it\n" in out
    assert not promotion.promoted.__wrapped__("linear")


def test_a_kernel_that_is_not_compiled_here_is_not_promoted(record, results, monkeypatch, capsys):
    run = good_run()
    run["kernels"]["staircase_optimizer"] = None
    monkeypatch.setattr(promotion, "digest", lambda kernel: None)
    assert promote_run(results, run) == 1 and not record.exists()
    out = capsys.readouterr().out
    assert "staircase_optimizer: experimental: the run did not use it\n" in out
    assert "linear: experimental: it is not compiled here" in out


@pytest.mark.parametrize(
    "stages, reason",
    [
        ({"memcheck": "failed with exit code 99"}, "memcheck: failed with exit code 99"),
        ({"racecheck": "left out: compute-sanitizer is not there"}, "racecheck: left out"),
        ({"exercise": None}, "exercise: did not run"),
    ],
    ids=["found", "left-out", "absent"],
)
def test_without_a_clean_sanitizer_nothing_is_promoted(record, results, capsys, stages, reason):
    assert promote_run(results, change(good_run(), **stages)) == 1
    assert capsys.readouterr().out.count(f"experimental: {reason}") == len(KERNELS)
    assert not record.exists()


def test_a_run_without_a_gpu_promotes_nothing(record, results, capsys):
    record.write_text("{}")
    assert promote_run(results, good_run() | {"gpu": None}) == 1
    assert capsys.readouterr().out.count("the run had no GPU") == len(KERNELS)
    assert record.read_text() == "{}", "not even reformatted"


@pytest.mark.parametrize("module", promote.TESTS["layer_norm"])
@pytest.mark.parametrize(
    "counts, reason",
    [
        ({"passed": 11, "failed": ["test_x"], "skipped": []}, "tests of {} failed"),
        ({"passed": 0, "failed": [], "skipped": ["x: y"]}, "no test of {} passed"),
        (None, "no test of {} passed"),
    ],
    ids=["failed", "skipped", "absent"],
)
def test_a_kernel_needs_all_its_tests_and_one_of_each_file(
    record, results, capsys, counts, reason, module
):
    run = good_run()
    run["tests"][f"python_tests.{module}"] = counts
    if counts is None:
        del run["tests"][f"python_tests.{module}"]
        run["tests"][f"python_tests.{module}_of_another"] = {"passed": 3, "failed": []}
    assert promote_run(results, run) == 0
    assert capsys.readouterr().out.count(f"experimental: {reason.format(module)}\n") == 2
    assert set(json.loads(record.read_text())) == set(KERNELS) - {"layer_norm", "rms_norm"}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_run_without_its_logs_is_refused(record, results, capsys, name, empty):
    (results / "environment.json").write_text(json.dumps(good_run()))
    (results / name).unlink()
    if empty:
        (results / name).touch()
    record.write_text("{}")
    assert promote.main([str(results)]) == 2
    assert f"{name} is missing or empty" in capsys.readouterr().err
    assert record.read_text() == "{}"


@pytest.mark.parametrize(
    "text", ['{"gpu": ', "[]", '{"gpu": {}, "stages": []}'], ids=["cut-off", "list", "incomplete"]
)
def test_a_run_that_cannot_be_read_is_refused(record, results, capsys, text):
    (results / "environment.json").write_text(text)
    assert promote.main([str(results)]) == 2
    assert "nothing promoted: " in capsys.readouterr().err and not record.exists()


def test_a_record_that_cannot_be_read_is_left_as_it_is(record, results, capsys):
    record.write_text("{ broken")
    assert promote_run(results, good_run()) == 2
    assert record.read_text() == "{ broken"


def test_an_error_in_writing_leaves_the_old_record_alone(record, results, monkeypatch):
    record.write_text('{"linear": "old"}')

    def fail(self, target):
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        promote_run(results, good_run())
    assert record.read_text() == '{"linear": "old"}' and list(record.parent.iterdir()) == [record]


def test_digests_are_those_of_kernels_in_use(monkeypatch):
    """A kernel in whose place plain PyTorch ran was not tested by the run."""
    monkeypatch.setattr(promotion, "digest", lambda kernel: f"digest of {kernel}")
    used = {"linear", "embedding", "staircase_optimizer"}
    monkeypatch.setattr(optimizer, "use_native", lambda device: device == "cuda")
    monkeypatch.setattr(
        backend,
        "choose",
        lambda op, device: backend.Choice("triton" if op in used else "reference", device),
    )
    assert environment.digests() == {
        kernel: f"digest of {kernel}" if kernel in used else None for kernel in KERNELS
    }


def test_experimental_kernels_that_are_off_have_no_digest(monkeypatch):
    monkeypatch.delenv("SORTED_KERNELS_EXPERIMENTAL", raising=False)
    monkeypatch.delenv("SORTED_KERNELS_BACKEND", raising=False)
    digests = environment.digests()
    assert set(digests) == set(KERNELS)
    assert {name for name in KERNELS if digests[name]} <= set(filter(promotion.promoted, KERNELS))


def test_environment_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "0123456789ab")
    (tmp_path / "stages.tsv").write_text("build\tpassed\t18\ntests\tleft out: no GPU\t0\n")
    (tmp_path / "tests.xml").write_text(JUNIT)
    out = tmp_path / "out"
    out.mkdir()
    stages, tests = str(tmp_path / "stages.tsv"), str(tmp_path / "tests.xml")
    environment.main([str(out), "--stages", stages, "--junit", tests])
    assert [path.name for path in out.iterdir()] == ["environment.json"]
    written = json.loads((out / "environment.json").read_text())
    assert written["commit"] == "0123456789ab" and written["packages"]["torch"]
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    assert written["stages"] == [
        {"stage": "build", "outcome": "passed", "seconds": 18},
        {"stage": "tests", "outcome": "left out: no GPU", "seconds": 0},
    ]
    assert written["tests"] == {
        "python_tests.test_triton_norm": {
            "passed": 1,
            "failed": ["test_b", "test_c"],
            "skipped": [],
        },
        "python_tests.test_triton_linear.TestIt": {
            "passed": 1,
            "failed": [],
            "skipped": ["test_e: why"],
        },
    }
    assert set(written["kernels"]) == set(KERNELS)


def test_environment_of_a_run_that_tested_nothing(tmp_path):
    environment.main([str(tmp_path), "--junit", str(tmp_path / "absent.xml")])
    written = json.loads((tmp_path / "environment.json").read_text())
    assert (written["stages"], written["tests"]) == ([], {})


def test_commit_is_named_by_the_variable_where_there_is_no_git(monkeypatch):
    commit = machine.commit.__wrapped__
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "output_of", lambda *command: None)
    assert commit() == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "named")
    assert commit() == "named"


@pytest.mark.parametrize("changes, expected", [("", "abc"), (" M setup.py", "abc-dirty")])
def test_commit_says_when_files_differ_from_it(monkeypatch, changes, expected):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    answers = {"rev-parse": "abc", "status": changes}
    monkeypatch.setattr(machine, "output_of", lambda *command: answers[command[1]])
    assert machine.commit.__wrapped__() == expected


def test_a_program_that_is_absent_or_fails_has_no_output():
    assert machine.output_of("no-such-program") is None
    assert machine.output_of(sys.executable, "-c", "print(' x '); raise SystemExit(3)") is None
    assert machine.output_of(sys.executable, "-c", "print(' x ')") == "x"
