// The interface of the CPU and the CUDA engine: the operations on a list of native tensors of one
// device. Version counters and the choice of an engine are not theirs; see operations.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/tensor_list.h"
#include "core/norm.h"
#include "core/units.h"

namespace gradclip::binding {

// A real number known on the host, or a one-element tensor on the tensors' GPU, which the kernels
// read without a device sync.
struct Scalar {
  double value = 0.0;
  // Undefined if `value` is the number.
  at::Tensor tensor;

  bool is_known() const { return !tensor.defined(); }
};

// Which norm to compute, and in which dtype to return it.
struct NormRequest {
  Norm kind;
  Precision precision;
  at::ScalarType result_dtype;
  // Whether to decline if the norm is not finite; the fallback then raises the error.
  bool error_if_nonfinite;
};

// The norm of all tensors together, and of each: an entry for each parameter that was listed, 0
// where it has no gradient. In float64, on the tensors' device.
struct Norms {
  at::Tensor total;
  at::Tensor each;
};

// Weight decay to add to the gradients.
struct WeightDecay {
  double factor;
  // With the dtypes, shapes and strides of the gradients.
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

  // By the clip coefficient of the two norms.
  virtual void scale_to_norm(const TensorList& tensors, const Scalar& max_norm,
                             const Scalar& total_norm) const = 0;

  // `coefficients` has one for each tensor that was listed, in float64 on the tensors' device: 1
  // writes nothing, 0 clears, also NaN and infinity.
  virtual bool scale_each(const TensorList& tensors, const at::Tensor& coefficients) const = 0;

  // Limits every element to [-bound, bound].
  virtual void clamp(const TensorList& tensors, double bound) const = 0;

  // The decay alone, to the bit as torch's add_ does on that device; no gradient shares memory with
  // another or with a parameter.
  virtual bool add_weight_decay(const TensorList& tensors, const WeightDecay& decay) const = 0;

  // Limits each row of each gradient relative to the same row of its parameter, and returns the
  // smallest coefficient: 0-dim, in float64, on the tensors' device. Both lists have the same
  // shapes, rows that are blocks, and no memory in common.
  virtual std::optional<at::Tensor> clip_units(const TensorList& tensors,
                                               const TensorList& parameters,
                                               const UnitLimit& limit) const = 0;

 protected:
  ~Engine() = default;
};

}  // namespace gradclip::binding
