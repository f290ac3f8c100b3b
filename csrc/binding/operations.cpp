#include "binding/operations.h"

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "binding/cpu_operations.h"
#include "core/overlap.h"
#if GRADCLIP_WITH_CUDA
#include "binding/cuda_operations.h"
#endif

namespace gradclip::binding {
namespace {

// What a sum has to be good for, for a result of that dtype.
Precision precision_for(at::ScalarType dtype) {
  return dtype == at::kDouble ? Precision::kFloat64 : Precision::kFloat32;
}

Norms norms_on_cpu(const Gradients& gradients, const FlatIndex& index, Norm norm,
                   Precision precision, const Decay* decay) {
  std::vector<double> norms;
  const double sum = cpu_engine::power_sum(index, norm, precision, decay, &norms);
  const at::Tensor each(at::detail::empty_cpu({gradients.listed()}, at::kDouble));
  double* values = each.mutable_data_ptr<double>();
  std::fill_n(values, gradients.listed(), 0.0);
  const std::vector<int64_t> positions = gradients.positions();
  for (size_t i = 0; i < positions.size(); ++i) values[positions[i]] = norms[i];
  return {cpu_engine::scalar_tensor(finish(norm, sum), at::kDouble), each};
}

// Whether the elements of each parameter are those of its gradient, one by one.
bool lie_alike(const Gradients& gradients, const Gradients& parameters) {
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
  return norms_on_cpu(gradients, gradients.index_for_reading(), norm, precision, nullptr);
}

std::optional<Norms> decay_and_grad_norms(const Gradients& gradients, const Gradients& parameters,
                                          double factor, Norm norm,
                                          std::optional<at::ScalarType> dtype) {
  RECORD_FUNCTION("gradclip_ext::decay_and_grad_norms", {});
  if (!lie_alike(gradients, parameters)) return std::nullopt;
  const FlatIndex index = gradients.index_for_writing();
  if (share_memory(index)) return std::nullopt;
  const FlatIndex parameter_index = parameters.index_for_reading();
  std::vector<const void*> pointers;
  for (const Span& span : parameter_index.spans()) pointers.push_back(span.data);
  const Decay decay = {factor, pointers.data()};
  const Precision precision = precision_for(dtype.value_or(gradients.norm_dtype()));
#if GRADCLIP_WITH_CUDA
  if (gradients.are_on_gpu()) {
    return cuda_engine::decay_and_grad_norms(gradients, index, decay, norm, precision);
  }
#endif
  gradients.bump_versions();
  return norms_on_cpu(gradients, index, norm, precision, &decay);
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
