#!/usr/bin/env bash
# What needs a GPU, in one call without network, against the torch that is installed. Nothing else
# has to be installed. Under 9 minutes.
#
#   tools/gpu_check.sh OUT             build for this GPU, self-check, tests, benchmark, plots
#   tools/gpu_check.sh --sweep OUT     variants of the kernels (bench/cuda), compute-sanitizer
#   tools/gpu_check.sh --dry-run ...   rehearses either without a GPU, with an existing build
#
# Leaves at most 8 files in OUT: summary.txt, logs.tar.gz, and what was measured. Goes on after a
# step that fails, unless nothing after it could work, and then exits with 1; with 2 if it cannot
# start at all. PYTHON names the interpreter.
set -uo pipefail

# Seconds that each step may take. Those of one mode, with GRACE for each, stay below 540.
declare -A LIMIT=(
  [probe]=40 [build]=110
  [report]=25 [tests]=135 [bench]=150 [plots]=25
  [sweep]=175 [memcheck]=40 [racecheck]=35 [initcheck]=40 [synccheck]=25
)
# From the interrupt, after which Python says where it stood, to the end.
GRACE=5

usage() {
  echo "usage: tools/gpu_check.sh [--sweep] [--dry-run] OUT" >&2
  exit 2
}

sweep='' dry_run=''
while [[ ${1-} == --* ]]; do
  case $1 in
    --sweep) sweep=1 ;;
    --dry-run) dry_run=1 ;;
    *) usage ;;
  esac
  shift
done
[ $# = 1 ] && [ -n "$1" ] || usage
if [ -n "$dry_run" ]; then
  # The machine may be slow, and nobody waits for it to be given back.
  for name in "${!LIMIT[@]}"; do LIMIT[$name]=$((10 * LIMIT[$name])); done
fi
out=$(realpath -m -- "$1")
cd "$(dirname "$0")/.." || exit 2
summary=$out/summary.txt
{ mkdir -p -- "$out" && : > "$summary"; } 2> /dev/null || {
  echo "gpu_check: cannot write to $out" >&2
  exit 2
}
rm -f -- "$out"/logs.tar.gz "$out"/clip-gpu* "$out"/sweep.csv

python=${PYTHON:-python3}
# Scripts in other folders find the package here.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 GRADCLIP_DRY_RUN=$dry_run
logs=$(mktemp -d)
trap 'rm -rf -- "$logs"' EXIT
failed=0

# step NAME COMMAND...: runs the command with its output in NAME.log, and keeps all logs in OUT.
step() {
  local name=$1 start=$SECONDS status=ok code=0
  shift
  # The shell itself would say that it was killed.
  { timeout -s INT -k "$GRACE" "${LIMIT[$name]}" "$@" > "$logs/$name.log" 2>&1 < /dev/null; } \
    2> /dev/null || code=$?
  case $code in
    0) ;;
    124 | 137) status='TIMED OUT' failed=1 ;;
    *) status="FAILED ($code)" failed=1 ;;
  esac
  line "$name" "$status" "$((SECONDS - start)) of ${LIMIT[$name]} s" "$(last_line "$name")"
  tar -czf "$out/logs.tar.gz" -C "$logs" .
  return "$code"
}

not_run() {
  failed=1
  line "$1" 'not run' '' "$2"
}

line() { printf '%-10s %-12s %12s   %s\n' "$@" | tee -a "$summary"; }

last_line() { grep -v '^ *$' "$logs/$1.log" | tail -n 1 | cut -c 1-160; }

lacks() { grep -q "^missing $1\$" "$logs/probe.log"; }

# The end of the output, where people look: no more than the 12,000 characters that some tools keep.
finish() {
  for name in report plots memcheck racecheck initcheck synccheck; do
    grep -q "^$name  *[FT]" "$summary" && section "$name" 700 tail -n 12 "$logs/$name.log"
  done
  [ -f "$logs/tests.log" ] && section tests 4600 failing_tests
  [ -f "$logs/sweep.log" ] && section sweep 5500 cat "$logs/sweep.log"
  [ -f "$logs/bench.log" ] && section bench 4200 cat "$logs/bench.log"
  section summary 1700 cat "$summary"
  exit "$failed"
}

# section NAME BYTES COMMAND...: the end of what the command prints.
section() {
  local name=$1 bytes=$2
  shift 2
  printf '\n== %s\n' "$name"
  "$@" | cut -c 1-400 | tail -c "$bytes"
}

failing_tests() { grep -a '^!! ' "$logs/tests.log" | cut -c 4-170 | head -c 4500; }

probe='
import importlib.util, os, platform, torch

for name in ("hypothesis", "matplotlib", "numpy", "pytest", "tqdm", "xdist"):
    if importlib.util.find_spec(name) is None:
        print("missing", name)
if os.environ["GRADCLIP_DRY_RUN"]:
    card, capability = "dry run", "9.0"
elif torch.cuda.is_available():
    card = torch.cuda.get_device_name()
    capability = "%d.%d" % torch.cuda.get_device_capability()
else:
    raise SystemExit(f"torch {torch.__version__} in {os.path.dirname(torch.__file__)} finds no GPU")
print("capability", capability)
print(f"{card}, {capability}; torch {torch.__version__}, Python {platform.python_version()}")
'
step probe "$python" -c "$probe" || exit 2
missing=$(sed -n 's/^missing //p' "$logs/probe.log" | paste -sd ' ')
[ -z "$missing" ] || line missing '' '' "$missing: tests that need one of them are skipped"
timeout 10 nvidia-smi -q > "$logs/nvidia-smi.log" 2>&1 || true

build() {
  # For this GPU only: CI compiles for the others.
  local list=${TORCH_CUDA_ARCH_LIST:-$(sed -n 's/^capability //p' "$logs/probe.log")}
  local command=(setup.py build_ext --inplace)
  # A new build could pull the extension from under processes that have it loaded.
  [ -z "$dry_run" ] || command=(setup.py build_ext --help)
  step build env GRADCLIP_CUDA=1 TORCH_CUDA_ARCH_LIST="$list" "$python" "${command[@]}" || {
    section build 8000 tail -n 60 "$logs/build.log"
    finish
  }
  # Nothing on the GPU works without code for it.
  step report "$python" -m gradclip_ext || ! grep -q 'NOT COVERED' "$logs/report.log" || finish
}

check() {
  local arguments=(-q -m cuda -p no:cacheprovider --durations=10 --continue-on-collection-errors)
  # A hundred failures say enough.
  arguments+=(--maxfail 100 --tb short)
  # Processes share the GPU, and memory is counted for each. Not by file: pytest-xdist would run a
  # test that ends its process again and again.
  lacks xdist || arguments+=(-n 6 --dist worksteal)
  [ -z "$dry_run" ] || arguments+=(--collect-only)
  if lacks pytest; then
    not_run tests 'pytest is not installed'
  else
    step tests env OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
      "$python" -m pytest "${arguments[@]}" --borrowed 30 tests
  fi

  arguments=(--suite gpu --device cuda)
  [ -z "$dry_run" ] || arguments=(--suite ci --workloads one_scalar --seconds 0)
  if lacks tqdm; then
    not_run bench 'tqdm is not installed'
  else
    step bench "$python" bench/clip.py "${arguments[@]}" --output "$out/clip-gpu.json"
  fi

  if lacks matplotlib; then
    not_run plots 'matplotlib is not installed'
  elif [ ! -f "$out/clip-gpu.json" ]; then
    not_run plots 'nothing was measured'
  else
    step plots "$python" bench/plot.py "$out/clip-gpu.json"
  fi
}

sanitize() {
  local tool command help options sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  help=$("$sanitizer" --help 2>&1)
  for tool in memcheck racecheck initcheck synccheck; do
    # Host backtraces would take minutes, for torch is large.
    options=(--tool "$tool" --error-exitcode 1 --show-backtrace device --print-limit 20)
    # torch asks for what it may do, and some of the answers are errors.
    [ "$tool" != memcheck ] || options+=(--report-api-errors no)
    # Only our kernels. But initcheck has to see all that write the memory that ours read.
    if [ "$tool" != initcheck ] && [[ $help == *'--kernel-name '* ]]; then
      options+=(--kernel-name kns=gradclip)
    fi
    command=("$sanitizer" "${options[@]}" "$python" tools/gpu_sanitize.py)
    [ -z "$dry_run" ] || command=("$python" tools/gpu_sanitize.py --help)
    if [ -z "$dry_run" ] && [ ! -x "$sanitizer" ]; then
      not_run "$tool" 'compute-sanitizer is not installed'
    else
      # Without torch's caching allocator, which would hide accesses beyond an allocation.
      step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}"
    fi
  done
}

if [ -n "$sweep" ]; then
  # Needs no build. A minute is left to compile it, and to print its table.
  step sweep bash bench/cuda/run.sh "$out/sweep.csv" --seconds $((LIMIT[sweep] - 60)) \
    ${dry_run:+--dry-run}
  build
  sanitize
else
  build
  check
fi
finish
