#include "cpu/passes.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/walk.h"

namespace gradclip::cpu {
namespace {

// Tiles to which weight decay is added at a time. With those of the parameter they fit into a
// core's second cache.
constexpr int64_t kDecayTiles = 8;

std::array<Span, kStreams> parts_at(const Cursors& cursors, int64_t tiles) {
  return {cursors[0].part(tiles), cursors[1].part(tiles), cursors[2].part(tiles),
          cursors[3].part(tiles)};
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

void power_sums(const FlatIndex& index, Norm kind, Precision precision, const Decay* decay,
                Range tiles, double* sums) noexcept {
  const Kernels& kernel = kernels();
  if (decay != nullptr) {
    // A few tiles at a time, so that what was written is measured while it is in cache. Not in
    // streams: whether loads of parameters wait for stores to gradients is up to their addresses.
    walk_one(Cursor(index, tiles), kDecayTiles, [&](const Cursor& cursor, int64_t count) {
      const Span run = cursor.part(count);
      kernel.add_scaled(run, decayed_by(index, *decay, cursor.tensor(), run), decay->factor);
      kernel.power_sums(kind, precision, run, sums + cursor.tile());
    });
    return;
  }
  walk_forward(
      index, tiles,
      [&](const Cursor& cursor, int64_t count) {
        kernel.power_sums(kind, precision, cursor.part(count), sums + cursor.tile());
      },
      [&](const Cursors& cursors, int64_t count) {
        double* const own[kStreams] = {sums + cursors[0].tile(), sums + cursors[1].tile(),
                                       sums + cursors[2].tile(), sums + cursors[3].tile()};
        kernel.power_sums_of_streams(kind, precision, parts_at(cursors, count).data(), own);
      });
}

double total_power_sum(Norm kind, const std::vector<double>& sums) {
  // Several at once, since each addition waits for the one before.
  constexpr size_t kLanes = 8;
  std::array<PowerSum, kLanes> lanes = {PowerSum(kind), PowerSum(kind), PowerSum(kind),
                                        PowerSum(kind), PowerSum(kind), PowerSum(kind),
                                        PowerSum(kind), PowerSum(kind)};
  size_t tile = 0;
  for (; tile + kLanes <= sums.size(); tile += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane].add(sums[tile + lane]);
  }
  PowerSum total(kind);
  for (; tile < sums.size(); ++tile) total.add(sums[tile]);
  for (const PowerSum& lane : lanes) total.add(lane.value());
  return total.value();
}

std::vector<double> tensor_norms(const FlatIndex& index, Norm kind,
                                 const std::vector<double>& sums) {
  std::vector<double> norms;
  norms.reserve(static_cast<size_t>(index.tensors()));
  for (int64_t tensor = 0; tensor < index.tensors(); ++tensor) {
    PowerSum sum(kind);
    for (int64_t tile = index.first_tile(tensor); tile < index.end_tile(tensor); ++tile) {
      sum.add(sums[static_cast<size_t>(tile)]);
    }
    norms.push_back(finish(kind, sum.value()));
  }
  return norms;
}

void scale(const FlatIndex& index, double coefficient, Range tiles) noexcept {
  const Kernels& kernel = kernels();
  const double coefficients[kStreams] = {coefficient, coefficient, coefficient, coefficient};
  walk_backward(
      index, tiles,
      [&](const Cursor& cursor, int64_t count) { kernel.scale(cursor.part(count), coefficient); },
      [&](const Cursors& cursors, int64_t count) {
        kernel.scale_streams(parts_at(cursors, count).data(), coefficients);
      });
}

void scale_each(const FlatIndex& index, const double* coefficients, Range tiles) noexcept {
  const Kernels& kernel = kernels();
  const auto scale_one = [&](const Cursor& cursor, int64_t count) {
    const double coefficient = coefficients[cursor.tensor()];
    const Span run = cursor.part(count);
    if (coefficient == 0.0) {
      std::memset(run.data, 0, static_cast<size_t>(run.numel * element_size(run.dtype)));
    } else if (coefficient != 1.0) {
      kernel.scale(run, coefficient);
    }
  };
  walk_backward(index, tiles, scale_one, [&](const Cursors& cursors, int64_t count) {
    double own[kStreams];
    bool multiplies = true;
    for (size_t stream = 0; stream < cursors.size(); ++stream) {
      own[stream] = coefficients[cursors[stream].tensor()];
      multiplies = multiplies && own[stream] != 0.0 && own[stream] != 1.0;
    }
    if (multiplies) {
      kernel.scale_streams(parts_at(cursors, count).data(), own);
    } else {
      for (const Cursor& cursor : cursors) scale_one(cursor, count);
    }
  });
}

void clamp(const FlatIndex& index, double bound, Range tiles) noexcept {
  const Kernels& kernel = kernels();
  walk_backward(
      index, tiles,
      [&](const Cursor& cursor, int64_t count) { kernel.clamp(cursor.part(count), bound); },
      [&](const Cursors& cursors, int64_t count) {
        kernel.clamp_streams(parts_at(cursors, count).data(), bound);
      });
}

void add_decay(const FlatIndex& index, const Decay& decay, Range tiles) noexcept {
  const Kernels& kernel = kernels();
  const auto add_one = [&](const Cursor& cursor, int64_t count) {
    const Span run = cursor.part(count);
    kernel.add_scaled(run, decayed_by(index, decay, cursor.tensor(), run), decay.factor);
  };
  walk_backward(index, tiles, add_one, [&](const Cursors& cursors, int64_t count) {
    for (const Cursor& cursor : cursors) add_one(cursor, count);
  });
}

double clip_rows(const FlatIndex& index, const Rows* rows, const UnitLimit& limit,
                 Range tiles) noexcept {
  const Kernels& kernel = kernels();
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
