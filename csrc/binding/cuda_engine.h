// The engine for tensors on a GPU. Compiled only where there is a CUDA toolkit. All work is queued
// on torch's current stream of the tensors' device. The host waits for the GPU only where
// error_if_nonfinite asks for an answer.
#pragma once

#include "binding/engine.h"

namespace gradclip::binding {

const Engine& cuda_engine();

}  // namespace gradclip::binding
