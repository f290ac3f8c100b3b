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

const void* behind(const void* start, int64_t bytes) {
  return static_cast<const char*>(start) + bytes;
}

// The parameter's elements that belong to a run of this tensor.
const void* decayed_by(const FlatIndex& index, const Decay& decay, int64_t tensor,
                       const Span& run) {
  const void* start = index.spans()[static_cast<size_t>(tensor)].data;
  return behind(decay.parameters[tensor],
                static_cast<const char*>(run.data) - static_cast<const char*>(start));
}

// Rows that are measured, and then scaled, together: few enough to stay in cache.
constexpr int64_t kRowsAtOnce = 128;
constexpr int64_t kRowBytesAtOnce = 64 * 1024;

// `rows` of them, from `first` on; `length` is the number of elements in a row.
Span part_of_rows(const Span& all, int64_t length, int64_t first, int64_t rows) {
  return {static_cast<char*>(all.data) + first * length * element_size(all.dtype), rows * length,
          all.dtype};
}

// The rows that begin in these bytes of the gradient.
Range rows_within(const Rows& rows, Range bytes) {
  const int64_t row_bytes = rows.gradient_row() * element_size(rows.gradient.dtype);
  return {std::min((bytes.begin + row_bytes - 1) / row_bytes, rows.count),
          std::min((bytes.end + row_bytes - 1) / row_bytes, rows.count)};
}

// Returns the smallest coefficient.
double clip_some_rows(const Kernels& kernel, const Rows& rows, Range range,
                      const UnitLimit& limit) {
  const int64_t length = rows.gradient_row();
  const int64_t weights_length = rows.weights_row();
  const int64_t row_bytes = length * element_size(rows.gradient.dtype);
  const int64_t most = std::clamp<int64_t>(kRowBytesAtOnce / row_bytes, 1, kRowsAtOnce);
  double smallest = 1.0;
  for (int64_t first = range.begin; first < range.end; first += most) {
    const int64_t count = std::min(most, range.end - first);
    const Span gradient = part_of_rows(rows.gradient, length, first, count);
    double weight_sums[kRowsAtOnce];
    double sums[kRowsAtOnce];
    double coefficients[kRowsAtOnce];
    kernel.row_sums(part_of_rows(rows.weights, weights_length, first, count), count, weight_sums);
    kernel.row_sums(gradient, count, sums);
    double smallest_here = 1.0;
    for (int64_t row = 0; row < count; ++row) {
      coefficients[row] = limit.coefficient(unit_norm(weight_sums[row], rows.weights.dtype),
                                            unit_norm(sums[row], rows.gradient.dtype));
      smallest_here = std::min(smallest_here, coefficients[row]);
    }
    if (smallest_here < 1.0) kernel.scale_rows(gradient, count, coefficients);
    smallest = std::min(smallest, smallest_here);
  }
  return smallest;
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
        kernel.add_scaled(run, decayed_by(index, *decay, visited, run), decay->factor);
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

void add_decay(const FlatIndex& index, const Decay& decay, Range workers) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(index, tiles_of_workers(index, workers), [&](int64_t tensor, const Span& run) {
    kernel.add_scaled(run, decayed_by(index, decay, tensor, run), decay.factor);
  });
}

double clip_rows(const FlatIndex& index, const Rows* rows, const UnitLimit& limit,
                 Range workers) noexcept {
  const Kernels& kernel = kernels();
  const Range tiles = tiles_of_workers(index, workers);
  double smallest = 1.0;
  for (int64_t tensor = index.tensor_of(tiles.begin);
       tensor < index.tensors() && index.first_tile(tensor) < tiles.end; ++tensor) {
    const int64_t first = index.first_tile(tensor);
    const Range bytes = {(std::max(tiles.begin, first) - first) * kTileBytes,
                         (std::min(tiles.end, index.end_tile(tensor)) - first) * kTileBytes};
    const Range own = rows_within(rows[tensor], bytes);
    smallest = std::min(smallest, clip_some_rows(kernel, rows[tensor], own, limit));
  }
  return smallest;
}

}  // namespace gradclip::cpu
