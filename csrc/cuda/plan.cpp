#include "cuda/plan.h"

#include <algorithm>

#include "cuda/tuning.h"

namespace gradclip::cuda {
Plan::Plan(const FlatIndex& index, const Companions& companions, int64_t capacity,
           int64_t most_workers)
    : index_(&index), companions_(companions) {
  for (int64_t begin = 0; begin < index.tensors(); begin += capacity) {
    const int64_t end = std::min(begin + capacity, index.tensors());
    const int64_t tiles = index.end_tile(end - 1) - index.first_tile(begin);
    const int64_t workers = std::min(tiles, most_workers);
    parts_.push_back(
        {{begin, end}, tiles, static_cast<int32_t>(workers), static_cast<int32_t>(partials_)});
    partials_ += workers;
  }
}

RowsPlan::RowsPlan(const std::vector<Rows>& all, int64_t capacity, int64_t most_workers)
    : all_(&all) {
  const int64_t tensors = static_cast<int64_t>(all.size());
  for (int64_t begin = 0; begin < tensors; begin += capacity) {
    const int64_t end = std::min(begin + capacity, tensors);
    int64_t rows = 0;
    for (int64_t tensor = begin; tensor < end; ++tensor) {
      rows += all[static_cast<size_t>(tensor)].count;
    }
    const int64_t workers = std::min(rows, most_workers);
    parts_.push_back(
        {{begin, end}, rows, static_cast<int32_t>(workers), static_cast<int32_t>(workers_)});
    workers_ += workers;
  }
}

bool fits_one_block(const FlatIndex& index) {
  return index.bytes() <= tuning().one_block_bytes && index.tensors() <= tuning().one_block_tensors;
}

}  // namespace gradclip::cuda
