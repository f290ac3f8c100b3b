// The operations of operations.h for gradients on a GPU. Compiled only where there is a CUDA
// toolkit. All work is queued on torch's current stream of the gradients' device. The host waits
// for the GPU only where error_if_nonfinite asks for an answer.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/gradients.h"
#include "binding/operations.h"
#include "core/decay.h"
#include "core/norm.h"

namespace gradclip::binding::cuda_engine {

// 0-dim, in float64, on the gradients' device.
at::Tensor power_sum(const Gradients& gradients, Norm norm);

void scale_(const Gradients& gradients, const Number& coefficient);

void clamp_(const Gradients& gradients, double bound);

Norms grad_norms(const Gradients& gradients, Norm norm, Precision precision);

// `index` is that of the gradients, for writing. nullopt, with nothing written, where the engine
// cannot do it.
std::optional<Norms> decay_and_grad_norms(const Gradients& gradients, const FlatIndex& index,
                                          const Decay& decay, Norm norm, Precision precision);

bool scale_each_(const Gradients& gradients, const at::Tensor& coefficients);

std::optional<at::Tensor> clip_grad_norm_(const Gradients& gradients, const Number& max_norm,
                                          Norm norm, Precision precision, bool error_if_nonfinite,
                                          at::ScalarType result_dtype);

std::optional<at::Tensor> get_total_norm(const Gradients& gradients, Norm norm, Precision precision,
                                         bool error_if_nonfinite, at::ScalarType result_dtype);

void clip_grads_with_norm_(const Gradients& gradients, const Number& max_norm,
                           const Number& total_norm);

}  // namespace gradclip::binding::cuda_engine
