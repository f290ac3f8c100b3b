// Sums and maxima in float64: of a thread, of a warp, of a block.
#pragma once

#include "core/norm.h"
#include "cuda/elements.cuh"

namespace gradclip::cuda {

// A compensated sum: the sum and its rounding error (Knuth's TwoSum), so that the order of
// additions does not matter. Trivial, because it is kept in shared memory.
template <Norm kNorm>
struct Accumulator {
  double sum;
  double lost;

  static __device__ __forceinline__ Accumulator zero() { return {0.0, 0.0}; }

  __device__ __forceinline__ void add(double partial) {
    const double total = sum + partial;
    const double added = total - sum;
    lost += (sum - (total - added)) + (partial - added);
    sum = total;
  }

  __device__ __forceinline__ void merge(const Accumulator& other) {
    add(other.sum);
    lost += other.lost;
  }

  __device__ __forceinline__ Accumulator shuffled_down(int offset) const {
    return {shuffle_down(sum, offset), shuffle_down(lost, offset)};
  }

  // If the sum is not finite, `lost` is inf - inf and meaningless.
  __device__ __forceinline__ double value() const { return isfinite(sum) ? sum + lost : sum; }
};

// The largest magnitude, compared by its bits: as unsigned integers NaN > inf > finite, so NaN
// needs no test.
template <>
struct Accumulator<Norm::kInf> {
  uint64_t bits;

  static __device__ __forceinline__ Accumulator zero() { return {0}; }

  __device__ __forceinline__ void add(double magnitude) {
    const uint64_t other = bits_of(magnitude);
    bits = other > bits ? other : bits;
  }

  __device__ __forceinline__ void merge(const Accumulator& other) {
    bits = other.bits > bits ? other.bits : bits;
  }

  __device__ __forceinline__ Accumulator shuffled_down(int offset) const {
    return {static_cast<uint64_t>(shuffle_down(static_cast<unsigned long long>(bits), offset))};
  }

  __device__ __forceinline__ double value() const { return double_of(bits); }
};

// In the first thread of each warp.
template <Norm kNorm>
__device__ __forceinline__ Accumulator<kNorm> warp_total(Accumulator<kNorm> own) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    own.merge(own.shuffled_down(offset));
  }
  return own;
}

// In the first thread of the block; every thread has to call it.
template <int kThreads, Norm kNorm>
__device__ __forceinline__ Accumulator<kNorm> block_total(Accumulator<kNorm> own) {
  constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kWarps >= 1 && kWarps <= kWarpThreads, "the first warp adds up all warps");
  __shared__ Accumulator<kNorm> of_warps[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  own = warp_total(own);
  if (lane == 0) of_warps[warp] = own;
  __syncthreads();
  if (warp == 0) {
    own = lane < kWarps ? of_warps[lane] : Accumulator<kNorm>::zero();
    own = warp_total(own);
  }
  // The next call writes where this one reads.
  __syncthreads();
  return own;
}

}  // namespace gradclip::cuda
