// Unit-wise clipping (AGC): each row of a gradient is limited relative to the norm of the same row
// of its parameter. Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition
// Without Normalization" (2021).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "core/span.h"

namespace gradclip {

// A norm in the precision that torch computes it in: without rounding, a row that was scaled to its
// limit could be above it by the last bit, and be scaled again.
GRADCLIP_HOST_DEVICE inline double unit_norm(double power_sum, DType dtype) {
  const double norm = std::sqrt(power_sum);
  return dtype == DType::kFloat64 ? norm : static_cast<double>(static_cast<float>(norm));
}

struct UnitLimit {
  double clip_factor;
  double eps;

  // As in gradclip_ext/_ops/units.py. A norm that is NaN or infinite gives 1.
  GRADCLIP_HOST_DEVICE double coefficient(double weight_norm, double norm) const {
    constexpr double kSmallestNorm = 1e-6;
    const double limit = (weight_norm < eps ? eps : weight_norm) * clip_factor;
    if (!(norm > limit) || !std::isfinite(norm)) return 1.0;
    return limit / (norm < kSmallestNorm ? kSmallestNorm : norm);
  }
};

// The rows of one gradient and of its parameter: contiguous blocks of equal size, one after
// another. Both have the same number of elements, in any order within a row, but not always the
// same dtype.
struct Rows {
  Span gradient;
  Span weights;
  int64_t count;

  GRADCLIP_HOST_DEVICE int64_t gradient_row() const { return gradient.numel / count; }
  GRADCLIP_HOST_DEVICE int64_t weights_row() const { return weights.numel / count; }

  // Of the larger of the two.
  GRADCLIP_HOST_DEVICE int64_t bytes_of_row() const {
    const int64_t gradient_bytes = gradient_row() * element_size(gradient.dtype);
    const int64_t weights_bytes = weights_row() * element_size(weights.dtype);
    return gradient_bytes > weights_bytes ? gradient_bytes : weights_bytes;
  }
};

}  // namespace gradclip
