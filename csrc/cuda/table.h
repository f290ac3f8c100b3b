// What a kernel knows about its tensors: a table that is passed with the launch as a parameter, by
// value, so that nothing has to be copied to the GPU beforehand or to outlive the call.
#pragma once

#include <cstdint>

#include "core/flat_index.h"
#include "core/host_device.h"
#include "core/span.h"

namespace gradclip::cuda {

// A structure of arrays, 20 bytes per tensor.
template <int kCapacity>
struct Table {
  static constexpr bool kDecays = false;

  void* data[kCapacity];
  // The number of elements, with the dtype in the top byte.
  uint64_t numel_and_dtype[kCapacity];
  uint32_t first_tile[kCapacity];
  int32_t tensors;
  uint32_t tiles;
  int32_t workers;
  // The offset of this launch among all workers and all tensors of a list that takes several
  // launches.
  int32_t first_worker;
  int32_t first_tensor;
};

// The same with the parameters whose decay is added to these gradients: 28 bytes per tensor.
template <int kCapacity>
struct DecayTable : Table<kCapacity> {
  static constexpr bool kDecays = true;

  const void* parameters[kCapacity];
  double factor;
};

// The same with the place of each tensor in the caller's list, which also counts parameters without
// a gradient and empty tensors: 24 bytes per tensor.
template <int kCapacity>
struct PositionTable : Table<kCapacity> {
  int32_t positions[kCapacity];
};

// What is needed to gather the sums of each tensor, and their places: 8 bytes per tensor.
template <int kCapacity>
struct BorderTable {
  uint32_t first_tile[kCapacity];
  int32_t positions[kCapacity];
  int32_t tensors;
  uint32_t tiles;
  int32_t workers;
  int32_t first_worker;
  int32_t first_tensor;
};

// Gradients and their parameters by rows: 40 bytes per tensor.
template <int kCapacity>
struct RowsTable {
  void* gradients[kCapacity];
  const void* weights[kCapacity];
  // The number of elements in a row, with the dtype in the top byte.
  uint64_t gradient_row[kCapacity];
  uint64_t weights_row[kCapacity];
  int64_t first_row[kCapacity];
  int64_t rows;
  int32_t tensors;
  int32_t workers;
  // The offset of this launch among all workers of a list that takes several launches.
  int32_t first_worker;
};

inline constexpr int kDTypeShift = 56;

GRADCLIP_HOST_DEVICE constexpr uint64_t pack(int64_t numel, DType dtype) {
  return static_cast<uint64_t>(numel) | static_cast<uint64_t>(dtype) << kDTypeShift;
}

GRADCLIP_HOST_DEVICE constexpr int64_t numel_of(uint64_t packed) {
  return static_cast<int64_t>(packed & ((uint64_t{1} << kDTypeShift) - 1));
}

GRADCLIP_HOST_DEVICE constexpr DType dtype_of(uint64_t packed) {
  return static_cast<DType>(packed >> kDTypeShift);
}

// A launch takes the smallest table that fits, since it copies every byte: about 1, 4, 10 and 32
// KB. A kernel's parameters may take 4 KB, or 32,764 bytes from CUDA 12.1 and compute
// capability 7.0 on. Where only 4 KB are allowed, none above kMediumTable, kMediumPositionTable or
// kRowsTable is used, and no DecayTable.
inline constexpr int kSmallTable = 40;
inline constexpr int kMediumTable = 190;
inline constexpr int kWideTable = 480;
inline constexpr int kLargeTable = 1600;
inline constexpr int kLargeDecayTable = 1100;
inline constexpr int kMediumPositionTable = 160;
inline constexpr int kLargePositionTable = 1350;
inline constexpr int kRowsTable = 100;

}  // namespace gradclip::cuda
