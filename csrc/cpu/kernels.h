// The interface of the CPU kernels: functions on runs of tiles, each contiguous in memory. There is
// one table per instruction set, all compiled from kernels_body.h.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/span.h"

// Target regions are spelled as gcc wants them; other compilers and processors get the portable
// kernels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GRADCLIP_WIDE_KERNELS 1
#else
#define GRADCLIP_WIDE_KERNELS 0
#endif

namespace gradclip::cpu {

// How many runs are read or written side by side, in full tiles of one dtype and as many of each:
// memory serves several streams faster than one.
inline constexpr int64_t kStreams = 4;

struct Kernels {
  const char* instruction_set;
  // For each tile of the run its sum of squares, sum of magnitudes, or largest magnitude.
  void (*power_sums)(Norm kind, Precision precision, const Span& run, double* sums);
  // The same of kStreams runs side by side; the bits of each tile are those of the above.
  void (*power_sums_of_streams)(Norm kind, Precision precision, const Span* runs,
                                double* const* sums);
  // Multiplies in place, rounding each element once.
  void (*scale)(const Span& run, double coefficient);
  // The same of kStreams runs side by side, which may have memory in common.
  void (*scale_streams)(const Span* runs, const double* coefficients);
  // Adds `factor` times the elements of another run of the same dtype.
  void (*add_scaled)(const Span& run, const void* others, double factor);
  // Clamps each element to [-bound, bound] in place; NaN stays NaN.
  void (*clamp)(const Span& run, double bound);
  void (*clamp_streams)(const Span* runs, double bound);
  // Sum of squares of each of `count` rows of equal length that make up the run, good for a result
  // in float32.
  void (*row_sums)(const Span& run, int64_t count, double* sums);
  // Multiplies each such row in place by its own coefficient; 1 writes nothing.
  void (*scale_rows)(const Span& run, int64_t count, const double* coefficients);
};

extern const Kernels kPortableKernels;
#if GRADCLIP_WIDE_KERNELS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table in use: that of the widest instruction set the processor has, or the one that the
// environment variable GRADCLIP_CPU names (portable, avx2 or avx512). Chosen at the first call,
// which throws std::runtime_error if there is no such table or the processor cannot run it.
const Kernels& kernels();

}  // namespace gradclip::cpu
