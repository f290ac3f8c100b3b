#include "cpu/passes.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace gradclip::cpu {
namespace {

// Enough for a hundred threads to get nearly equal shares, few enough that adding up their partials
// is negligible.
constexpr int64_t kMaxWorkers = 1024;

// Consecutive workers own consecutive tiles.
Range tiles_of_workers(const FlatIndex& index, Range workers) {
  const int64_t count = worker_count(index);
  return {tiles_of_worker(workers.begin, count, index.tiles()).begin,
          tiles_of_worker(workers.end - 1, count, index.tiles()).end};
}

}  // namespace

int64_t worker_count(const FlatIndex& index) { return std::min(index.tiles(), kMaxWorkers); }

void power_sums(const FlatIndex& index, Norm kind, Precision precision, const Decay* decay,
                Range workers, double* slots) noexcept {
  const Kernels& kernel = kernels();
  const int64_t count = worker_count(index);
  const int64_t first_tile = tiles_of_workers(index, workers).begin;
  int64_t tensor = index.tensor_of(first_tile);
  int64_t slot = slot_of(tensor, workers.begin);
  // If a worker starts on a tensor's first tile, tensor and worker advance together, and the slot
  // between the previous one and its own is unused.
  if (workers.begin > 0 && index.first_tile(tensor) == first_tile) slots[slot - 1] = 0.0;
  PowerSum sum(kind);
  for (int64_t worker = workers.begin; worker < workers.end; ++worker) {
    const Range tiles = tiles_of_worker(worker, count, index.tiles());
    tensor = walk_forward(index, tiles, tensor, [&](int64_t visited, const Span& run) {
      const int64_t own_slot = slot_of(visited, worker);
      if (slot != own_slot) {
        slots[slot] = sum.value();
        sum = PowerSum(kind);
        if (own_slot == slot + 2) slots[slot + 1] = 0.0;
        slot = own_slot;
      }
      if (decay != nullptr) {
        const void* start = index.spans()[static_cast<size_t>(visited)].data;
        const int64_t offset = static_cast<char*>(run.data) - static_cast<const char*>(start);
        kernel.add_scaled(run, static_cast<const char*>(decay->parameters[visited]) + offset,
                          decay->factor);
      }
      sum.add(kernel.power_sum(kind, precision, run));
    });
  }
  slots[slot] = sum.value();
}

std::vector<double> tensor_norms(const FlatIndex& index, Norm kind,
                                 const std::vector<double>& slots) {
  const int64_t workers = worker_count(index);
  std::vector<double> norms;
  norms.reserve(static_cast<size_t>(index.tensors()));
  for (int64_t tensor = 0; tensor < index.tensors(); ++tensor) {
    PowerSum sum(kind);
    const int64_t last = worker_of_tile(index.end_tile(tensor) - 1, workers, index.tiles());
    for (int64_t worker = worker_of_tile(index.first_tile(tensor), workers, index.tiles());
         worker <= last; ++worker) {
      sum.add(slots[static_cast<size_t>(slot_of(tensor, worker))]);
    }
    norms.push_back(finish(kind, sum.value()));
  }
  return norms;
}

void scale(const FlatIndex& index, double coefficient, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers),
                [&](int64_t, const Span& run) { kernel.scale(run, coefficient); });
}

void scale_each(const FlatIndex& index, const double* coefficients, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers), [&](int64_t tensor, const Span& run) {
    const double coefficient = coefficients[tensor];
    if (coefficient == 1.0) return;
    if (coefficient == 0.0) {
      std::memset(run.data, 0, static_cast<size_t>(run.numel * element_size(run.dtype)));
      return;
    }
    kernel.scale(run, coefficient);
  });
}

void clamp(const FlatIndex& index, double bound, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers),
                [&](int64_t, const Span& run) { kernel.clamp(run, bound); });
}

}  // namespace gradclip::cpu
