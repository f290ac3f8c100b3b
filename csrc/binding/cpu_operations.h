// The operations of operations.h for gradients in the CPU's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <vector>

#include "binding/gradients.h"
#include "core/decay.h"
#include "core/norm.h"

namespace gradclip::binding::cpu_engine {

double power_sum(const Gradients& gradients, Norm norm, Precision precision);

// The same of an index, and the norm of each of its tensors. With `decay`, which may be null, the
// gradients are changed first.
double power_sum(const FlatIndex& index, Norm norm, Precision precision, const Decay* decay,
                 std::vector<double>* norms);

// With a coefficient for each tensor that is not empty; see the engine.
void scale_each_(const Gradients& gradients, const std::vector<double>& coefficients);

// A coefficient of exactly 1 writes nothing.
void scale_(const Gradients& gradients, double coefficient);

void clamp_(const Gradients& gradients, double bound);

// A 0-dim CPU tensor, made without going through the dispatcher.
at::Tensor scalar_tensor(double value, at::ScalarType dtype);

}  // namespace gradclip::binding::cpu_engine
