// float16 and bfloat16 to float32 and back, one number at a time.
// Rounds to nearest, ties to even; keeps subnormals, infinities and NaN, also while the processor
// flushes float32 subnormals to zero (torch.set_flush_denormal).
#pragma once

#include <cstdint>
#include <cstring>

namespace gradclip::cpu {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

#define GRADCLIP_INLINE inline __attribute__((always_inline))

GRADCLIP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

GRADCLIP_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GRADCLIP_INLINE float widen(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

GRADCLIP_INLINE float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
  const uint32_t inf_or_nan = (magnitude << 13) | 0x7f800000u;
  return float_of(sign | (magnitude < 0x0400u   ? subnormal
                          : magnitude < 0x7c00u ? normal
                                                : inf_or_nan));
}

GRADCLIP_INLINE void narrow(float value, BFloat16* result) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

GRADCLIP_INLINE void narrow(float value, Float16* result) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 lines the float's last bits up with the subnormal's, and rounds on the way.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t rebias = static_cast<uint32_t>(15 - 127) << 23;
  const uint32_t normal = (magnitude + rebias + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t inf_or_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t smallest_normal = bits_of(0x1p-14f);
  const uint32_t first_that_rounds_to_inf = bits_of(65520.0f);
  const uint32_t rounded = magnitude < smallest_normal            ? subnormal
                           : magnitude < first_that_rounds_to_inf ? normal
                                                                  : inf_or_nan;
  result->bits = static_cast<uint16_t>(sign | rounded);
}

}  // namespace gradclip::cpu
