"""``bench/run_gpu.sh``: its stages, time limits and exit codes, with stand-ins for every program.

The script runs in a copy of its folder, and Python, nvcc and compute-sanitizer are shell scripts,
so that the way through a machine with a GPU is seen on any machine.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "run_gpu.sh"
LOGS = ["bench.log", "build.log", "sanitizer.log", "tests.log"]
TOOLS = ["bash", "basename", "cat", "cp", "dirname", "mkdir", "mktemp", "realpath", "rm", "sed"]
TOOLS += ["sleep", "tail", "timeout"]
# Python: whether there is a GPU is HAS_GPU; a call whose words match FAILS exits with 3, one that
# matches HANGS sleeps. The benchmarks write rows; the report keeps the stages it is given.
PYTHON = """#!/bin/bash
case "$*" in
  *cuda.is_available*) exit $((1 - ${HAS_GPU:-1})) ;;
  *find_spec*) [[ -z "$LACKS" || "$*" != *"'$LACKS'"* ]]; exit ;;
esac
switches="experimental=$SORTED_KERNELS_EXPERIMENTAL interpret=${TRITON_INTERPRET-unset}"
echo "$* [$switches]" >> "$CALLS"
echo "said by $*"
if [[ -n "$HANGS" && "$*" == *$HANGS* ]]; then
  [[ -z "$DEAF" ]] || trap "" TERM
  exec 9> "$PIPE"; echo here >&9; sleep 60; echo slept >&9
fi
[[ -z "$FAILS" || "$*" != *$FAILS* ]] || exit 3
case "$*" in
  "-m bench --out"*) echo rows > "$4/benchmarks.csv" ;;
  "-m bench.environment"*) cp "$5" "$3/environment.json"; echo "$BENCH_COMMIT" > "$3/commit" ;;
esac
"""
PASS_ON = '#!/bin/bash\nwhile [[ "$1" != */python ]]; do shift; done\nexec "$@"\n'
GPU_STAGES = ["build", "tests", "exercise", "memcheck", "racecheck", "benchmarks", "pictures"]
DRY_STAGES = ["tests-collected", "tests", "exercise-cpu", "sanitizer", "benchmarks-cpu-quick"]
DRY_STAGES += ["benchmarks"]


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A folder with the script in it, programs that stand in for real ones, and what they did."""

    def __init__(self, folder):
        self.root, self.out, self.calls_file = folder / "tree", folder / "out", folder / "calls"
        self.package, self.script = self.root / "sorted_kernels", self.root / "bench" / SCRIPT.name
        self.package.mkdir(parents=True)
        self.script.parent.mkdir()
        shutil.copy(SCRIPT, self.script)
        self.programs = folder / "programs"
        self.programs.mkdir()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(shutil.which(tool))
        write_program(self.programs / "python", PYTHON)
        write_program(self.programs / "nvcc", "#!/bin/bash\n")
        write_program(self.programs / "compute-sanitizer", PASS_ON)

    def limits(self, **limits):
        """Write other seconds into the copy of the script."""
        text = self.script.read_text()
        for name, seconds in limits.items():
            text, changed = re.subn(rf"\b{name}=\d+", f"{name}={seconds}", text)
            assert changed == 1
        self.script.write_text(text)

    def start(self, *arguments, cwd=None, **variables):
        env = {"PATH": str(self.programs), "PYTHON": str(self.programs / "python")}
        env |= {"CALLS": str(self.calls_file), "CUDA_HOME": "/nowhere", "PIPE": os.devnull}
        command = ["bash", str(self.script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=cwd or self.root, env=env | variables, **pipes)

    def run(self, *arguments, out=True, **options):
        """The exit code, and what was printed; nothing may go wrong in the script itself."""
        process = self.start(*arguments, *([str(self.out)] if out else []), **options)
        stdout, stderr = process.communicate()
        assert "run_gpu.sh: line" not in stderr, stderr
        return process.returncode, stdout + stderr

    def stages(self):
        """Outcome of each stage in order, as the report got them."""
        lines = (self.out / "environment.json").read_text().splitlines()
        return {name: outcome for name, outcome, _ in (line.split("\t") for line in lines)}

    def calls(self):
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_a_machine_with_a_gpu_passes_every_stage(checkout):
    code, said = checkout.run(TRITON_INTERPRET="1", SORTED_KERNELS_BACKEND="reference")
    assert code == 0 and "0 failed; results in" in said
    assert checkout.stages() == dict.fromkeys(GPU_STAGES, "passed")
    words = [call.split(" [")[0].split() for call in checkout.calls()]
    assert [" ".join(each[:3]) for each in words] == [
        "setup.py build_ext --inplace",
        "-m pytest python_tests",
        *["-m bench.exercise_kernels"] * 3,
        "-m bench --out",
        f"-m bench.plot {checkout.out}",
        f"-m bench.environment {checkout.out}",
    ]
    assert words[1][3:5] == ["-m", "gpu"] and "--collect-only" not in words[1]
    assert words[5][4:6] == ["--device", "cuda"] and "--quick" not in words[5]
    assert all("[experimental=1 interpret=unset]" in call for call in checkout.calls())
    assert all((checkout.out / name).stat().st_size for name in [*LOGS, "benchmarks.csv"])


def test_a_dry_run_leaves_out_what_needs_a_gpu_and_says_so(checkout):
    code, said = checkout.run("--dry-run", HAS_GPU="0")
    stages = checkout.stages()
    assert code == 0 and list(stages) == ["build", *DRY_STAGES, "pictures"]
    left_out = [name for name, outcome in stages.items() if outcome == "left out: no GPU"]
    assert left_out == ["tests", "sanitizer", "benchmarks"]
    assert all(stages[name] == "passed" for name in set(stages) - set(left_out))
    assert all(f"{name}: LEFT OUT: no GPU" in said for name in left_out)
    assert all((checkout.out / name).stat().st_size for name in LOGS)
    assert any("-m gpu --collect-only" in call for call in checkout.calls())
    assert any("bench.exercise_kernels --device cpu" in call for call in checkout.calls())


def test_a_dry_run_is_one_on_a_machine_with_a_gpu_too(checkout):
    assert checkout.run("--dry-run")[0] == 0
    assert "memcheck" not in checkout.stages()


def test_without_a_gpu_only_a_dry_run_starts(checkout):
    code, said = checkout.run(HAS_GPU="0")
    assert code == 2 and "no NVIDIA GPU" in said and checkout.calls() == []


@pytest.mark.parametrize(
    "fails, stages",
    [
        ("build_ext", ["build"]),
        ("-m pytest", ["tests"]),
        ("exercise_kernels", ["exercise", "memcheck", "racecheck"]),
        ("-m bench --out", ["benchmarks"]),
        ("bench.plot", ["pictures"]),
    ],
)
def test_a_stage_that_fails_does_not_stop_the_others(checkout, fails, stages):
    code, said = checkout.run(FAILS=fails)
    expected = dict.fromkeys(GPU_STAGES, "passed")
    expected |= dict.fromkeys(stages, "failed with exit code 3")
    if "benchmarks" in stages:
        expected["pictures"] = "left out: no measurement"
    assert code == 1 and checkout.stages() == expected
    assert f"{len(stages)} failed; results in" in said and "| said by" in said


def test_a_report_that_fails_is_a_failure(checkout):
    code, said = checkout.run(FAILS="bench.environment")
    assert code == 1 and "1 failed; results in" in said


def test_what_does_not_end_when_told_to_is_killed(checkout, tmp_path):
    checkout.limits(ENVIRONMENT=1, KILL=1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = checkout.start(str(checkout.out), HANGS="bench.environment", PIPE=str(pipe), DEAF="1")
    assert pipe.read_text() == "here\n", "it goes on"
    assert "1 failed; results in" in process.communicate()[0] and process.returncode == 1


@pytest.mark.parametrize(
    "hidden, stage, outcome",
    [
        ("nvcc", "build", "nvcc is not there"),
        ("pybind11", "build", "python has no pybind11"),
        ("compute-sanitizer", "sanitizer", "compute-sanitizer is not there"),
    ],
)
def test_a_missing_tool_fails_a_gpu_run_but_no_dry_run(checkout, hidden, stage, outcome):
    (checkout.programs / hidden).unlink(missing_ok=True)
    code, said = checkout.run(LACKS=hidden)
    assert code == 1 and "1 failed" in said
    assert re.fullmatch(f"left out: .*{outcome}", checkout.stages()[stage])
    assert outcome in (checkout.out / f"{stage}.log").read_text()
    assert checkout.run("--dry-run", HAS_GPU="0", LACKS=hidden)[0] == 0


def test_pictures_are_left_out_without_matplotlib(checkout):
    assert checkout.run(LACKS="matplotlib")[0] == 0
    assert (
        checkout.stages()["pictures"] == f"left out: {checkout.programs}/python has no matplotlib"
    )


def test_a_stage_over_its_time_is_ended_and_the_next_begins(checkout):
    checkout.limits(TESTS=1)
    code, _ = checkout.run(HANGS="-m pytest")
    assert code == 1
    assert checkout.stages() == dict.fromkeys(GPU_STAGES, "passed") | {
        "tests": "failed: over its 1s"
    }


def test_stages_for_which_no_time_is_left_are_left_out(checkout):
    checkout.limits(TOTAL=5, REPORT=0)
    code, said = checkout.run(HANGS="build_ext")
    assert code == 1 and "6 failed" in said
    stages = checkout.stages()
    assert re.fullmatch("failed: over its [1-5]s", stages.pop("build"))
    assert stages.pop("pictures") == "left out: no measurement"
    assert set(stages.values()) == {"left out: no time left"} and len(stages) == 5


def test_all_limits_together_are_under_nine_minutes():
    limits = dict(re.findall(r"\b([A-Z]+)=(\d+)", SCRIPT.read_text()))
    total, report, pictures, environment, kill = (
        int(limits[name]) for name in ("TOTAL", "REPORT", "PICTURES", "ENVIRONMENT", "KILL")
    )
    assert report >= pictures + kill, "benchmarks leave time for the pictures"
    assert total + kill + environment + kill <= 540


def test_ending_the_script_ends_what_it_runs(checkout, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = checkout.start(str(checkout.out), HANGS="-m pytest", PIPE=str(pipe))
    with pipe.open() as file:  # ends when nobody has the other end any more
        assert file.readline() == "here\n"
        process.send_signal(signal.SIGTERM)
        assert file.read() == "", "the stage goes on"
    process.communicate()
    assert process.returncode == 130 and not checkout.out.joinpath("environment.json").exists()


@pytest.mark.parametrize("manifest", [None, "of that library"], ids=["unknown", "known"])
def test_a_library_is_taken_with_its_manifest_instead_of_a_build(checkout, tmp_path, manifest):
    """A manifest of another build would let sources be promoted that never ran."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kernels.so").write_text("new")
    if manifest:
        (elsewhere / "_build.json").write_text(manifest)
    (checkout.package / "_kernels.so").write_text("old")
    (checkout.package / "_build.json").write_text("of the old library")
    assert checkout.run("--library", "elsewhere/kernels.so", cwd=tmp_path)[0] == 0
    assert (checkout.package / "_kernels.so").read_text() == "new"
    kept = checkout.package / "_build.json"
    assert (kept.read_text() if kept.exists() else None) == manifest
    known = "those in _build.json" if manifest else "not known, so that none of it can be promoted"
    assert checkout.stages()["build"] == f"left out: taking kernels.so; its sources are {known}"
    assert not any("build_ext" in call for call in checkout.calls())


def test_the_library_in_place_keeps_its_manifest(checkout):
    library, manifest = checkout.package / "_kernels.so", checkout.package / "_build.json"
    library.write_text("library")
    manifest.write_text("manifest")
    assert checkout.run("--library", str(library))[0] == 0
    assert (library.read_text(), manifest.read_text()) == ("library", "manifest")


def test_from_another_folder_with_relative_paths(checkout, tmp_path):
    arguments = ["--dry-run", "--commit", "named", "out"]
    code, _ = checkout.run(*arguments, out=False, cwd=tmp_path, PYTHON="programs/python")
    assert code == 0 and (checkout.out / "commit").read_text() == "named\n"
    assert checkout.run("--dry-run", PYTHON="python")[0] == 0


def test_results_of_an_earlier_run_are_gone(checkout):
    checkout.out.mkdir()
    for name in (*LOGS, "benchmarks.csv", "speedup.png", "step_time.png", "notes"):
        (checkout.out / name).write_text("old\n")
    assert checkout.run(FAILS="-m bench --out")[0] == 1
    left = {path.name for path in checkout.out.iterdir() if "old" in path.read_text()}
    assert left == {"notes"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "OUT_DIR is missing"),
        (["a", "b"], "more than one OUT_DIR: a and b"),
        (["--fast", "a"], "unknown option --fast"),
        (["a", "--commit"], "--commit needs a name"),
        (["a", "--library"], "--library needs a file"),
        (["a", "--library", "absent.so"], "no such library: absent.so"),
    ],
)
def test_bad_arguments(checkout, arguments, message):
    code, said = checkout.run(*arguments, out=False)
    assert code == 2 and f"run_gpu.sh: {message}\n" in said and "--dry-run " in said
    assert checkout.calls() == [] and not (checkout.root / "a").exists()


def test_a_python_that_is_not_there(checkout):
    code, said = checkout.run(PYTHON="./absent", cwd=checkout.root.parent)
    assert code == 2 and "PYTHON=./absent is not there" in said and "OUT_DIR" in said


def test_help(checkout):
    code, said = checkout.run("--help", out=False)
    assert code == 0 and said.lstrip().startswith("PYTHON=python3 bench/run_gpu.sh [--dry-run]")
