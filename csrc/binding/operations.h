// The operations on a list of native tensors of one device. Each is a single call of that device's
// engine, inside a profiler range, and bumps the version counters of the tensors it writes. None of
// them needs Python; all may run with the GIL released. nullopt means that the list was declined,
// with nothing written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "binding/engine.h"
#include "binding/tensor_list.h"
#include "core/norm.h"
#include "core/units.h"

namespace gradclip::binding {

// The four functions of torch.nn.utils. `dtype` overrides the dtype of the result. Those with
// error_if_nonfinite decline if it is set and the norm is not finite.
std::optional<at::Tensor> clip_grad_norm_(const TensorList& gradients, const Scalar& max_norm,
                                          Norm kind, bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype);

std::optional<at::Tensor> get_total_norm(const TensorList& tensors, Norm kind,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype);

// The norm before rounding: 0-dim, in float64, and as accurate as a result in `dtype` needs, by
// default the dtype of get_total_norm. Declines as get_total_norm does.
std::optional<at::Tensor> total_norm(const TensorList& tensors, Norm kind, bool error_if_nonfinite,
                                     std::optional<at::ScalarType> dtype);

// Returns how many gradients it took, as do the functions below.
std::optional<int64_t> clip_grads_with_norm_(const TensorList& gradients, const Scalar& max_norm,
                                             const Scalar& total_norm);

std::optional<int64_t> clip_grad_value_(const TensorList& gradients, double clip_value);

// The norms are as accurate as a result in `dtype` needs, by default the dtype of get_total_norm.
// `decay`, which may be null, is added to the gradients in the same pass; it declines if parameters
// and gradients differ in dtype or layout, or if gradients share memory.
std::optional<Norms> grad_norms(const TensorList& gradients, Norm kind,
                                std::optional<at::ScalarType> dtype, const WeightDecay* decay);

// Multiplies every tensor in place. A coefficient of exactly 1 writes nothing.
std::optional<int64_t> scale_(const TensorList& tensors, const Scalar& coefficient);

// Multiplies each tensor by its own coefficient, from a 1-D float64 tensor on the same device with
// one for each tensor listed: 1 writes nothing, 0 clears, including NaN and infinity. Declines if
// gradients on a GPU share memory.
std::optional<int64_t> scale_each_(const TensorList& tensors, const at::Tensor& coefficients);

// Limits every element to [-bound, bound] in place.
std::optional<int64_t> clamp_(const TensorList& tensors, double bound);

// Adds the decay to the gradients, to the bit as torch's add_ does for real numbers. Declines where
// grad_norms does, and what torch rounds in another way.
std::optional<int64_t> add_weight_decay_(const TensorList& gradients, const WeightDecay& decay);

// Limits each row of each gradient relative to the same row of its parameter; returns the smallest
// coefficient. Declines what have_clippable_units refuses.
std::optional<at::Tensor> clip_units_(const TensorList& gradients, const TensorList& parameters,
                                      const UnitLimit& limit);

// Whether all gradients have the shapes of their parameters, rows that are blocks of memory, and
// memory of their own.
bool have_clippable_units(const TensorList& gradients, const TensorList& parameters);

// Whether all gradients have memory of their own, laid out like that of their parameters, and a
// dtype that a float32 can scale: torch's fused optimizers walk both side by side, whatever the
// strides.
bool fit_fused_step(const TensorList& gradients, const TensorList& parameters);

// Sum of |x|^p over all tensors, or their largest magnitude for the infinity norm: 0-dim, in
// float64, on their device.
at::Tensor power_sum(const TensorList& tensors, Norm kind);

}  // namespace gradclip::binding
