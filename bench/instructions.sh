#!/usr/bin/env bash
# Prints how many instructions a call executes, for lists of 1, 20 and 1000 tensors of 8 elements.
# Counts repeat exactly, whatever else the machine does, so they show changes below the noise of
# times. Needs valgrind, which knows no AVX-512, and a C compiler. About a minute. What callgrind
# wrote stays in build/instructions, for callgrind_annotate.
#
#     bench/instructions.sh
#     bench/instructions.sh --tensors 100
#     PYTHON=python3 bench/instructions.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
# Always the same path, and below no random addresses: hash tables of pointers and copies of memory
# take another number of instructions at another place.
folder=$here/../build/instructions
rm -rf "$folder"
mkdir -p "$folder"

"${CC:-cc}" -x c -O1 -shared -fPIC -o "$folder/counting.so" - <<'C'
#include <valgrind/callgrind.h>
void start(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}
void stop(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
C

GRADCLIP_CPU=${GRADCLIP_CPU:-avx2} ATEN_CPU_CAPABILITY=${ATEN_CPU_CAPABILITY:-avx2} \
  OMP_NUM_THREADS=1 PYTHONHASHSEED=0 \
  setarch --addr-no-randomize valgrind --tool=callgrind --instr-atstart=no --callgrind-out-file="$folder/counts" \
  "$python" "$here/instructions.py" "$folder/counting.so" "$@" 2> "$folder/log" || {
    cat "$folder/log" >&2
    exit 1
  }

awk '
  FNR == 1 { name = "" }
  /^desc: Trigger: Client Request: / { sub(/^desc: Trigger: Client Request: /, ""); name = $0 }
  /^(summary|totals): / && name != "" {
    split(name, part, "|")
    key = part[1] "|" part[2]
    if (!(key in seen)) { seen[key] = 1; order[++cases] = key }
    calls[key, ++runs[key]] = part[3]
    counts[key, runs[key]] = $2
    name = ""
  }
  END {
    printf "%8s  %-26s %14s\n", "tensors", "call", "instructions"
    for (i = 1; i <= cases; ++i) {
      key = order[i]
      split(key, part, "|")
      each = (counts[key, 3] - counts[key, 2]) / (calls[key, 3] - calls[key, 2])
      printf "%8s  %-26s %14.0f\n", part[1], part[2], each
    }
  }
' $(ls -v "$folder"/counts.*)
