// The order in which a thread visits its tiles: in kStreams streams at once, each through a part of
// them, since memory serves several streams faster than one. The order does not show in a result:
// each tile has a sum of its own, and each element is written alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "core/flat_index.h"
#include "core/span.h"
#include "cpu/kernels.h"

namespace gradclip::cpu {

// A place in a range of tiles, and the tensor there.
class Cursor {
 public:
  Cursor(const FlatIndex& index, Range tiles)
      : index_(&index),
        tile_(tiles.begin),
        end_(tiles.end),
        tensor_(tiles.begin < tiles.end ? index.tensor_of(tiles.begin) : 0) {}

  bool is_done() const { return tile_ >= end_; }
  int64_t tile() const { return tile_; }
  int64_t tensor() const { return tensor_; }
  DType dtype() const { return index_->spans()[static_cast<size_t>(tensor_)].dtype; }

  // How many tiles of the tensor follow within the range.
  int64_t tiles() const { return std::min(end_, index_->end_tile(tensor_)) - tile_; }

  // How many of these are full: all but the last one of a tensor are.
  int64_t full_tiles() const {
    const Span& span = index_->spans()[static_cast<size_t>(tensor_)];
    const int64_t full = index_->first_tile(tensor_) + span.numel / tile_elements(span.dtype);
    return std::min(end_, full) - tile_;
  }

  Span part(int64_t tiles) const { return index_->part(tensor_, {tile_, tile_ + tiles}); }

  void advance(int64_t tiles) {
    tile_ += tiles;
    if (tile_ == index_->end_tile(tensor_)) ++tensor_;
  }

 private:
  const FlatIndex* index_;
  int64_t tile_;
  int64_t end_;
  int64_t tensor_;
};

using Cursors = std::array<Cursor, kStreams>;

// In a shorter range streams gain nothing.
inline constexpr int64_t kFewestTilesForStreams = 32;

// How far a stream goes back at a time.
inline constexpr int64_t kStrideTiles = 32;

inline Cursors cursors_of(const FlatIndex& index, const std::array<Range, kStreams>& parts) {
  return {Cursor(index, parts[0]), Cursor(index, parts[1]), Cursor(index, parts[2]),
          Cursor(index, parts[3])};
}

inline std::array<Range, kStreams> parts_of(Range tiles) {
  std::array<Range, kStreams> parts;
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    const Range part = tiles_of_worker(stream, kStreams, tiles.end - tiles.begin);
    parts[static_cast<size_t>(stream)] = {tiles.begin + part.begin, tiles.begin + part.end};
  }
  return parts;
}

// Of tiles visited at a time.
inline constexpr int64_t kAnyNumber = std::numeric_limits<int64_t>::max();

// Calls visit_one(cursor, tiles) for what is left at a cursor, at most `most` tiles at a time.
template <class VisitOne>
void walk_one(Cursor cursor, int64_t most, const VisitOne& visit_one) {
  while (!cursor.is_done()) {
    const int64_t tiles = std::min(cursor.tiles(), most);
    visit_one(cursor, tiles);
    cursor.advance(tiles);
  }
}

// Calls visit_streams(cursors, tiles) where all streams are at full tiles of one dtype, and
// visit_one(cursor, tiles) for everything else.
template <class VisitOne, class VisitStreams>
void walk_streams(Cursors cursors, const VisitOne& visit_one, const VisitStreams& visit_streams) {
  for (;;) {
    int64_t together = kAnyNumber;
    bool same_dtype = true;
    for (Cursor& cursor : cursors) {
      while (!cursor.is_done() && cursor.full_tiles() <= 0) {
        visit_one(cursor, 1);
        cursor.advance(1);
      }
      if (cursor.is_done()) {
        together = 0;
        break;
      }
      together = std::min(together, cursor.full_tiles());
      same_dtype = same_dtype && cursor.dtype() == cursors[0].dtype();
    }
    if (together == 0) break;
    if (same_dtype) {
      visit_streams(cursors, together);
    } else {
      for (const Cursor& cursor : cursors) visit_one(cursor, together);
    }
    for (Cursor& cursor : cursors) cursor.advance(together);
  }
  for (const Cursor& cursor : cursors) walk_one(cursor, kAnyNumber, visit_one);
}

// The order of measuring: forward.
template <class VisitOne, class VisitStreams>
void walk_forward(const FlatIndex& index, Range tiles, const VisitOne& visit_one,
                  const VisitStreams& visit_streams) {
  if (tiles.end - tiles.begin < kFewestTilesForStreams) {
    walk_one(Cursor(index, tiles), kAnyNumber, visit_one);
    return;
  }
  walk_streams(cursors_of(index, parts_of(tiles)), visit_one, visit_streams);
}

// The order of scaling: from the back, so that what was measured last, and is still in cache, is
// written first. It goes back in strides and forward within each of them, because prefetchers run
// forward: going back tile by tile costs a quarter of memory bandwidth.
template <class VisitOne, class VisitStreams>
void walk_backward(const FlatIndex& index, Range tiles, const VisitOne& visit_one,
                   const VisitStreams& visit_streams) {
  if (tiles.end - tiles.begin < kFewestTilesForStreams) {
    walk_one(Cursor(index, tiles), kAnyNumber, visit_one);
    return;
  }
  std::array<Range, kStreams> parts = parts_of(tiles);
  bool is_left = true;
  while (is_left) {
    is_left = false;
    std::array<Range, kStreams> strides = parts;
    for (size_t stream = 0; stream < parts.size(); ++stream) {
      Range& part = parts[stream];
      strides[stream].begin = std::max(part.begin, part.end - kStrideTiles);
      part.end = strides[stream].begin;
      is_left = is_left || part.begin < part.end;
    }
    walk_streams(cursors_of(index, strides), visit_one, visit_streams);
  }
}

}  // namespace gradclip::cpu
