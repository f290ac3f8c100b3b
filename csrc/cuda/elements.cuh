// Conversion between 16 bytes of memory and arithmetic values, for each dtype. Every load and store
// of a thread is 16 bytes wide, whatever the dtype.
#pragma once

#include "core/span.h"
#include "cuda/portability.cuh"

namespace gradclip::cuda {

// kCount values of type Value make 16 bytes. `get` and `put` are for single elements:
// the few at both ends of a tensor that is not aligned.
template <DType kDType>
struct Elements;

template <>
struct Elements<DType::kFloat32> {
  using Value = float;
  static constexpr int kCount = 4;
  static constexpr int kBytes = 4;

  static __device__ __forceinline__ void unpack(uint4 vector, Value (&values)[kCount]) {
    values[0] = __uint_as_float(vector.x);
    values[1] = __uint_as_float(vector.y);
    values[2] = __uint_as_float(vector.z);
    values[3] = __uint_as_float(vector.w);
  }

  static __device__ __forceinline__ uint4 pack(const Value (&values)[kCount]) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                      __float_as_uint(values[2]), __float_as_uint(values[3]));
  }

  static __device__ __forceinline__ Value get(const void* data, int64_t i) {
    return static_cast<const float*>(data)[i];
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Value value) {
    static_cast<float*>(data)[i] = value;
  }
};

template <>
struct Elements<DType::kFloat64> {
  using Value = double;
  static constexpr int kCount = 2;
  static constexpr int kBytes = 8;

  static __device__ __forceinline__ void unpack(uint4 vector, Value (&values)[kCount]) {
    values[0] = __hiloint2double(static_cast<int>(vector.y), static_cast<int>(vector.x));
    values[1] = __hiloint2double(static_cast<int>(vector.w), static_cast<int>(vector.z));
  }

  static __device__ __forceinline__ uint4 pack(const Value (&values)[kCount]) {
    return make_uint4(static_cast<uint32_t>(__double2loint(values[0])),
                      static_cast<uint32_t>(__double2hiint(values[0])),
                      static_cast<uint32_t>(__double2loint(values[1])),
                      static_cast<uint32_t>(__double2hiint(values[1])));
  }

  static __device__ __forceinline__ Value get(const void* data, int64_t i) {
    return static_cast<const double*>(data)[i];
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Value value) {
    static_cast<double*>(data)[i] = value;
  }
};

// What both 16-bit formats share; Pairs packs two of them into a word.
template <class Pairs>
struct SixteenBitElements {
  using Value = float;
  static constexpr int kCount = 8;
  static constexpr int kBytes = 2;

  static __device__ __forceinline__ void unpack(uint4 vector, Value (&values)[kCount]) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = Pairs::unpack(words[k]);
      values[2 * k] = pair.x;
      values[2 * k + 1] = pair.y;
    }
  }

  static __device__ __forceinline__ uint4 pack(const Value (&values)[kCount]) {
    return make_uint4(Pairs::pack(values[0], values[1]), Pairs::pack(values[2], values[3]),
                      Pairs::pack(values[4], values[5]), Pairs::pack(values[6], values[7]));
  }

  static __device__ __forceinline__ Value get(const void* data, int64_t i) {
    return Pairs::unpack(static_cast<const uint16_t*>(data)[i]).x;
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Value value) {
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(Pairs::pack(value, 0.0f));
  }
};

struct Float16Pairs {
  static __device__ __forceinline__ float2 unpack(uint32_t word) { return unpack_float16(word); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    return pack_float16(first, second);
  }
};

struct BFloat16Pairs {
  static __device__ __forceinline__ float2 unpack(uint32_t word) { return unpack_bfloat16(word); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    return pack_bfloat16(first, second);
  }
};

template <>
struct Elements<DType::kFloat16> : SixteenBitElements<Float16Pairs> {};

template <>
struct Elements<DType::kBFloat16> : SixteenBitElements<BFloat16Pairs> {};

__device__ __forceinline__ uint64_t bits_of(double value) {
  return static_cast<uint64_t>(__double_as_longlong(value));
}

__device__ __forceinline__ double double_of(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

}  // namespace gradclip::cuda
