// How a scaling kernel comes to its coefficient.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/span.h"

namespace gradclip::cuda {

// A number that the host knows, or one that lies on the GPU and that the host does not wait for.
struct Scalar {
  double value;
  // Null where `value` holds.
  const void* pointer;
  DType dtype;
};

struct Clip {
  // Power sums of `count` workers; null where the norm is given.
  const double* partials;
  int32_t count;
  Norm kind;
  Scalar given_norm;
  // Whether the given norm is no norm, but the coefficient itself; max_norm is then ignored.
  bool is_coefficient;
  Scalar max_norm;
  // Where the first block leaves the norm, in this dtype; may be null.
  void* norm_result;
  DType norm_dtype;
};

}  // namespace gradclip::cuda
