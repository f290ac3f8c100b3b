// The CPU kernels as the engine sees them: functions on one contiguous run of numbers. There is one
// table per instruction set, all compiled from kernels_body.h.
#pragma once

#include "core/norm.h"
#include "core/span.h"

namespace gradclip::cpu {

struct Kernels {
  const char* instruction_set;
  // Sum of squares, sum of magnitudes, or largest magnitude of the run.
  double (*power_sum)(Norm norm, const Span& run);
  // Multiplies in place, rounding each element once.
  void (*scale)(const Span& run, double coefficient);
  // Limits each element to [-bound, bound] in place; NaN stays NaN.
  void (*clamp)(const Span& run, double bound);
};

extern const Kernels kPortableKernels;

// The table in use on this machine.
const Kernels& kernels();

}  // namespace gradclip::cpu
