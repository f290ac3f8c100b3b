#include "binding/operations.h"

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

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

Norms grad_norms(const Gradients& gradients, Norm norm, std::optional<at::ScalarType> dtype) {
  RECORD_FUNCTION("gradclip_ext::grad_norms", {});
  const Precision precision = precision_for(dtype.value_or(gradients.norm_dtype()));
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) return cuda_engine::grad_norms(gradients, norm, precision);
#endif
  std::vector<double> norms;
  const double sum = cpu_engine::power_sum(gradients, norm, precision, &norms);
  const at::Tensor each(at::detail::empty_cpu({gradients.listed()}, at::kDouble));
  double* values = each.mutable_data_ptr<double>();
  std::fill_n(values, gradients.listed(), 0.0);
  const std::vector<int64_t> positions = gradients.positions();
  for (size_t i = 0; i < positions.size(); ++i) values[positions[i]] = norms[i];
  return {cpu_engine::scalar_tensor(finish(norm, sum), at::kDouble), each};
}

bool scale_each_(const Gradients& gradients, const at::Tensor& coefficients) {
  RECORD_FUNCTION("gradclip_ext::scale_each_", {});
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) return cuda_engine::scale_each_(gradients, coefficients);
#endif
  gradients.bump_versions();
  std::vector<double> values;
  for (const int64_t position : gradients.positions()) {
    values.push_back(coefficients.const_data_ptr<double>()[position]);
  }
  cpu_engine::scale_each_(gradients, values);
  return true;
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
