#include "binding/cpu_operations.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <vector>

#include "core/overlap.h"
#include "cpu/engine.h"

namespace gradclip::binding::cpu_engine {
namespace {

// Below this a second thread costs more to wake than it saves.
constexpr int64_t kSerialBytes = 512 * 1024;

// Calls work(range of workers) on torch's own threads, as many as torch.set_num_threads allows.
// Each thread gets one contiguous share, and the same share for the same index every time.
template <class Work>
void for_all_workers(const FlatIndex& index, bool serial, const Work& work) {
  const int64_t workers = cpu::worker_count(index);
  if (workers == 0) return;
  if (serial || index.bytes() < kSerialBytes) {
    work(Range{0, workers});
    return;
  }
  at::parallel_for(0, workers, /*grain_size=*/1,
                   [&](int64_t begin, int64_t end) { work(Range{begin, end}); });
}

// Runs a writing pass. Threads must not meet in memory that two gradients share, so such lists are
// written one gradient after another, on this thread.
template <class Work>
void write(const Gradients& gradients, const Work& work) {
  const FlatIndex index = gradients.index_for_writing();
  const bool serial = index.bytes() >= kSerialBytes && share_memory(index);
  for_all_workers(index, serial, [&](Range workers) { work(index, workers); });
}

std::vector<double> norms_of_tensors(const FlatIndex& index, Norm norm,
                                     const std::vector<double>& slots) {
  const int64_t workers = cpu::worker_count(index);
  std::vector<double> norms;
  norms.reserve(static_cast<size_t>(index.tensors()));
  for (int64_t tensor = 0; tensor < index.tensors(); ++tensor) {
    const int64_t behind =
        tensor + 1 < index.tensors() ? index.first_tile(tensor + 1) : index.tiles();
    PowerSum sum(norm);
    const int64_t last = worker_of_tile(behind - 1, workers, index.tiles());
    for (int64_t worker = worker_of_tile(index.first_tile(tensor), workers, index.tiles());
         worker <= last; ++worker) {
      sum.add(slots[static_cast<size_t>(slot_of(tensor, worker))]);
    }
    norms.push_back(finish(norm, sum.value()));
  }
  return norms;
}

}  // namespace

double power_sum(const Gradients& gradients, Norm norm, Precision precision) {
  return power_sum(gradients.index_for_reading(), norm, precision, nullptr, nullptr);
}

double power_sum(const FlatIndex& index, Norm norm, Precision precision, const Decay* decay,
                 std::vector<double>* norms) {
  if (index.tensors() == 0) return 0.0;
  std::vector<double> slots(
      static_cast<size_t>(slot_count(index.tensors(), cpu::worker_count(index))));
  for_all_workers(index, /*serial=*/false, [&](Range workers) {
    cpu::power_sums(index, norm, precision, decay, workers, slots.data());
  });
  PowerSum total(norm);
  for (const double partial : slots) total.add(partial);
  if (norms != nullptr) *norms = norms_of_tensors(index, norm, slots);
  return total.value();
}

void scale_each_(const Gradients& gradients, const std::vector<double>& coefficients) {
  write(gradients, [&](const FlatIndex& index, Range workers) {
    cpu::scale_each(index, coefficients.data(), workers);
  });
}

void scale_(const Gradients& gradients, double coefficient) {
  // Not >= 1: NaN has to reach the gradients.
  if (coefficient == 1.0) return;
  write(gradients,
        [&](const FlatIndex& index, Range workers) { cpu::scale(index, coefficient, workers); });
}

void clamp_(const Gradients& gradients, double bound) {
  write(gradients,
        [&](const FlatIndex& index, Range workers) { cpu::clamp(index, bound, workers); });
}

at::Tensor scalar_tensor(double value, at::ScalarType dtype) {
  at::Tensor tensor(at::detail::empty_cpu({}, dtype));
  void* data = tensor.mutable_data_ptr();
  switch (dtype) {
    case at::kDouble:
      *static_cast<double*>(data) = value;
      break;
    case at::kFloat:
      *static_cast<float*>(data) = static_cast<float>(value);
      break;
    case at::kHalf:
      *static_cast<at::Half*>(data) = static_cast<float>(value);
      break;
    case at::kBFloat16:
      *static_cast<at::BFloat16*>(data) = static_cast<float>(value);
      break;
    default:
      TORCH_INTERNAL_ASSERT(false, "no norm has dtype ", dtype);
  }
  return tensor;
}

}  // namespace gradclip::binding::cpu_engine
