// How 16 bytes of memory become numbers and numbers 16 bytes, for each dtype. All memory is read
// and written 16 bytes a thread, whatever the dtype.
#pragma once

#include "core/span.h"
#include "cuda/portability.cuh"

namespace gradclip::cuda {

// kCount numbers of type Number make 16 bytes. `get` and `put` are for single elements, of which
// there are at most a few at both ends of a tensor that is not aligned.
template <DType kDType>
struct Elements;

template <>
struct Elements<DType::kFloat32> {
  using Number = float;
  static constexpr int kCount = 4;
  static constexpr int kBytes = 4;

  static __device__ __forceinline__ void unpack(uint4 vector, Number (&numbers)[kCount]) {
    numbers[0] = __uint_as_float(vector.x);
    numbers[1] = __uint_as_float(vector.y);
    numbers[2] = __uint_as_float(vector.z);
    numbers[3] = __uint_as_float(vector.w);
  }

  static __device__ __forceinline__ uint4 pack(const Number (&numbers)[kCount]) {
    return make_uint4(__float_as_uint(numbers[0]), __float_as_uint(numbers[1]),
                      __float_as_uint(numbers[2]), __float_as_uint(numbers[3]));
  }

  static __device__ __forceinline__ Number get(const void* data, int64_t i) {
    return static_cast<const float*>(data)[i];
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Number number) {
    static_cast<float*>(data)[i] = number;
  }
};

template <>
struct Elements<DType::kFloat64> {
  using Number = double;
  static constexpr int kCount = 2;
  static constexpr int kBytes = 8;

  static __device__ __forceinline__ void unpack(uint4 vector, Number (&numbers)[kCount]) {
    numbers[0] = __hiloint2double(static_cast<int>(vector.y), static_cast<int>(vector.x));
    numbers[1] = __hiloint2double(static_cast<int>(vector.w), static_cast<int>(vector.z));
  }

  static __device__ __forceinline__ uint4 pack(const Number (&numbers)[kCount]) {
    return make_uint4(static_cast<uint32_t>(__double2loint(numbers[0])),
                      static_cast<uint32_t>(__double2hiint(numbers[0])),
                      static_cast<uint32_t>(__double2loint(numbers[1])),
                      static_cast<uint32_t>(__double2hiint(numbers[1])));
  }

  static __device__ __forceinline__ Number get(const void* data, int64_t i) {
    return static_cast<const double*>(data)[i];
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Number number) {
    static_cast<double*>(data)[i] = number;
  }
};

// What both 16-bit formats share; Pairs says how two of them lie in a word.
template <class Pairs>
struct SixteenBitElements {
  using Number = float;
  static constexpr int kCount = 8;
  static constexpr int kBytes = 2;

  static __device__ __forceinline__ void unpack(uint4 vector, Number (&numbers)[kCount]) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = Pairs::unpack(words[k]);
      numbers[2 * k] = pair.x;
      numbers[2 * k + 1] = pair.y;
    }
  }

  static __device__ __forceinline__ uint4 pack(const Number (&numbers)[kCount]) {
    return make_uint4(Pairs::pack(numbers[0], numbers[1]), Pairs::pack(numbers[2], numbers[3]),
                      Pairs::pack(numbers[4], numbers[5]), Pairs::pack(numbers[6], numbers[7]));
  }

  static __device__ __forceinline__ Number get(const void* data, int64_t i) {
    return Pairs::unpack(static_cast<const uint16_t*>(data)[i]).x;
  }

  static __device__ __forceinline__ void put(void* data, int64_t i, Number number) {
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(Pairs::pack(number, 0.0f));
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

__device__ __forceinline__ uint64_t bits_of(double number) {
  return static_cast<uint64_t>(__double_as_longlong(number));
}

__device__ __forceinline__ double double_of(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

}  // namespace gradclip::cuda
