// The algebra of norms and of the clip coefficient. A norm is map -> combine -> finish; whatever
// produced a partial result (a worker, a dtype, a device, a rank), it is combined here in float64,
// and only the end takes the root and makes the coefficient.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace gradclip {

enum class Norm : uint8_t { kL1, kL2, kInf };

// What a sum has to be good for: a result that is rounded to float32 or less, or one in float64.
//
// kFloat32 may round an element up to 6 times (L1) or 7 times (L2, with the square) in float32
// before it reaches a float64 sum. Each time it loses at most 2^-24 of its value, so the sum is
// within 6 or 7 x 2^-24, and the root halves the latter. Just below a power of two, 2^-24 of the
// norm is one unit in the last place of a float32; rounding the norm itself adds half a unit. So
// for any list L1 norms are within 6.5 units and L2 norms within 4; a norm in 16 bits is within
// half a unit of its own last place and a thousandth, and the largest magnitude is exact. What the
// float64 sums add is below a thousandth of a unit up to 2^36 elements.
enum class Precision : uint8_t { kFloat32, kFloat64 };

// Combines partial power sums. Sums are compensated (Neumaier, "Rundungsfehleranalyse einiger
// Verfahren zur Summation endlicher Summen", 1974): the result does not depend on how many partials
// there are, to the last bit or two of a double. NaN and infinity always propagate.
class PowerSum {
 public:
  GRADCLIP_HOST_DEVICE explicit PowerSum(Norm kind) : kind_(kind) {}

  GRADCLIP_HOST_DEVICE void add(double partial) {
    if (kind_ == Norm::kInf) {
      // Not fmax, which drops NaN. A NaN already held survives because no comparison with it holds.
      if (partial > sum_ || partial != partial) sum_ = partial;
      return;
    }
    const double total = sum_ + partial;
    compensation_ +=
        std::fabs(sum_) >= std::fabs(partial) ? (sum_ - total) + partial : (partial - total) + sum_;
    sum_ = total;
  }

  // Once the sum is not finite the compensation holds inf - inf and means nothing.
  GRADCLIP_HOST_DEVICE double value() const {
    return std::isfinite(sum_) ? sum_ + compensation_ : sum_;
  }

 private:
  Norm kind_;
  double sum_ = 0.0;
  double compensation_ = 0.0;
};

GRADCLIP_HOST_DEVICE inline double finish(Norm kind, double power_sum) {
  return kind == Norm::kL2 ? std::sqrt(power_sum) : power_sum;
}

// A smaller coefficient would lose bits, or vanish, in float32: elements of 32 and 16 bits are then
// scaled in float64.
inline constexpr double kSmallestFloat32Coefficient = 0x1p-100;

// torch.nn.utils' min(1, max_norm / (norm + 1e-6)), in float64 from the unrounded norm. An infinite
// max_norm asks for the measurement alone. A NaN anywhere else stays NaN.
GRADCLIP_HOST_DEVICE inline double clip_coefficient(double max_norm, double norm) {
  constexpr double kEpsilon = 1e-6;
  if (max_norm == std::numeric_limits<double>::infinity()) return 1.0;
  const double coefficient = max_norm / (norm + kEpsilon);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

}  // namespace gradclip
