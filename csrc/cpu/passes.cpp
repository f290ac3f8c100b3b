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

}  // namespace

void power_sums(const FlatIndex& index, Norm kind, Precision precision, const Decay* decay,
                Range tiles, double* sums) noexcept {
  const Kernels& kernel = kernels();
  if (decay != nullptr) {
    // A few tiles at a time, so that what was written is measured while it is in cache.
    for (Cursor cursor(index, tiles); !cursor.is_done();) {
      const int64_t count = std::min(cursor.tiles(), kDecayTiles);
      const Span run = cursor.part(count);
      const Span& whole = index.spans()[static_cast<size_t>(cursor.tensor())];
      const int64_t offset = static_cast<char*>(run.data) - static_cast<char*>(whole.data);
      const void* parameter = decay->parameters[cursor.tensor()];
      kernel.add_scaled(run, static_cast<const char*>(parameter) + offset, decay->factor);
      kernel.power_sums(kind, precision, run, sums + cursor.tile());
      cursor.advance(count);
    }
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

}  // namespace gradclip::cpu
