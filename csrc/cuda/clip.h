// What a scaling kernel derives its coefficient from.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/span.h"

namespace gradclip::cuda {

// A number known on the host, or one in GPU memory, read without a device sync.
struct Scalar {
  double value;
  // Null if `value` is the number.
  const void* pointer;
  DType dtype;
};

struct Clip {
  // Power sums of `count` workers; null if the norm is given.
  const double* partials;
  int32_t count;
  Norm kind;
  Scalar given_norm;
  // Whether given_norm is in fact the coefficient; max_norm is then ignored.
  bool is_coefficient;
  Scalar max_norm;
  // Where the first block stores the norm, in this dtype; may be null.
  void* norm_result;
  DType norm_dtype;
};

}  // namespace gradclip::cuda
