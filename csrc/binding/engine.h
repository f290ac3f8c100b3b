// What the CPU and the CUDA engine have in common: the operations on a list of native tensors of
// one device. Engines neither count versions nor choose themselves; see operations.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/tensor_list.h"
#include "core/norm.h"

namespace gradclip::binding {

// A real number that the host knows, or a tensor of one element on a GPU, which the engine reads
// without a device sync.
struct Scalar {
  double value = 0.0;
  // Undefined where `value` holds.
  at::Tensor tensor;

  bool is_known() const { return !tensor.defined(); }
};

// The norm that is asked for.
struct NormRequest {
  Norm kind;
  Precision precision;
  at::ScalarType result_dtype;
  // Whether a norm that is not finite is for the fallback, which words the error.
  bool error_if_nonfinite;
};

// The norm of all tensors together, and of each: an entry for each parameter that was listed, 0
// where it has no gradient. In float64, on the tensors' device.
struct Norms {
  at::Tensor total;
  at::Tensor each;
};

// Weight decay to be added to gradients while they are measured.
struct WeightDecay {
  double factor;
  // In memory the same as the gradients, tensor by tensor and element by element.
  const TensorList& parameters;
};

// nullopt and false mean that the engine declined, with nothing written.
class Engine {
 public:
  // Sum of |x|^p over all tensors, or their largest magnitude for the infinity norm: 0-dim, in
  // float64, on the tensors' device.
  virtual at::Tensor power_sum(const TensorList& tensors, Norm kind) const = 0;

  virtual std::optional<at::Tensor> total_norm(const TensorList& tensors,
                                               const NormRequest& request) const = 0;

  // Measures and scales to at most `max_norm`; returns the norm before.
  virtual std::optional<at::Tensor> clip_norm(const TensorList& tensors, const NormRequest& request,
                                              const Scalar& max_norm) const = 0;

  // `decay` may be null; with one, the gradients are changed in the same pass.
  virtual std::optional<Norms> norms(const TensorList& tensors, Norm kind, Precision precision,
                                     const WeightDecay* decay) const = 0;

  // A coefficient of exactly 1 writes nothing.
  virtual void scale(const TensorList& tensors, const Scalar& coefficient) const = 0;

  // By the coefficient that makes `max_norm` of `total_norm`.
  virtual void scale_to_norm(const TensorList& tensors, const Scalar& max_norm,
                             const Scalar& total_norm) const = 0;

  // `coefficients` has one for each tensor that was listed, in float64 on the tensors' device: 1
  // writes nothing, 0 clears, also NaN and infinity.
  virtual bool scale_each(const TensorList& tensors, const at::Tensor& coefficients) const = 0;

  // Limits every element to [-bound, bound].
  virtual void clamp(const TensorList& tensors, double bound) const = 0;

 protected:
  ~Engine() = default;
};

}  // namespace gradclip::binding
