#include "binding/cuda_engine.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "core/overlap.h"
#include "cuda/launch.h"

namespace gradclip::binding {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  // Clear the error, or the next CUDA call of the process would report it again.
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

// The tensors' device, made current, and torch's current stream on it.
class Queue {
 public:
  explicit Queue(const TensorList& tensors)
      : guard_(tensors.device()),
        device_(tensors.device()),
        stream_(c10::cuda::getCurrentCUDAStream(device_.index())) {}

  cudaStream_t stream() const { return stream_.stream(); }

  // A tensor, allocated without the dispatcher; 0-dim by default.
  at::Tensor empty(at::ScalarType dtype, at::IntArrayRef sizes = {}) const {
    return at::Tensor(at::detail::empty_generic(sizes, allocator(), c10::DispatchKeySet(kGpuKey),
                                                dtype,
                                                /*memory_format_opt=*/std::nullopt));
  }

  // Memory that may be freed as soon as its users are queued on this stream.
  c10::DataPtr scratch(int64_t doubles) const {
    return allocator()->allocate(static_cast<size_t>(doubles) * sizeof(double));
  }

 private:
  static c10::Allocator* allocator() { return c10::cuda::CUDACachingAllocator::get(); }

  c10::cuda::CUDAGuard guard_;
  c10::Device device_;
  c10::cuda::CUDAStream stream_;
};

cuda::Plan plan_of(const FlatIndex& index, const cuda::Companions& companions = {}) {
  cuda::Plan plan;
  check(cuda::make_plan(index, companions, &plan));
  return plan;
}

cuda::Scalar scalar_of(const Scalar& scalar) {
  if (scalar.is_known()) return {scalar.value, nullptr, DType::kFloat64};
  return {0.0, scalar.tensor.const_data_ptr(), *native_dtype(scalar.tensor.scalar_type())};
}

// The partial sums of all tensors, for the kernels that follow on the same stream.
class Measurement {
 public:
  Measurement(const Queue& queue, const FlatIndex& index, Norm kind, Precision precision)
      : kind_(kind) {
    const cuda::Plan plan = plan_of(index);
    count_ = plan.partials();
    // At least one, since the kernels take a null pointer for a norm that is given.
    memory_ = queue.scratch(std::max<int64_t>(count_, 1));
    check(cuda::power_sums(plan, kind, precision, partials(), nullptr, queue.stream()));
  }

  // Either may be null.
  void finish(const Queue& queue, double* power_sum, const at::Tensor& norm_result) const {
    void* result = norm_result.defined() ? norm_result.mutable_data_ptr() : nullptr;
    const at::ScalarType dtype = norm_result.defined() ? norm_result.scalar_type() : at::kDouble;
    check(cuda::finish(kind_, partials(), count_, power_sum, *native_dtype(dtype), result,
                       queue.stream()));
  }

  // The norm, on the host. This is a device sync.
  double awaited_norm(const Queue& queue) const {
    const at::Tensor sum = queue.empty(at::kDouble);
    finish(queue, sum.mutable_data_ptr<double>(), at::Tensor());
    return gradclip::finish(kind_, sum.item().toDouble());
  }

  double* partials() const { return static_cast<double*>(memory_.get()); }
  int32_t count() const { return static_cast<int32_t>(count_); }

 private:
  Norm kind_;
  int64_t count_ = 0;
  c10::DataPtr memory_;
};

// Queues a writing kernel. Blocks must not race on memory that two tensors share, so such a list is
// split into several without overlap, which run one after another.
template <class Launch>
void write(const TensorList& tensors, const Launch& launch) {
  for (const FlatIndex& index : tensors.disjoint_indices_for_writing()) {
    check(launch(plan_of(index)));
  }
}

void scale_by(const Queue& queue, const TensorList& tensors, cuda::Clip clip, bool early) {
  write(tensors, [&](const cuda::Plan& plan) {
    const cudaError_t error = cuda::scale(plan, clip, early, queue.stream());
    // Of several launches, only the first writes the norm and directly follows the measurement.
    clip.norm_result = nullptr;
    early = false;
    return error;
  });
}

cuda::Clip clip_by_given(const Scalar& given, bool is_coefficient, const Scalar& max_norm) {
  cuda::Clip clip = {};
  clip.given_norm = scalar_of(given);
  clip.is_coefficient = is_coefficient;
  clip.max_norm = scalar_of(max_norm);
  return clip;
}

// Whether each gradient and its parameter have the same offset from a 16-byte boundary, so that a
// vector load of either holds the same elements.
bool have_same_alignment(const FlatIndex& index, const std::vector<const void*>& parameters) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto gradient = reinterpret_cast<uintptr_t>(index.spans()[i].data);
    if ((gradient ^ reinterpret_cast<uintptr_t>(parameters[i])) & 15) return false;
  }
  return true;
}

// For a plan with positions, of a list of which `listed` are counted.
Norms norms_of(const Queue& queue, int64_t listed, const FlatIndex& index, const cuda::Plan& plan,
               Norm kind, Precision precision) {
  const at::Tensor total = queue.empty(at::kDouble);
  const at::Tensor each = queue.empty(at::kDouble, {listed});
  if (index.tensors() < listed) each.zero_();
  const c10::DataPtr partials = queue.scratch(std::max<int64_t>(plan.partials(), 1));
  const c10::DataPtr slots = queue.scratch(std::max<int64_t>(plan.slots(), 1));
  double* partial = static_cast<double*>(partials.get());
  double* slot = static_cast<double*>(slots.get());
  check(cuda::power_sums(plan, kind, precision, partial, slot, queue.stream()));
  check(cuda::finish(kind, partial, plan.partials(), nullptr, DType::kFloat64,
                     total.mutable_data_ptr(), queue.stream()));
  check(cuda::tensor_norms(plan, kind, slot, each.mutable_data_ptr<double>(), queue.stream()));
  return {total, each};
}

// The plan of a launch that adds the decay, if the device and the alignment of the tensors allow
// it.
std::optional<cuda::Plan> decaying_plan(const FlatIndex& index, const cuda::Companions& companions,
                                        const std::vector<const void*>& parameters) {
  if (!have_same_alignment(index, parameters)) return std::nullopt;
  cuda::Plan plan;
  const cudaError_t error = cuda::make_plan(index, companions, &plan);
  if (error == cudaErrorNotSupported) return std::nullopt;
  check(error);
  return plan;
}

// A single block measures and scales a row, which takes too long for a longer one. An estimate, not
// yet measured on a GPU.
constexpr int64_t kLongRowBytes = 4 * 1024 * 1024;

bool is_long(const Rows& rows) { return rows.bytes_of_row() > kLongRowBytes; }

class CudaEngine final : public Engine {
 public:
  at::Tensor power_sum(const TensorList& tensors, Norm kind) const override {
    const Queue queue(tensors);
    const at::Tensor sum = queue.empty(at::kDouble);
    const Measurement measurement(queue, tensors.index_for_reading(), kind, Precision::kFloat64);
    measurement.finish(queue, sum.mutable_data_ptr<double>(), at::Tensor());
    return sum;
  }

  std::optional<at::Tensor> total_norm(const TensorList& tensors,
                                       const NormRequest& request) const override {
    const Queue queue(tensors);
    const at::Tensor result = queue.empty(request.result_dtype);
    const Measurement measurement(queue, tensors.index_for_reading(), request.kind,
                                  request.precision);
    if (request.error_if_nonfinite && !std::isfinite(measurement.awaited_norm(queue))) {
      return std::nullopt;
    }
    measurement.finish(queue, nullptr, result);
    return result;
  }

  std::optional<at::Tensor> clip_norm(const TensorList& tensors, const NormRequest& request,
                                      const Scalar& max_norm) const override {
    const Queue queue(tensors);
    const at::Tensor result = queue.empty(request.result_dtype);
    cuda::Clip clip = {};
    clip.kind = request.kind;
    clip.max_norm = scalar_of(max_norm);
    clip.norm_result = result.mutable_data_ptr();
    clip.norm_dtype = *native_dtype(request.result_dtype);
    const FlatIndex& index = tensors.index_for_reading();
    const bool is_small = index.tensors() > 0 && cuda::fits_one_block(index);
    if (is_small && !request.error_if_nonfinite && !share_memory(index)) {
      const FlatIndex& writable = tensors.index_for_writing();
      check(cuda::clip_in_one_block(plan_of(writable), request.precision, clip, queue.stream()));
      return result;
    }
    const Measurement measurement(queue, index, request.kind, request.precision);
    if (request.error_if_nonfinite && !std::isfinite(measurement.awaited_norm(queue))) {
      return std::nullopt;
    }
    if (measurement.count() == 0) {
      measurement.finish(queue, nullptr, result);
      return result;
    }
    clip.partials = measurement.partials();
    clip.count = measurement.count();
    // Tensors that share memory are looked for in here, on the host while the GPU measures.
    scale_by(queue, tensors, clip, /*early=*/!request.error_if_nonfinite);
    return result;
  }

  std::optional<Norms> norms(const TensorList& tensors, Norm kind, Precision precision,
                             const WeightDecay* decay) const override {
    const std::vector<int64_t> positions = tensors.positions();
    if (decay == nullptr) {
      const Queue queue(tensors);
      const FlatIndex& index = tensors.index_for_reading();
      const cuda::Plan plan = plan_of(index, {nullptr, positions.data()});
      return norms_of(queue, tensors.listed(), index, plan, kind, precision);
    }
    const std::vector<FlatIndex> indices = tensors.disjoint_indices_for_writing();
    if (indices.size() != 1) return std::nullopt;
    const FlatIndex& index = indices.front();
    const std::vector<const void*> parameters = decay->parameters.pointers();
    const Decay added = {decay->factor, parameters.data()};
    const Queue queue(tensors);
    const std::optional<cuda::Plan> plan =
        decaying_plan(index, {&added, positions.data()}, parameters);
    if (!plan) return std::nullopt;
    return norms_of(queue, tensors.listed(), index, *plan, kind, precision);
  }

  void scale(const TensorList& tensors, const Scalar& coefficient) const override {
    if (coefficient.is_known() && coefficient.value == 1.0) return;
    const Queue queue(tensors);
    scale_by(queue, tensors, clip_by_given(coefficient, /*is_coefficient=*/true, Scalar()),
             /*early=*/false);
  }

  void scale_to_norm(const TensorList& tensors, const Scalar& max_norm,
                     const Scalar& total_norm) const override {
    const Queue queue(tensors);
    scale_by(queue, tensors, clip_by_given(total_norm, /*is_coefficient=*/false, max_norm),
             /*early=*/false);
  }

  bool scale_each(const TensorList& tensors, const at::Tensor& coefficients) const override {
    const Queue queue(tensors);
    const std::vector<FlatIndex> indices = tensors.disjoint_indices_for_writing();
    if (indices.size() != 1) return false;
    const std::vector<int64_t> positions = tensors.positions();
    check(cuda::scale_each(indices.front(), positions.data(), coefficients.const_data_ptr<double>(),
                           queue.stream()));
    return true;
  }

  void clamp(const TensorList& tensors, double bound) const override {
    const Queue queue(tensors);
    write(tensors,
          [&](const cuda::Plan& plan) { return cuda::clamp(plan, bound, queue.stream()); });
  }

  // In the kernel that also measures, which reads no more memory; what it finds is dropped.
  bool add_weight_decay(const TensorList& tensors, const WeightDecay& decay) const override {
    const FlatIndex index = tensors.index_for_writing();
    const std::vector<const void*> parameters = decay.parameters.pointers();
    const Decay added = {decay.factor, parameters.data()};
    const Queue queue(tensors);
    const std::optional<cuda::Plan> plan = decaying_plan(index, {&added, nullptr}, parameters);
    if (!plan) return false;
    const c10::DataPtr partials = queue.scratch(std::max<int64_t>(plan->partials(), 1));
    const c10::DataPtr slots = queue.scratch(std::max<int64_t>(plan->slots(), 1));
    check(cuda::power_sums(*plan, Norm::kInf, Precision::kFloat32,
                           static_cast<double*>(partials.get()), static_cast<double*>(slots.get()),
                           queue.stream()));
    return true;
  }

  std::optional<at::Tensor> clip_units(const TensorList& tensors, const TensorList& parameters,
                                       const UnitLimit& limit) const override {
    const std::vector<Rows> rows = rows_of(tensors, parameters);
    if (rows.empty() || std::any_of(rows.begin(), rows.end(), is_long)) return std::nullopt;
    const Queue queue(tensors);
    cuda::RowsPlan plan;
    check(cuda::make_plan(rows, &plan));
    const at::Tensor smallest = queue.empty(at::kDouble, {plan.workers()});
    check(cuda::clip_rows(plan, limit, smallest.mutable_data_ptr<double>(), queue.stream()));
    return smallest.min();
  }
};

}  // namespace

const Engine& cuda_engine() {
  static const CudaEngine engine;
  return engine;
}

}  // namespace gradclip::binding
