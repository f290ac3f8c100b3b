#!/usr/bin/env bash
# Compiles the sweep for the GPU at hand, runs every family of it, and prints the fastest of each;
# sweep.cpp says what the CSV holds. Rows are written as they come, so what was killed leaves a CSV
# of what has run. Each family is a program of its own: what one breaks does not stop the others.
#
#   bench/cuda/run.sh CSV_PATH [--dry-run] [--seconds N] [--families 'small order ...']
#
# --dry-run compiles for 9.0 only, needs no GPU and writes no CSV. N, 240 by default, is for all
# families together, without the compiling, which takes over a minute of processor time. Exit status
# 1 if something does not compile, no GPU is there, or a variant was wrong or has failed.
set -uo pipefail

usage="usage: bench/cuda/run.sh CSV_PATH [--dry-run] [--seconds N] [--families LIST]"
csv=${1:?$usage}
shift
dry_run=0
seconds=240
# By value, should the time be up.
families='bandwidth small order prologue scale parameters'
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --seconds) seconds=${2:?$usage}; shift ;;
    --families) families=${2:?$usage}; shift ;;
    *) echo "$usage" >&2; exit 2 ;;
  esac
  shift
done
csv=$(realpath -m "$csv")
cd "$(dirname "$0")/../.." || exit 1

if toolkit=$(python3 tools/find_cuda.py); then
  nvcc=${toolkit##* in }/bin/nvcc
elif ! nvcc=$(command -v nvcc); then
  echo "$toolkit" >&2
  exit 1
fi

architecture=90
if [ "$dry_run" = 0 ]; then
  # A wrong word instead of a number if there is none.
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
    head -n 1 | tr -d '. ')
  if ! [[ $architecture =~ ^[0-9]+$ ]]; then
    echo "no GPU: nvidia-smi names none" >&2
    exit 1
  fi
  if ! mkdir -p "$(dirname "$csv")" || ! : > "$csv"; then
    echo "$csv cannot be written" >&2
    exit 1
  fi
fi

folder=build/sweep/sm_$architecture
mkdir -p "$folder"
sources=(bench/cuda/{small_lists,measuring,scaling,gpu_kernels}.cu csrc/cuda/launch.cu
  bench/cuda/{sweep,gpu,lists,report,today}.cpp csrc/cuda/plan.cpp)

# As setup.py does, so that the engine is the one that the package has.
options=$(PYTHONPATH=tools python3 -c 'import find_cuda; print(*find_cuda.NVCC_OPTIONS)') || exit 1
compile() {
  # shellcheck disable=SC2086  # words
  "$nvcc" -std=c++17 $options -Xcompiler=-Wall,-Wextra -Icsrc -Ibench/cuda \
    -arch="sm_$architecture" -c "$1" -o "$folder/$(basename "$1").o" ||
    { echo "$1 does not compile" >&2; exit 1; }
}
export -f compile
export nvcc folder architecture options

begin=$SECONDS
printf '%s\n' "${sources[@]}" |
  xargs -P "${MAX_JOBS:-$(nproc)}" -I '{}' bash -c 'compile {}' || exit 1
objects=()
for source in "${sources[@]}"; do objects+=("$folder/$(basename "$source").o"); done
"$nvcc" -arch="sm_$architecture" "${objects[@]}" -o "$folder/sweep" || exit 1
echo "compiled for sm_$architecture in $((SECONDS - begin)) s"
[ "$dry_run" = 1 ] && exit 0

failed=0
begin=$SECONDS
for family in $families; do
  left=$((seconds - (SECONDS - begin)))
  if [ "$left" -le 0 ]; then
    echo "$family: not run, the time was up"
    continue
  fi
  limit=$((left < 75 ? left : 75))
  # What hangs, a cluster at its barrier for instance, ends soon after that.
  timeout -k 5 $((limit + 15)) "$folder/sweep" "$csv" "$family" --seconds "$limit"
  status=$?
  [ "$status" = 0 ] || { echo "$family: exit status $status" >&2; failed=1; }
  [ "$status" = 3 ] && exit 1
done
echo "swept in $((SECONDS - begin)) s; all rows in $csv"
"$folder/sweep" "$csv" table || failed=1
exit "$failed"
