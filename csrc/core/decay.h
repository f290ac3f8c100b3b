// Weight decay that is added to gradients while they are measured: coupled L2 regularization, whose
// gradient is a multiple of the parameter.
#pragma once

namespace gradclip {

struct Decay {
  double factor;
  // For each tensor of the index its parameter, in the same dtype and the same order of elements.
  const void* const* parameters;
};

}  // namespace gradclip
