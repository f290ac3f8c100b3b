#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without network, against the torch that is installed:
# build, tests, compute-sanitizer, benchmarks. Results, plots and logs go to OUT. Continues after a
# failure, so that one run shows everything, and then exits with 1. Under 8 minutes.
#
#   tools/gpu_check.sh OUT
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_check.sh OUT}")
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
python=${PYTHON:-python3}
summary=$out/summary.txt
: > "$summary"
failed=0

# step NAME SECONDS COMMAND...: runs the command with its output in OUT/NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=ok
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
  printf '%-12s %-14s %4d s   %s\n' "$name" "$status" $((SECONDS - start)) \
    "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-100)" | tee -a "$summary"
  [ "$status" = ok ]
}

"$python" - << 'EOF' | tee -a "$summary"
import torch

if not torch.cuda.is_available():
    raise SystemExit("torch finds no GPU")
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, {capability[0]}.{capability[1]}; torch {torch.__version__}")
EOF
[ "${PIPESTATUS[0]}" = 0 ] || exit 1

# For this GPU only: CI compiles the other architectures.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c \
  'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST GRADCLIP_CUDA=1

step build 180 "$python" setup.py build_ext --inplace || { tail -n 40 "$out/build.log"; exit 1; }
step report 60 "$python" -m gradclip_ext
step tests 240 "$python" -m pytest -q -m cuda -p no:cacheprovider --durations=10 tests

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck; do
    # Without torch's caching allocator, which would hide accesses beyond an allocation.
    step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" tools/gpu_sanitize.py
  done
else
  echo "compute-sanitizer is not installed: not run" | tee -a "$summary"
fi

step bench 240 "$python" bench/clip.py --suite gpu --device cuda --output "$out/clip-gpu.json"
[ -f "$out/clip-gpu.json" ] && step plots 60 "$python" bench/plot.py "$out/clip-gpu.json"

[ -f "$out/bench.log" ] && cat "$out/bench.log"
[ "$failed" = 0 ] || grep -hE '^(FAILED|ERROR) ' "$out/tests.log" | head -n 30
exit "$failed"
