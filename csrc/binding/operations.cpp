#include "binding/operations.h"

#include <ATen/record_function.h>

#include <cmath>

#include "binding/cpu_operations.h"
#if GRADCLIP_WITH_CUDA
#include "binding/cuda_operations.h"
#endif

namespace gradclip::binding {
namespace {

// What a sum has to be good for, for a result of that dtype.
Precision precision_for(at::ScalarType dtype) {
  return dtype == at::kDouble ? Precision::kFloat64 : Precision::kFloat32;
}

}  // namespace

bool is_readable(const Number& number, const Gradients& gradients) {
  return number.is_known() ||
         (!number.tensor.is_cpu() && number.tensor.device() == gradients.device());
}

at::Tensor power_sum(const Gradients& gradients, Norm norm) {
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) return cuda_engine::power_sum(gradients, norm);
#endif
  return cpu_engine::scalar_tensor(cpu_engine::power_sum(gradients, norm, Precision::kFloat64),
                                   at::kDouble);
}

void scale_(const Gradients& gradients, const Number& coefficient) {
  gradients.bump_versions();
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) return cuda_engine::scale_(gradients, coefficient);
#endif
  cpu_engine::scale_(gradients, coefficient.value);
}

void clamp_(const Gradients& gradients, double bound) {
  gradients.bump_versions();
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) return cuda_engine::clamp_(gradients, bound);
#endif
  cpu_engine::clamp_(gradients, bound);
}

std::optional<at::Tensor> clip_grad_norm_(const Gradients& gradients, const Number& max_norm,
                                          Norm norm, bool error_if_nonfinite,
                                          std::optional<at::ScalarType> dtype) {
  RECORD_FUNCTION("gradclip_ext::clip_grad_norm_", {});
  const at::ScalarType result_dtype = dtype.value_or(gradients.norm_dtype());
  const Precision precision = precision_for(result_dtype);
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) {
    return cuda_engine::clip_grad_norm_(gradients, max_norm, norm, precision, error_if_nonfinite,
                                        result_dtype);
  }
#endif
  const double total_norm = finish(norm, cpu_engine::power_sum(gradients, norm, precision));
  if (error_if_nonfinite && !std::isfinite(total_norm)) return std::nullopt;
  gradients.bump_versions();
  cpu_engine::scale_(gradients, clip_coefficient(max_norm.value, total_norm));
  return cpu_engine::scalar_tensor(total_norm, result_dtype);
}

std::optional<at::Tensor> get_total_norm(const Gradients& gradients, Norm norm,
                                         bool error_if_nonfinite,
                                         std::optional<at::ScalarType> dtype) {
  RECORD_FUNCTION("gradclip_ext::get_total_norm", {});
  const at::ScalarType result_dtype = dtype.value_or(gradients.norm_dtype());
  const Precision precision = precision_for(result_dtype);
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) {
    return cuda_engine::get_total_norm(gradients, norm, precision, error_if_nonfinite,
                                       result_dtype);
  }
#endif
  const double total_norm = finish(norm, cpu_engine::power_sum(gradients, norm, precision));
  if (error_if_nonfinite && !std::isfinite(total_norm)) return std::nullopt;
  return cpu_engine::scalar_tensor(total_norm, result_dtype);
}

void clip_grads_with_norm_(const Gradients& gradients, const Number& max_norm,
                           const Number& total_norm) {
  RECORD_FUNCTION("gradclip_ext::clip_grads_with_norm_", {});
  gradients.bump_versions();
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) {
    return cuda_engine::clip_grads_with_norm_(gradients, max_norm, total_norm);
  }
#endif
  cpu_engine::scale_(gradients, clip_coefficient(max_norm.value, total_norm.value));
}

void clip_grad_value_(const Gradients& gradients, double clip_value) {
  RECORD_FUNCTION("gradclip_ext::clip_grad_value_", {});
  clamp_(gradients, clip_value);
}

}  // namespace gradclip::binding
