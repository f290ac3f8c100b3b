// For the emulation: CPU memory filled with NaN, so that a read before the first write shows.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace c10::cuda::CUDACachingAllocator {

struct PoisonedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    std::memset(memory.get(), 0xff, bytes);
    return memory;
  }

  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};

inline c10::Allocator* get() {
  static PoisonedAllocator allocator;
  return &allocator;
}

}  // namespace c10::cuda::CUDACachingAllocator
