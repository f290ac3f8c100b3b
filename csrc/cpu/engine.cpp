#include "cpu/engine.h"

#include <algorithm>

#include "cpu/kernels.h"

namespace gradclip::cpu {
namespace {

// Enough that a hundred threads get nearly equal shares, few enough that adding up their partials
// takes no time.
constexpr int64_t kMaxWorkers = 1024;

// Consecutive workers own consecutive tiles.
Range tiles_of_workers(const FlatIndex& index, Range workers) {
  const int64_t count = worker_count(index);
  return {tiles_of_worker(workers.begin, count, index.tiles()).begin,
          tiles_of_worker(workers.end - 1, count, index.tiles()).end};
}

}  // namespace

int64_t worker_count(const FlatIndex& index) { return std::min(index.tiles(), kMaxWorkers); }

void power_sums(const FlatIndex& index, Norm norm, Precision precision, Range workers,
                double* slots) noexcept {
  const Kernels& kernel = kernels();
  const int64_t count = worker_count(index);
  const Range tiles = tiles_of_workers(index, workers);
  int64_t worker = workers.begin;
  int64_t worker_end = tiles_of_worker(worker, count, index.tiles()).end;
  int64_t slot = slot_of(index.tensor_of(tiles.begin), worker);
  // Where a worker starts on a tensor's first tile, both numbers advance at once, and the slot
  // between the one before and its own belongs to nobody.
  if (worker > 0 && index.first_tile(slot - worker) == tiles.begin) slots[slot - 1] = 0.0;
  PowerSum sum(norm);
  walk_forward(index, tiles, [&](int64_t tensor, int64_t tile, const Span& part) {
    if (tile == worker_end) {
      worker_end = tiles_of_worker(++worker, count, index.tiles()).end;
    }
    if (slot != slot_of(tensor, worker)) {
      slots[slot] = sum.value();
      sum = PowerSum(norm);
      if (slot_of(tensor, worker) == slot + 2) slots[slot + 1] = 0.0;
      slot = slot_of(tensor, worker);
    }
    sum.add(kernel.power_sum(norm, precision, part));
  });
  slots[slot] = sum.value();
}

void scale(const FlatIndex& index, double coefficient, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers),
                [&](int64_t, int64_t, const Span& part) { kernel.scale(part, coefficient); });
}

void clamp(const FlatIndex& index, double bound, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers),
                [&](int64_t, int64_t, const Span& part) { kernel.clamp(part, bound); });
}

}  // namespace gradclip::cpu
