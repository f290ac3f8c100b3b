// The operations on a list of native gradients, composed of three engine calls: measure, scale,
// clamp. None of them needs Python; all may run while the GIL is released.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/gradients.h"
#include "core/norm.h"

namespace gradclip::binding {

// Sum of |x|^p over all gradients, or their largest magnitude for the infinity norm.
double power_sum(const Gradients& gradients, Norm norm, Precision precision);

// Multiplies every gradient in place. A coefficient of exactly 1 writes nothing.
void scale_(const Gradients& gradients, double coefficient);

// Limits every element to [-bound, bound] in place.
void clamp_(const Gradients& gradients, double bound);

// The four functions of torch.nn.utils. The ones that return an optional give nullopt, with
// nothing written, when the norm is not finite and the caller wants that to be an error.
// `dtype` overrides the dtype of the result.
std::optional<at::Tensor> clip_grad_norm_(const Gradients& gradients, double max_norm, Norm norm,
                                          bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype);

std::optional<at::Tensor> get_total_norm(const Gradients& gradients, Norm norm,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype);

void clip_grads_with_norm_(const Gradients& gradients, double max_norm, double total_norm);

void clip_grad_value_(const Gradients& gradients, double clip_value);

// A 0-dim CPU tensor, made without going through the dispatcher.
at::Tensor scalar_tensor(double value, at::ScalarType dtype);

}  // namespace gradclip::binding
