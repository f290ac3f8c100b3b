#include "cpu/engine.h"

#include <algorithm>

#include "cpu/kernels.h"

namespace gradclip::cpu {
namespace {

// Enough that a hundred threads get nearly equal shares, few enough that adding up their partials
// takes no time.
constexpr int64_t kMaxWorkers = 1024;

// Last worker first and each worker's last tile first: the order opposite to power_sums'.
template <class Visit>
void walk_backward(const FlatIndex& index, Range workers, const Visit& visit) {
  const int64_t count = worker_count(index);
  const Range tiles = {tiles_of_worker(workers.begin, count, index.tiles()).begin,
                       tiles_of_worker(workers.end - 1, count, index.tiles()).end};
  walk_tiles<Direction::kBackward>(index, tiles, visit);
}

}  // namespace

const Kernels& kernels() { return kPortableKernels; }

int64_t worker_count(const FlatIndex& index) { return std::min(index.tiles(), kMaxWorkers); }

void power_sums(const FlatIndex& index, Norm norm, Range workers, double* slots) noexcept {
  const Kernels& kernel = kernels();
  const int64_t count = worker_count(index);
  for (int64_t worker = workers.begin; worker < workers.end; ++worker) {
    const Range tiles = tiles_of_worker(worker, count, index.tiles());
    int64_t current = index.tensor_of(tiles.begin);
    // The worker before ended with the tensor before: the slot between its last and our first
    // belongs to nobody.
    if (worker > 0 && index.first_tile(current) == tiles.begin) {
      slots[slot_of(current, worker) - 1] = 0.0;
    }
    PowerSum sum(norm);
    walk_tiles<Direction::kForward>(index, tiles, [&](int64_t tensor, const Span& part) {
      if (tensor != current) {
        slots[slot_of(current, worker)] = sum.value();
        sum = PowerSum(norm);
        current = tensor;
      }
      sum.add(kernel.power_sum(norm, part));
    });
    slots[slot_of(current, worker)] = sum.value();
  }
}

void scale(const FlatIndex& index, double coefficient, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, workers,
                [&](int64_t, const Span& part) { kernel.scale(part, coefficient); });
}

void clamp(const FlatIndex& index, double bound, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, workers, [&](int64_t, const Span& part) { kernel.clamp(part, bound); });
}

}  // namespace gradclip::cpu
