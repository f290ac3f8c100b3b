// The operations on a list of native tensors of one device. Each is one call of that device's
// engine, in a range of its own for profilers; what was written has a new version afterwards. None
// of them needs Python; all may run while the GIL is released. nullopt means that the list was
// declined, with nothing written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "binding/engine.h"
#include "binding/tensor_list.h"
#include "core/norm.h"

namespace gradclip::binding {

// The four functions of torch.nn.utils. `dtype` overrides the dtype of the result. Those that take
// error_if_nonfinite decline where it is set and the norm is not finite.
std::optional<at::Tensor> clip_grad_norm_(const TensorList& gradients, const Scalar& max_norm,
                                          Norm kind, bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype);

std::optional<at::Tensor> get_total_norm(const TensorList& tensors, Norm kind,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype);

// How many gradients it took; so do those below.
std::optional<int64_t> clip_grads_with_norm_(const TensorList& gradients, const Scalar& max_norm,
                                             const Scalar& total_norm);

std::optional<int64_t> clip_grad_value_(const TensorList& gradients, double clip_value);

// The norms are good for results of `dtype`, which without one is that of get_total_norm. With
// `decay`, which may be null, it is added to the gradients in the same pass; declined where the
// parameters are not in memory as the gradients are, or gradients share memory.
std::optional<Norms> grad_norms(const TensorList& gradients, Norm kind,
                                std::optional<at::ScalarType> dtype, const WeightDecay* decay);

// Multiplies every tensor in place. A coefficient of exactly 1 writes nothing.
std::optional<int64_t> scale_(const TensorList& tensors, const Scalar& coefficient);

// Multiplies each tensor by the coefficient at its place among those listed, of a 1-D tensor in
// float64 on the same device: 1 writes nothing, 0 clears, also NaN and infinity. Declined where
// gradients on a GPU share memory.
std::optional<int64_t> scale_each_(const TensorList& tensors, const at::Tensor& coefficients);

// Limits every element to [-bound, bound] in place.
std::optional<int64_t> clamp_(const TensorList& tensors, double bound);

// Sum of |x|^p over all tensors, or their largest magnitude for the infinity norm: 0-dim, in
// float64, on their device.
at::Tensor power_sum(const TensorList& tensors, Norm kind);

}  // namespace gradclip::binding
