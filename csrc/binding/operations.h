// The operations on a list of native gradients of one device, composed of three engine calls:
// measure, scale, clamp. None of them needs Python; all may run while the GIL is released.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/gradients.h"
#include "core/norm.h"

namespace gradclip::binding {

// A real number that the host knows, or a tensor of one element on a GPU, which the host does not
// wait for.
struct Number {
  double value = 0.0;
  // Undefined where `value` holds.
  at::Tensor tensor;

  bool is_known() const { return !tensor.defined(); }
};

// Whether the number can be read where these gradients lie: it is known, or on the same GPU.
bool is_readable(const Number& number, const Gradients& gradients);

// Sum of |x|^p over all gradients, or their largest magnitude for the infinity norm: 0-dim, in
// float64, where the gradients lie.
at::Tensor power_sum(const Gradients& gradients, Norm norm);

// Multiplies every gradient in place. A coefficient of exactly 1 writes nothing.
void scale_(const Gradients& gradients, const Number& coefficient);

// Limits every element to [-bound, bound] in place.
void clamp_(const Gradients& gradients, double bound);

// The norm of all gradients together and of each, in float64, where the gradients lie. The second
// has an entry for each parameter that was listed, 0 where it has no gradient. They are good for
// results of `dtype`, which without one is that of get_total_norm.
struct Norms {
  at::Tensor total;
  at::Tensor each;
};
Norms grad_norms(const Gradients& gradients, Norm norm, std::optional<at::ScalarType> dtype);

// The same after `factor` times its parameter was added to each gradient, in one pass. nullopt,
// with nothing written, where the parameters do not lie in memory as the gradients do.
std::optional<Norms> decay_and_grad_norms(const Gradients& gradients, const Gradients& parameters,
                                          double factor, Norm norm,
                                          std::optional<at::ScalarType> dtype);

// Multiplies each gradient by the coefficient at the place of its parameter, of a 1-D tensor in
// float64 that lies where the gradients do: 1 writes nothing, 0 clears, also NaN and infinity.
// False, with nothing written, where gradients on a GPU share memory.
bool scale_each_(const Gradients& gradients, const at::Tensor& coefficients);

// The four functions of torch.nn.utils. The ones that return an optional give nullopt, with
// nothing written, when the norm is not finite and the caller wants that to be an error.
// `dtype` overrides the dtype of the result.
std::optional<at::Tensor> clip_grad_norm_(const Gradients& gradients, const Number& max_norm,
                                          Norm norm, bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype);

std::optional<at::Tensor> get_total_norm(const Gradients& gradients, Norm norm,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype);

void clip_grads_with_norm_(const Gradients& gradients, const Number& max_norm,
                           const Number& total_norm);

void clip_grad_value_(const Gradients& gradients, double clip_value);

}  // namespace gradclip::binding
