// The engine for tensors on a GPU. Compiled only in a build with CUDA. All work is queued on
// torch's current stream of the tensors' device, without a device sync unless error_if_nonfinite is
// set.
#pragma once

#include "binding/engine.h"

namespace gradclip::binding {

const Engine& cuda_engine();

}  // namespace gradclip::binding
