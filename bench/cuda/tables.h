// Tables of the variants: as csrc/cuda/plan.h makes them, but with tiles of any size and any number
// of workers, and always in one launch. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/flat_index.h"
#include "cuda/table.h"

namespace gradclip::cuda::sweep {

inline int64_t tiles_of(const Span& span, int64_t tile_bytes) {
  return (span.numel * element_size(span.dtype) + tile_bytes - 1) / tile_bytes;
}

inline int64_t tiles_of(const FlatIndex& index, int64_t tile_bytes) {
  int64_t tiles = 0;
  for (const Span& span : index.spans()) tiles += tiles_of(span, tile_bytes);
  return tiles;
}

template <int kCapacity>
void fill(const FlatIndex& index, int64_t tile_bytes, int64_t workers, Table<kCapacity>* table) {
  uint32_t tile = 0;
  for (int64_t i = 0; i < index.tensors(); ++i) {
    const Span& span = index.spans()[static_cast<size_t>(i)];
    table->data[i] = span.data;
    table->numel_and_dtype[i] = pack(span.numel, span.dtype);
    table->first_tile[i] = tile;
    tile += static_cast<uint32_t>(tiles_of(span, tile_bytes));
  }
  table->tensors = static_cast<int32_t>(index.tensors());
  table->tiles = tile;
  table->workers = static_cast<int32_t>(workers);
  table->first_worker = 0;
  table->first_tensor = 0;
}

// Calls work(table) with a table of this capacity.
template <int kCapacity, class Work>
auto with_table_of(const FlatIndex& index, int64_t tile_bytes, int64_t workers, const Work& work) {
  Table<kCapacity> table;
  fill(index, tile_bytes, workers, &table);
  return work(static_cast<const Table<kCapacity>&>(table));
}

// The same with the smallest of the engine's tables that holds the list.
template <class Work>
auto with_fitting_table(const FlatIndex& index, int64_t tile_bytes, int64_t workers,
                        const Work& work) {
  if (index.tensors() <= kSmallTable) {
    return with_table_of<kSmallTable>(index, tile_bytes, workers, work);
  }
  if (index.tensors() <= kMediumTable) {
    return with_table_of<kMediumTable>(index, tile_bytes, workers, work);
  }
  if (index.tensors() <= kWideTable) {
    return with_table_of<kWideTable>(index, tile_bytes, workers, work);
  }
  return with_table_of<kLargeTable>(index, tile_bytes, workers, work);
}

}  // namespace gradclip::cuda::sweep
