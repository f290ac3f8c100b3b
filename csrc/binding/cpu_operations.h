// The operations of operations.h for gradients in the CPU's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "binding/gradients.h"
#include "core/norm.h"

namespace gradclip::binding::cpu_engine {

double power_sum(const Gradients& gradients, Norm norm, Precision precision);

// A coefficient of exactly 1 writes nothing.
void scale_(const Gradients& gradients, double coefficient);

void clamp_(const Gradients& gradients, double bound);

// A 0-dim CPU tensor, made without going through the dispatcher.
at::Tensor scalar_tensor(double value, at::ScalarType dtype);

}  // namespace gradclip::binding::cpu_engine
