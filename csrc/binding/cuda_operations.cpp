#include "binding/cuda_operations.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/overlap.h"
#include "cuda/launch.h"

namespace gradclip::binding::cuda_engine {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  // Otherwise the next call, anybody's, would report it again.
  (void)cudaGetLastError();
  int device = 0;
  int major = 0;
  int minor = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  TORCH_CHECK(false, "gradclip_ext: a CUDA launch failed: ", cudaGetErrorString(error),
              ". The device is cuda:", device, " of compute capability ", major, ".", minor,
              "; gradclip_ext was built for ", cuda::built_architectures(),
              " (times a hundred). If that does not cover it, build again with "
              "TORCH_CUDA_ARCH_LIST=\"",
              major, ".", minor, "\"");
}

// The device that calls go to, and its current stream.
class Queue {
 public:
  explicit Queue(const Gradients& gradients)
      : guard_(gradients.device()),
        device_(gradients.device()),
        stream_(c10::cuda::getCurrentCUDAStream(device_.index())) {}

  cudaStream_t stream() const { return stream_.stream(); }

  // A tensor, made without going through the dispatcher; 0-dim without sizes.
  at::Tensor empty(at::ScalarType dtype, at::IntArrayRef sizes = {}) const {
    return at::Tensor(at::detail::empty_generic(sizes, allocator(), c10::DispatchKeySet(kGpuKey),
                                                dtype,
                                                /*memory_format_opt=*/std::nullopt));
  }

  // Memory that may be let go as soon as what uses it is queued on this stream.
  c10::DataPtr scratch(int64_t doubles) const {
    return allocator()->allocate(static_cast<size_t>(doubles) * sizeof(double));
  }

 private:
  static c10::Allocator* allocator() { return c10::cuda::CUDACachingAllocator::get(); }

  c10::cuda::CUDAGuard guard_;
  c10::Device device_;
  c10::cuda::CUDAStream stream_;
};

cuda::Plan plan_of(const FlatIndex& index) {
  cuda::Plan plan;
  check(cuda::Plan::make(index, &plan));
  return plan;
}

cuda::Scalar scalar_of(const Number& number) {
  if (number.is_known()) return {number.value, nullptr, DType::kFloat64};
  return {0.0, number.tensor.const_data_ptr(), *native_dtype(number.tensor.scalar_type())};
}

// Partial sums of all gradients, queued for the kernels that follow on the same stream.
class Measurement {
 public:
  Measurement(const Queue& queue, const FlatIndex& index, Norm norm, Precision precision)
      : norm_(norm) {
    const cuda::Plan plan = plan_of(index);
    count_ = plan.partials();
    // Never nothing, since a null pointer means something else to the kernels.
    memory_ = queue.scratch(std::max<int64_t>(count_, 1));
    check(cuda::power_sums(plan, norm, precision, partials(), nullptr, queue.stream()));
  }

  // Either may be null.
  void finish(const Queue& queue, double* power_sum, const at::Tensor& norm_result) const {
    void* result = norm_result.defined() ? norm_result.mutable_data_ptr() : nullptr;
    const at::ScalarType dtype = norm_result.defined() ? norm_result.scalar_type() : at::kDouble;
    check(cuda::finish(norm_, partials(), count_, power_sum, *native_dtype(dtype), result,
                       queue.stream()));
  }

  // The norm, once the GPU has found it: the host waits.
  double awaited_norm(const Queue& queue) const {
    const at::Tensor sum = queue.empty(at::kDouble);
    finish(queue, sum.mutable_data_ptr<double>(), at::Tensor());
    return gradclip::finish(norm_, sum.item().toDouble());
  }

  double* partials() const { return static_cast<double*>(memory_.get()); }
  int32_t count() const { return static_cast<int32_t>(count_); }

 private:
  Norm norm_;
  int64_t count_ = 0;
  c10::DataPtr memory_;
};

// Queues a writing kernel. Blocks must not meet in memory that two gradients share, so such lists
// are cut into several that each hold none, one after another.
template <class Launch>
void write(const Gradients& gradients, const Launch& launch) {
  const FlatIndex index = gradients.index_for_writing();
  if (!share_memory(index)) {
    check(launch(plan_of(index)));
    return;
  }
  for (const FlatIndex& group : disjoint_groups(index)) check(launch(plan_of(group)));
}

void scale_by(const Queue& queue, const Gradients& gradients, cuda::Clip clip, bool early) {
  write(gradients, [&](const cuda::Plan& plan) {
    const cudaError_t error = cuda::scale(plan, clip, early, queue.stream());
    // Of several, only the first leaves the norm and follows right behind the measurement.
    clip.norm_result = nullptr;
    early = false;
    return error;
  });
}

cuda::Clip clip_by_given(const Number& given, bool is_coefficient, const Number& max_norm) {
  cuda::Clip clip = {};
  clip.given_norm = scalar_of(given);
  clip.is_coefficient = is_coefficient;
  clip.max_norm = scalar_of(max_norm);
  return clip;
}

// Where the tensors that are not empty stand among the parameters that were listed; undefined where
// they are all of them.
at::Tensor positions_on(const Queue& queue, const Gradients& gradients) {
  const std::vector<int64_t> positions = gradients.positions();
  const int64_t count = static_cast<int64_t>(positions.size());
  if (count == gradients.listed()) return at::Tensor();
  const at::Tensor on_host(at::detail::empty_cpu({count}, at::kLong));
  std::copy(positions.begin(), positions.end(), on_host.mutable_data_ptr<int64_t>());
  const at::Tensor result = queue.empty(at::kLong, {count});
  result.copy_(on_host, /*non_blocking=*/true);
  return result;
}

}  // namespace

at::Tensor power_sum(const Gradients& gradients, Norm norm) {
  const Queue queue(gradients);
  const at::Tensor sum = queue.empty(at::kDouble);
  const Measurement measurement(queue, gradients.index_for_reading(), norm, Precision::kFloat64);
  measurement.finish(queue, sum.mutable_data_ptr<double>(), at::Tensor());
  return sum;
}

void scale_(const Gradients& gradients, const Number& coefficient) {
  if (coefficient.is_known() && coefficient.value == 1.0) return;
  const Queue queue(gradients);
  scale_by(queue, gradients, clip_by_given(coefficient, /*is_coefficient=*/true, Number()),
           /*early=*/false);
}

void clamp_(const Gradients& gradients, double bound) {
  const Queue queue(gradients);
  write(gradients,
        [&](const cuda::Plan& plan) { return cuda::clamp(plan, bound, queue.stream()); });
}

// The norms from launch(partials, slots), which measures with one plan.
template <class Launch>
Norms launched_norms(const Queue& queue, const Gradients& gradients, int64_t tensors,
                     const cuda::Plan& plan, Norm norm, const Launch& launch) {
  const at::Tensor total = queue.empty(at::kDouble);
  const at::Tensor compact = queue.empty(at::kDouble, {tensors});
  const c10::DataPtr partials = queue.scratch(std::max<int64_t>(plan.partials(), 1));
  const c10::DataPtr slots = queue.scratch(std::max<int64_t>(plan.slots(), 1));
  double* partial = static_cast<double*>(partials.get());
  double* slot = static_cast<double*>(slots.get());
  check(launch(partial, slot));
  check(cuda::finish(norm, partial, plan.partials(), nullptr, DType::kFloat64,
                     total.mutable_data_ptr(), queue.stream()));
  check(cuda::tensor_norms(plan, norm, slot, compact.mutable_data_ptr<double>(), queue.stream()));
  const at::Tensor positions = positions_on(queue, gradients);
  if (!positions.defined()) return {total, compact};
  const at::Tensor each = queue.empty(at::kDouble, {gradients.listed()});
  each.zero_();
  each.index_copy_(0, positions, compact);
  return {total, each};
}

Norms grad_norms(const Gradients& gradients, Norm norm, Precision precision) {
  const Queue queue(gradients);
  const FlatIndex index = gradients.index_for_reading();
  const cuda::Plan plan = plan_of(index);
  return launched_norms(
      queue, gradients, index.tensors(), plan, norm, [&](double* partials, double* slots) {
        return cuda::power_sums(plan, norm, precision, partials, slots, queue.stream());
      });
}

std::optional<Norms> decay_and_grad_norms(const Gradients& gradients, const FlatIndex& index,
                                          const Decay& decay, Norm norm, Precision precision) {
  for (int64_t i = 0; i < index.tensors(); ++i) {
    const auto gradient = reinterpret_cast<uintptr_t>(index.spans()[static_cast<size_t>(i)].data);
    if ((gradient ^ reinterpret_cast<uintptr_t>(decay.parameters[i])) & 15) return std::nullopt;
  }
  const Queue queue(gradients);
  cuda::Plan plan;
  const cudaError_t error = cuda::Plan::make_for_decay(index, &plan);
  if (error == cudaErrorNotSupported) return std::nullopt;
  check(error);
  gradients.bump_versions();
  return launched_norms(queue, gradients, index.tensors(), plan, norm,
                        [&](double* partials, double* slots) {
                          return cuda::decay_and_power_sums(plan, norm, precision, decay, partials,
                                                            slots, queue.stream());
                        });
}

bool scale_each_(const Gradients& gradients, const at::Tensor& coefficients) {
  const Queue queue(gradients);
  const FlatIndex index = gradients.index_for_writing();
  if (share_memory(index)) return false;
  gradients.bump_versions();
  const at::Tensor positions = positions_on(queue, gradients);
  const at::Tensor compact =
      positions.defined() ? coefficients.index_select(0, positions) : coefficients;
  check(cuda::scale_each(plan_of(index), compact.const_data_ptr<double>(), queue.stream()));
  return true;
}

std::optional<at::Tensor> clip_grad_norm_(const Gradients& gradients, const Number& max_norm,
                                          Norm norm, Precision precision, bool error_if_nonfinite,
                                          at::ScalarType result_dtype) {
  const Queue queue(gradients);
  const at::Tensor result = queue.empty(result_dtype);
  cuda::Clip clip = {};
  clip.norm = norm;
  clip.max_norm = scalar_of(max_norm);
  clip.norm_result = result.mutable_data_ptr();
  clip.norm_dtype = *native_dtype(result_dtype);
  const FlatIndex index = gradients.index_for_reading();
  const bool is_small = index.tensors() > 0 && cuda::fits_one_block(index);
  if (is_small && !error_if_nonfinite && !share_memory(index)) {
    gradients.bump_versions();
    const FlatIndex writable = gradients.index_for_writing();
    check(cuda::clip_in_one_block(plan_of(writable), precision, clip, queue.stream()));
    return result;
  }
  const Measurement measurement(queue, index, norm, precision);
  if (error_if_nonfinite && !std::isfinite(measurement.awaited_norm(queue))) return std::nullopt;
  gradients.bump_versions();
  if (measurement.count() == 0) {
    measurement.finish(queue, nullptr, result);
    return result;
  }
  clip.partials = measurement.partials();
  clip.count = measurement.count();
  scale_by(queue, gradients, clip, /*early=*/!error_if_nonfinite);
  return result;
}

std::optional<at::Tensor> get_total_norm(const Gradients& gradients, Norm norm, Precision precision,
                                         bool error_if_nonfinite, at::ScalarType result_dtype) {
  const Queue queue(gradients);
  const at::Tensor result = queue.empty(result_dtype);
  const Measurement measurement(queue, gradients.index_for_reading(), norm, precision);
  if (error_if_nonfinite && !std::isfinite(measurement.awaited_norm(queue))) return std::nullopt;
  measurement.finish(queue, nullptr, result);
  return result;
}

void clip_grads_with_norm_(const Gradients& gradients, const Number& max_norm,
                           const Number& total_norm) {
  const Queue queue(gradients);
  scale_by(queue, gradients, clip_by_given(total_norm, /*is_coefficient=*/false, max_norm),
           /*early=*/false);
}

}  // namespace gradclip::binding::cuda_engine
