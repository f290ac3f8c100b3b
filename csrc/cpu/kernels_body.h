// The generic body of the CPU kernels. A file that includes it first defines kVectorBytes, the
// width of the machine's registers, and selects the instruction set; then it includes this inside a
// namespace of its own. It has no include guard: one program holds it once per instruction set.
//
// Vectors are the compiler's own (gcc's and clang's vector_size), so the same lines become SSE2,
// NEON, AVX2 or AVX-512. They are written out, rather than left to the auto-vectorizer, because it
// may not reorder floating-point sums.

// Each of these needs those before it.
// clang-format off
#include "cpu/vectors_body.h"
#include "cpu/streams_body.h"
#include "cpu/sums_body.h"
#include "cpu/scale_body.h"
#include "cpu/clamp_body.h"
#include "cpu/rows_body.h"
// clang-format on

void power_sums(Norm kind, Precision precision, const Span& run, double* sums) {
  const int64_t tile = tile_elements(run.dtype);
  with_elements(run, [&](const auto* values) {
    for (int64_t begin = 0; begin < run.numel; begin += tile, values += tile) {
      power_sums_of<1>(kind, precision, &values, std::min(tile, run.numel - begin), sums++);
    }
  });
}

void power_sums_of_streams(Norm kind, Precision precision, const Span* runs, double* const* sums) {
  const int64_t tile = tile_elements(runs[0].dtype);
  with_streams(runs, [&](auto* const* values) {
    const std::remove_pointer_t<std::remove_const_t<std::remove_pointer_t<decltype(values)>>>*
        tiles[kStreams] = {values[0], values[1], values[2], values[3]};
    for (int64_t k = 0; k < runs[0].numel / tile; ++k) {
      double results[kStreams];
      power_sums_of<kStreams>(kind, precision, tiles, tile, results);
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        sums[stream][k] = results[stream];
        tiles[stream] += tile;
      }
    }
  });
}

void scale(const Span& run, double coefficient) {
  with_elements(run, [&](auto* values) { scale_values(values, run.numel, coefficient); });
}

void scale_streams(const Span* runs, const double* coefficients) {
  with_streams(runs, [&](auto* const* values) {
    scale_values_of_streams(values, runs[0].numel, coefficients);
  });
}

void add_scaled(const Span& run, const void* others, double factor) {
  with_elements(run, [&](auto* values) {
    add_scaled_values(values, static_cast<decltype(values)>(const_cast<void*>(others)), run.numel,
                      factor);
  });
}

void clamp(const Span& run, double bound) {
  with_elements(run, [&](auto* values) { clamp_values(values, run.numel, bound); });
}

void clamp_streams(const Span* runs, double bound) {
  with_streams(runs,
               [&](auto* const* values) { clamp_values_of_streams(values, runs[0].numel, bound); });
}
