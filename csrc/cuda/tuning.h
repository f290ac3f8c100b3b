// What only a GPU can decide. Constants in a released build; one with GRADCLIP_TUNING=1 lets
// `_C.set_tuning` change them, so that bench/clip.py can confirm what bench/cuda has found.
#pragma once

#include <cstdint>

#include "cuda/table.h"

namespace gradclip::cuda {

// Reasoned, not yet measured.
struct Tuning {
  // Up to these, one block clips the whole list: a second launch would cost more than more blocks
  // gain. A single block waits for memory once for each tensor that it measures and once for each
  // that it scales, some 0.5 and 0.2 us. At most kSmallTable tensors.
  int64_t one_block_bytes = 256 * 1024;
  int64_t one_block_tensors = 8;
  // Workers, and so blocks, per multiprocessor: as many as stay resident.
  int64_t workers_per_multiprocessor = 6;
  // Whether the scaling kernel may start while the measuring one runs.
  int64_t early_start = 1;
};

static_assert(Tuning().one_block_tensors <= kSmallTable);

#if defined(GRADCLIP_TUNING)
inline Tuning& tuning() {
  static Tuning own;
  return own;
}
#else
constexpr Tuning tuning() { return {}; }
#endif

}  // namespace gradclip::cuda
