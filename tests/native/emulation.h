// Runs the bodies of the CUDA kernels, unchanged, on the CPU. This is an emulation and never a test
// on a GPU: it says nothing about what a compiler for GPUs makes of the source, nor about speed.
// What it does show is whether the bodies are right under every order in which a GPU may run
// threads.
//
// A thread of a block is a fiber, a block is a thread of the operating system, so that
// `static thread_local` is the shared memory of a block. Blocks pass a baton: one runs at a time,
// and a schedule, not chance, decides which. All blocks of a grid exist at once and take turns at
// their barriers. A warp runs ahead to its next barrier while the others stand still.
//
// Whatever cannot happen in a correct kernel ends the program with a message and exit status 1.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "cpu/float16.h"

namespace gradclip::emulation {

constexpr int kWarpThreads = 32;

// What a thread of a kernel calls; see grid.cpp.
void barrier();
uint64_t shuffle_down(uint64_t value, int offset);
void wait_for_previous_kernel();
void before_load_of_result();
// Of a cluster, which is a whole grid: a barrier whose halves stand apart, and where another block
// has the variable that is `own` here in shared memory.
void arrive_at_cluster_barrier();
void wait_at_cluster_barrier();
const void* shared_memory_of(int block, const void* own);

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither added nor dropped");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace gradclip::emulation

// The names that CUDA brings into every file.

#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx = {0};
inline thread_local EmulatedIndex blockIdx = {0};

// Kernels read and write memory of any type through this one.
struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x;
  uint32_t y;
  uint32_t z;
  uint32_t w;
};

struct float2 {
  float x;
  float y;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline void __syncthreads() { gradclip::emulation::barrier(); }

inline float __uint_as_float(uint32_t bits) { return gradclip::emulation::same_bits<float>(bits); }
inline uint32_t __float_as_uint(float number) {
  return gradclip::emulation::same_bits<uint32_t>(number);
}
inline long long __double_as_longlong(double number) {
  return gradclip::emulation::same_bits<long long>(number);
}
inline double __longlong_as_double(long long bits) {
  return gradclip::emulation::same_bits<double>(bits);
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
  return gradclip::emulation::same_bits<double>(bits | static_cast<uint32_t>(low));
}
inline int __double2hiint(double number) {
  return static_cast<int>(gradclip::emulation::same_bits<uint64_t>(number) >> 32);
}
inline int __double2loint(double number) {
  return static_cast<int>(gradclip::emulation::same_bits<uint64_t>(number));
}

// The functions of portability.cuh.
namespace gradclip::cuda {

template <class Value>
Value shuffle_down(Value value, int offset) {
  return emulation::same_bits<Value>(
      emulation::shuffle_down(emulation::same_bits<uint64_t>(value), offset));
}

inline double load_result(const double* pointer) {
  emulation::before_load_of_result();
  return *pointer;
}

inline void wait_for_previous_kernel() { emulation::wait_for_previous_kernel(); }

inline float2 unpack_float16(uint32_t word) {
  return {cpu::widen(cpu::Float16{static_cast<uint16_t>(word)}),
          cpu::widen(cpu::Float16{static_cast<uint16_t>(word >> 16)})};
}

template <class Half>
uint32_t pack_halves(float first, float second) {
  Half lower;
  Half upper;
  cpu::narrow(first, &lower);
  cpu::narrow(second, &upper);
  return lower.bits | static_cast<uint32_t>(upper.bits) << 16;
}

inline uint32_t pack_float16(float first, float second) {
  return pack_halves<cpu::Float16>(first, second);
}

inline uint32_t pack_bfloat16(float first, float second) {
  return pack_halves<cpu::BFloat16>(first, second);
}

}  // namespace gradclip::cuda
