#include "binding/operations.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "binding/cpu_engine.h"
#include "core/overlap.h"
#if GRADCLIP_WITH_CUDA
#include "binding/cuda_engine.h"
#endif

namespace gradclip::binding {
namespace {

const Engine& engine_of(const TensorList& tensors) {
#if GRADCLIP_WITH_CUDA
  if (tensors.are_on_gpu()) return cuda_engine();
#endif
  (void)tensors;
  return cpu_engine();
}

enum class Access { kRead, kWrite };

// What all operations have in common. `work` gets the engine and returns the operation's result.
template <class Work>
auto run(const char* name, Access access, const TensorList& tensors, const Work& work) {
  RECORD_FUNCTION(name, {});
  auto answer = work(engine_of(tensors));
  // Even if a coefficient of 1 left the gradients unchanged: torch's functions always write.
  if (answer && access == Access::kWrite) tensors.bump_versions();
  return answer;
}

std::optional<int64_t> count_of(const TensorList& tensors) {
  return static_cast<int64_t>(tensors.tensors().size());
}

// The precision of the sums behind a result of this dtype.
Precision precision_for(at::ScalarType dtype) {
  return dtype == at::kDouble ? Precision::kFloat64 : Precision::kFloat32;
}

NormRequest request_of(const TensorList& tensors, Norm kind, bool error_if_nonfinite,
                       std::optional<at::ScalarType> dtype) {
  const at::ScalarType result_dtype = dtype.value_or(tensors.norm_dtype());
  return {kind, precision_for(result_dtype), result_dtype, error_if_nonfinite};
}

// Whether each parameter has the dtype and the memory layout of its gradient.
bool same_layout(const TensorList& gradients, const TensorList& parameters) {
  const std::vector<at::Tensor>& ours = gradients.tensors();
  const std::vector<at::Tensor>& theirs = parameters.tensors();
  return std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                    [](const at::Tensor& gradient, const at::Tensor& parameter) {
                      return gradient.scalar_type() == parameter.scalar_type() &&
                             gradient.device() == parameter.device() &&
                             gradient.sizes() == parameter.sizes() &&
                             gradient.strides() == parameter.strides() &&
                             gradient.is_conj() == parameter.is_conj() &&
                             gradient.is_neg() == parameter.is_neg();
                    });
}

// Whether a gradient's memory is also that of a parameter, or of another gradient.
bool share_any_memory(const TensorList& gradients, const TensorList& parameters) {
  std::vector<Span> spans = gradients.index_for_reading().spans();
  const FlatIndex values = parameters.index_for_reading();
  spans.insert(spans.end(), values.spans().begin(), values.spans().end());
  return share_memory(FlatIndex(std::move(spans)));
}

// Whether the same pass over both can add a multiple of each parameter to its gradient.
bool can_decay(const TensorList& gradients, const TensorList& parameters) {
  return same_layout(gradients, parameters) && !share_any_memory(gradients, parameters);
}

}  // namespace

std::optional<at::Tensor> clip_grad_norm_(const TensorList& gradients, const Scalar& max_norm,
                                          Norm kind, bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype) {
  const NormRequest request = request_of(gradients, kind, error_if_nonfinite, dtype);
  return run("gradclip_ext::clip_grad_norm_", Access::kWrite, gradients,
             [&](const Engine& engine) { return engine.clip_norm(gradients, request, max_norm); });
}

std::optional<at::Tensor> get_total_norm(const TensorList& tensors, Norm kind,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype) {
  const NormRequest request = request_of(tensors, kind, error_if_nonfinite, dtype);
  return run("gradclip_ext::get_total_norm", Access::kRead, tensors,
             [&](const Engine& engine) { return engine.total_norm(tensors, request); });
}

std::optional<at::Tensor> total_norm(const TensorList& tensors, Norm kind, bool error_if_nonfinite,
                                     std::optional<at::ScalarType> dtype) {
  NormRequest request = request_of(tensors, kind, error_if_nonfinite, dtype);
  request.result_dtype = at::kDouble;
  return run("gradclip_ext::total_norm", Access::kRead, tensors,
             [&](const Engine& engine) { return engine.total_norm(tensors, request); });
}

std::optional<int64_t> clip_grads_with_norm_(const TensorList& gradients, const Scalar& max_norm,
                                             const Scalar& total_norm) {
  return run("gradclip_ext::clip_grads_with_norm_", Access::kWrite, gradients,
             [&](const Engine& engine) {
               engine.scale_to_norm(gradients, max_norm, total_norm);
               return count_of(gradients);
             });
}

std::optional<int64_t> clip_grad_value_(const TensorList& gradients, double clip_value) {
  return run("gradclip_ext::clip_grad_value_", Access::kWrite, gradients,
             [&](const Engine& engine) {
               engine.clamp(gradients, clip_value);
               return count_of(gradients);
             });
}

std::optional<Norms> grad_norms(const TensorList& gradients, Norm kind,
                                std::optional<at::ScalarType> dtype, const WeightDecay* decay) {
  const Precision precision = precision_for(dtype.value_or(gradients.norm_dtype()));
  const Access access = decay == nullptr ? Access::kRead : Access::kWrite;
  return run("gradclip_ext::grad_norms", access, gradients,
             [&](const Engine& engine) -> std::optional<Norms> {
               if (decay != nullptr && !can_decay(gradients, decay->parameters))
                 return std::nullopt;
               return engine.norms(gradients, kind, precision, decay);
             });
}

std::optional<int64_t> scale_(const TensorList& tensors, const Scalar& coefficient) {
  return run("gradclip_ext::scale_", Access::kWrite, tensors, [&](const Engine& engine) {
    engine.scale(tensors, coefficient);
    return count_of(tensors);
  });
}

std::optional<int64_t> scale_each_(const TensorList& tensors, const at::Tensor& coefficients) {
  return run("gradclip_ext::scale_each_", Access::kWrite, tensors,
             [&](const Engine& engine) -> std::optional<int64_t> {
               if (!engine.scale_each(tensors, coefficients)) return std::nullopt;
               return count_of(tensors);
             });
}

std::optional<int64_t> clamp_(const TensorList& tensors, double bound) {
  return run("gradclip_ext::clamp_", Access::kWrite, tensors, [&](const Engine& engine) {
    engine.clamp(tensors, bound);
    return count_of(tensors);
  });
}

std::optional<int64_t> add_weight_decay_(const TensorList& gradients, const WeightDecay& decay) {
  return run("gradclip_ext::add_weight_decay_", Access::kWrite, gradients,
             [&](const Engine& engine) -> std::optional<int64_t> {
               const bool takes = can_decay(gradients, decay.parameters) &&
                                  engine.add_weight_decay(gradients, decay);
               return takes ? count_of(gradients) : std::nullopt;
             });
}

std::optional<at::Tensor> clip_units_(const TensorList& gradients, const TensorList& parameters,
                                      const UnitLimit& limit) {
  return run("gradclip_ext::clip_units_", Access::kWrite, gradients,
             [&](const Engine& engine) -> std::optional<at::Tensor> {
               if (!have_clippable_units(gradients, parameters)) return std::nullopt;
               return engine.clip_units(gradients, parameters, limit);
             });
}

bool fit_fused_step(const TensorList& gradients, const TensorList& parameters) {
  const std::vector<at::Tensor>& tensors = gradients.tensors();
  return std::none_of(tensors.begin(), tensors.end(),
                      [](const at::Tensor& gradient) {
                        return gradient.scalar_type() == at::kDouble || gradient.is_neg();
                      }) &&
         same_layout(gradients, parameters) && !share_any_memory(gradients, parameters);
}

bool have_clippable_units(const TensorList& gradients, const TensorList& parameters) {
  const std::vector<at::Tensor>& ours = gradients.tensors();
  const std::vector<at::Tensor>& theirs = parameters.tensors();
  return std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                    [](const at::Tensor& gradient, const at::Tensor& parameter) {
                      return gradient.device() == parameter.device() &&
                             gradient.sizes() == parameter.sizes();
                    }) &&
         gradients.rows_are_blocks() && parameters.rows_are_blocks() &&
         !share_any_memory(gradients, parameters);
}

at::Tensor power_sum(const TensorList& tensors, Norm kind) {
  return *run("gradclip_ext::power_sum", Access::kRead, tensors, [&](const Engine& engine) {
    return std::optional<at::Tensor>(engine.power_sum(tensors, kind));
  });
}

}  // namespace gradclip::binding
