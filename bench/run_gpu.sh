#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: build, GPU tests, compute-sanitizer, benchmarks.
#
#   PYTHON=python3 bench/run_gpu.sh [--dry-run] [--library FILE] [--commit ID] OUT_DIR
#
#   --dry-run       run what a machine without a GPU can run, and say what was left out
#   --library FILE  take this _kernels.so (and the _build.json beside it) instead of building
#   --commit ID     commit to write into the results, where there is no git
#
# OUT_DIR gets at most 8 files: build.log, tests.log, sanitizer.log, bench.log, benchmarks.csv,
# speedup.png, step_time.png, environment.json. Every stage has a time limit and runs whatever became
# of those before it; all together end within 9 minutes. The exit code is 0 if every stage passed.
# Nothing is downloaded: PYTHON has torch 2.10 or newer, Triton, numpy, pytest, pytest-benchmark,
# hypothesis, CMake, Ninja and pybind11 (matplotlib for the pictures).
set -u

# PICTURES and ENVIRONMENT come last: REPORT keeps time for them, and TOTAL leaves some to spare.
readonly TOTAL=510 BUILD=140 TESTS=150 EXERCISE=80 SANITIZER=80 REPORT=30
readonly PICTURES=20 ENVIRONMENT=15 KILL=5
readonly WITHIN=(timeout --kill-after="$KILL") # what hangs in a driver does not end when told to

usage() { sed -n '4,8s/^# \{0,2\}//p' "$0"; }

die() {
  echo "run_gpu.sh: $1" >&2
  usage >&2
  exit 2
}

dry_run=0 library="" out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --library) [ $# -ge 2 ] || die "--library needs a file"; library="$2"; shift ;;
    --commit) [ $# -ge 2 ] || die "--commit needs a name"; export BENCH_COMMIT="$2"; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) die "unknown option $1" ;;
    *) [ -z "$out" ] || die "more than one OUT_DIR: $out and $1"; out="$1" ;;
  esac
  shift
done
[ -n "$out" ] || die "OUT_DIR is missing"
python="${PYTHON:-python3}"
command -v "$python" > /dev/null || die "PYTHON=$python is not there"
case "$python" in
  /*) ;;
  */*) python="$PWD/$python" ;; # still that file after the change of folder below
esac
[ -z "$library" ] || [ -f "$library" ] || die "no such library: $library"
[ -z "$library" ] || library="$(realpath "$library")"

mkdir -p "$out" || exit 2
out="$(realpath "$out")"
cd "$(dirname "$0")/.." || exit 2

scratch="$(mktemp -d)"
child=""
trap 'rm -rf "$scratch"' EXIT
trap '[ -z "$child" ] || kill "$child"; exit 130' INT TERM
: > "$scratch/stages.tsv"
for name in build.log tests.log sanitizer.log bench.log benchmarks.csv environment.json \
  speedup.png step_time.png; do
  rm -f "$out/$name"
done

# Experimental kernels are what a GPU run is for; Triton must compile, not interpret.
unset TRITON_INTERPRET SORTED_KERNELS_BACKEND
export SORTED_KERNELS_EXPERIMENTAL=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }
remaining() { echo $((TOTAL - SECONDS)); }
failures=0

record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$scratch/stages.tsv"; }

left_out() {
  say "$1: LEFT OUT: $2"
  [ $# -lt 3 ] || echo "left out: $2" >> "$out/$3"
  record "$1" "left out: $2" 0
}

# stage NAME LIMIT LOG COMMAND...: run a command under a time limit, its output into a log.
stage() {
  local name="$1" limit="$2" log="$out/$3" begin="$SECONDS" code outcome=passed
  shift 3
  [ "$limit" -le "$(remaining)" ] || limit="$(remaining)"
  if [ "$limit" -lt 1 ]; then
    failures=$((failures + 1))
    left_out "$name" "no time left" "$(basename "$log")"
    return
  fi
  say "$name: at most ${limit}s"
  echo "\$ $*" >> "$log"
  "${WITHIN[@]}" "$limit" "$@" >> "$log" 2>&1 < /dev/null &
  child=$!
  wait "$child"
  code=$?
  child=""
  if [ "$code" -ne 0 ]; then
    outcome="failed with exit code $code"
    [ "$code" -ne 124 ] && [ "$code" -ne 137 ] || outcome="failed: over its ${limit}s"
    failures=$((failures + 1))
    tail -n 15 "$log" | sed 's/^/        | /'
  fi
  record "$name" "$outcome" $((SECONDS - begin))
  say "$name: $outcome after $((SECONDS - begin))s"
}

has_module() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
has_gpu() {
  "${WITHIN[@]}" 60 "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
}

gpu=0
[ "$dry_run" = 1 ] || ! has_gpu || gpu=1
if [ "$gpu" = 0 ] && [ "$dry_run" = 0 ]; then
  say "no NVIDIA GPU that torch sees; --dry-run runs what can be run without one"
  exit 2
fi
[ "$dry_run" = 0 ] || say "dry run: small cases, and no claim about any GPU"

# --- build --------------------------------------------------------------------------------------
if [ -n "$library" ]; then
  manifest="$(dirname "$library")/_build.json"
  if [ ! "$library" -ef sorted_kernels/_kernels.so ]; then
    rm -f sorted_kernels/_kernels.so sorted_kernels/_build.json # the latter is of another build
    cp "$library" sorted_kernels/_kernels.so || exit 2
    [ ! -f "$manifest" ] || cp "$manifest" sorted_kernels/_build.json || exit 2
  fi
  known="its sources are not known, so that none of it can be promoted"
  [ ! -f sorted_kernels/_build.json ] || known="its sources are those in _build.json"
  left_out build "taking $(basename "$library"); $known" build.log
elif ! command -v nvcc > /dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  left_out build "nvcc is not there" build.log
  [ "$gpu" = 0 ] || failures=$((failures + 1))
elif ! has_module pybind11; then
  left_out build "$python has no pybind11" build.log
  [ "$gpu" = 0 ] || failures=$((failures + 1))
else
  command -v nvcc > /dev/null || export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
  SORTED_KERNELS_BUILD=cuda stage build "$BUILD" build.log \
    "$python" setup.py build_ext --inplace
fi

# --- tests --------------------------------------------------------------------------------------
if [ "$gpu" = 1 ]; then
  stage tests "$TESTS" tests.log \
    "$python" -m pytest python_tests -m gpu -v --durations=10 -p no:cacheprovider \
    --junit-xml="$scratch/tests.xml"
else
  stage tests-collected 60 tests.log \
    "$python" -m pytest python_tests -m gpu --collect-only -p no:cacheprovider
  left_out tests "no GPU" tests.log
fi

# --- compute-sanitizer --------------------------------------------------------------------------
if [ "$gpu" = 0 ]; then
  stage exercise-cpu "$EXERCISE" sanitizer.log "$python" -m bench.exercise_kernels --device cpu
  left_out sanitizer "no GPU" sanitizer.log
elif ! command -v compute-sanitizer > /dev/null; then
  left_out sanitizer "compute-sanitizer is not there" sanitizer.log
  failures=$((failures + 1))
else
  # Without it first: it compiles the Triton kernels, and a wrong result is easier to read here. One
  # process takes each back end in turn: linear's by force, so that none hides behind another.
  stage exercise "$EXERCISE" sanitizer.log "$python" -m bench.exercise_kernels
  for tool in memcheck racecheck; do
    stage "$tool" "$SANITIZER" sanitizer.log \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 \
      "$python" -m bench.exercise_kernels
  done
fi

# --- benchmarks ---------------------------------------------------------------------------------
limit=$(($(remaining) - REPORT))
if [ "$gpu" = 1 ]; then
  stage benchmarks "$limit" bench.log \
    "$python" -m bench --out "$out" --device cuda --seconds $((limit - 15))
else
  stage benchmarks-cpu-quick 120 bench.log "$python" -m bench --out "$out" --device cpu --quick
  left_out benchmarks "no GPU" bench.log
fi

# --- report -------------------------------------------------------------------------------------
if [ ! -f "$out/benchmarks.csv" ]; then
  left_out pictures "no measurement"
elif ! has_module matplotlib; then
  left_out pictures "$python has no matplotlib"
else
  stage pictures "$PICTURES" bench.log "$python" -m bench.plot "$out" "$out/benchmarks.csv" \
    --only speedup step_time # bench.report draws the third from the CSV
fi
[ ! -f "$out/bench.log" ] || tail -n 60 "$out/bench.log"
"${WITHIN[@]}" "$ENVIRONMENT" "$python" -m bench.environment "$out" \
  --stages "$scratch/stages.tsv" --junit "$scratch/tests.xml" || failures=$((failures + 1))

say "stages:"
sed 's/\t/: /; s/\t\([0-9]*\)$/ (\1s)/; s/^/        /' "$scratch/stages.tsv"
say "$failures failed; results in $out"
[ "$failures" -eq 0 ]
