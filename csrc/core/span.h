// What every engine works on: a flat run of real numbers in memory. The binding makes spans out of
// tensors; nothing below the binding knows what a tensor is.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace gradclip {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

GRADCLIP_HOST_DEVICE constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// `numel` counts real numbers: a complex tensor is a span of twice its numel.
struct Span {
  void* data;
  int64_t numel;
  DType dtype;
};

}  // namespace gradclip
