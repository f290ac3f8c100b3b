// What every engine works on: a flat run of real numbers in memory. The binding makes spans out of
// tensors; nothing below the binding knows what a tensor is.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace gradclip {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Logarithm of the element size: sizes are divided by often enough for a shift to matter.
GRADCLIP_HOST_DEVICE constexpr int element_shift(DType dtype) {
  return dtype == DType::kFloat64 ? 3 : dtype == DType::kFloat32 ? 2 : 1;
}

GRADCLIP_HOST_DEVICE constexpr int64_t element_size(DType dtype) {
  return int64_t{1} << element_shift(dtype);
}

// `numel` counts real numbers: a complex tensor is a span of twice its numel.
struct Span {
  void* data;
  int64_t numel;
  DType dtype;
};

}  // namespace gradclip
