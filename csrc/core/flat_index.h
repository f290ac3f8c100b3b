// The flat index space: all gradients laid end to end and cut into tiles of a fixed number of
// bytes. Threads of the CPU and workers of a GPU (its blocks) own contiguous ranges of tiles,
// whatever tensors they belong to, so the load is balanced for any mixture of shapes and dtypes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/host_device.h"
#include "core/span.h"

namespace gradclip {

// Bytes rather than elements: with elements, a worker that owns float64 tiles would move four times
// the memory of one that owns float16 tiles.
inline constexpr int64_t kTileBytes = 16 * 1024;

GRADCLIP_HOST_DEVICE constexpr int64_t tile_elements(DType dtype) {
  return kTileBytes >> element_shift(dtype);
}

GRADCLIP_HOST_DEVICE constexpr int64_t tile_count(const Span& span) {
  return (span.numel * element_size(span.dtype) + kTileBytes - 1) / kTileBytes;
}

// Half-open.
struct Range {
  int64_t begin;
  int64_t end;
};

// No worker is empty as long as there are at least as many tiles as workers.
GRADCLIP_HOST_DEVICE constexpr Range tiles_of_worker(int64_t worker, int64_t workers,
                                                     int64_t tiles) {
  return {worker * tiles / workers, (worker + 1) * tiles / workers};
}

// The same for fewer than 2^16 workers and 2^32 tiles, without a 64-bit division, which takes a GPU
// a function call.
GRADCLIP_HOST_DEVICE constexpr Range tiles_of_worker(uint32_t worker, uint32_t workers,
                                                     uint32_t tiles) {
  const uint32_t each = tiles / workers;
  const uint32_t rest = tiles - each * workers;
  const auto begin = [&](uint32_t before) {
    return static_cast<int64_t>(uint64_t{before} * each + before * rest / workers);
  };
  return {begin(worker), begin(worker + 1)};
}

// A worker writes one partial per tensor it touches. Moving to the next tensor and moving to the
// next worker both advance the slot by one, so every (tensor, worker) pair that meets has a slot of
// its own, and walking the slots in order is walking the flat space in order.
GRADCLIP_HOST_DEVICE constexpr int64_t slot_of(int64_t tensor, int64_t worker) {
  return tensor + worker;
}

GRADCLIP_HOST_DEVICE constexpr int64_t slot_count(int64_t tensors, int64_t workers) {
  return tensors + workers - 1;
}

// The worker that owns a tile.
GRADCLIP_HOST_DEVICE constexpr int64_t worker_of_tile(int64_t tile, int64_t workers,
                                                      int64_t tiles) {
  return ((tile + 1) * workers - 1) / tiles;
}

// The tensor that holds `tile`; `first_tile` holds the first tile of each tensor, ascending.
template <class Integer, class Count>
GRADCLIP_HOST_DEVICE constexpr Count find_tensor(const Integer* first_tile, Count tensors,
                                                 int64_t tile) {
  Count low = 0;
  Count high = tensors;
  while (high - low > 1) {
    const Count middle = low + (high - low) / 2;
    (static_cast<int64_t>(first_tile[middle]) <= tile ? low : high) = middle;
  }
  return low;
}

// The tile behind the last one of `tensor`.
template <class Integer, class Count>
GRADCLIP_HOST_DEVICE constexpr int64_t end_tile(const Integer* first_tile, Count tensors,
                                                int64_t tiles, Count tensor) {
  return tensor + 1 < tensors ? static_cast<int64_t>(first_tile[tensor + 1]) : tiles;
}

// The host's copy of the table. Holds no empty span: they contribute nothing, and without them
// every tensor owns at least one tile, which the slot numbering relies on.
class FlatIndex {
 public:
  FlatIndex() = default;

  explicit FlatIndex(std::vector<Span> spans) : spans_(std::move(spans)) {
    spans_.erase(std::remove_if(spans_.begin(), spans_.end(),
                                [](const Span& span) { return span.numel == 0; }),
                 spans_.end());
    first_tile_.resize(spans_.size());
    int64_t tiles = 0;
    int64_t bytes = 0;
    for (size_t i = 0; i < spans_.size(); ++i) {
      first_tile_[i] = tiles;
      tiles += tile_count(spans_[i]);
      bytes += spans_[i].numel * element_size(spans_[i].dtype);
    }
    tiles_ = tiles;
    bytes_ = bytes;
  }

  // For a tensor whose elements were copied to other memory.
  void move(int64_t tensor, void* data) { spans_[static_cast<size_t>(tensor)].data = data; }

  const std::vector<Span>& spans() const { return spans_; }
  int64_t tensors() const { return static_cast<int64_t>(spans_.size()); }
  int64_t tiles() const { return tiles_; }
  int64_t bytes() const { return bytes_; }

  int64_t first_tile(int64_t tensor) const { return first_tile_[static_cast<size_t>(tensor)]; }
  int64_t end_tile(int64_t tensor) const {
    return gradclip::end_tile(first_tile_.data(), tensors(), tiles_, tensor);
  }
  int64_t tensor_of(int64_t tile) const { return find_tensor(first_tile_.data(), tensors(), tile); }

  // The part of `tensor` within the tiles.
  Span part(int64_t tensor, Range tiles) const {
    const Span& span = spans_[static_cast<size_t>(tensor)];
    const int64_t offset = (tiles.begin - first_tile(tensor)) * kTileBytes;
    const int64_t bytes = std::min((tiles.end - tiles.begin) * kTileBytes,
                                   span.numel * element_size(span.dtype) - offset);
    return {static_cast<char*>(span.data) + offset, bytes >> element_shift(span.dtype), span.dtype};
  }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> first_tile_;
  int64_t tiles_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace gradclip
