// Vectors as wide as the machine's registers, and how numbers of every dtype are loaded into them,
// widened, narrowed and stored. Part of kernels_body.h, and like it compiled once per instruction
// set: no include guard.

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
// As many as a vector has float64 (FewFloats, FewWords) or float32 (Halves).
typedef float FewFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FewWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// The same in memory, where gradients are aligned to their element size only. Always spell the type
// out: `auto` and template parameters drop the attribute and assume the alignment of a vector.
typedef float StoredFloats __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef float StoredFewFloats __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
typedef double StoredDoubles __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef uint32_t StoredWords __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint32_t StoredFewWords
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef int16_t StoredShorts __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint16_t StoredHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

constexpr int64_t kFloats = kVectorBytes / 4;
constexpr int64_t kDoubles = kVectorBytes / 8;

GRADCLIP_INLINE Doubles load(const double* values) {
  return *reinterpret_cast<const StoredDoubles*>(values);
}

GRADCLIP_INLINE Floats load(const float* values) {
  return *reinterpret_cast<const StoredFloats*>(values);
}

GRADCLIP_INLINE void store(Floats vector, float* values) {
  *reinterpret_cast<StoredFloats*>(values) = vector;
}

GRADCLIP_INLINE void store(Doubles vector, double* values) {
  *reinterpret_cast<StoredDoubles*>(values) = vector;
}

// gcc would build the wider conversions from pairs, at half the speed.
#if GRADCLIP_X86_BITS == 256
GRADCLIP_INLINE Doubles widen_few(FewFloats few) { return _mm256_cvtps_pd(few); }
#elif GRADCLIP_X86_BITS == 512
// The unmasked form leaves lanes undefined, about which gcc warns in its own header.
GRADCLIP_INLINE Doubles widen_few(FewFloats few) { return _mm512_maskz_cvtps_pd(0xff, few); }
#else
GRADCLIP_INLINE Doubles widen_few(FewFloats few) { return __builtin_convertvector(few, Doubles); }
#endif

// See float16.h for the scalar originals of the conversions.
#if GRADCLIP_X86_BITS == 256
GRADCLIP_INLINE Floats load(const Float16* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

GRADCLIP_INLINE void store(Floats vector, Float16* values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values),
                   _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}
#elif GRADCLIP_X86_BITS == 512
// The unmasked forms leave lanes undefined, about which gcc warns in its own header.
constexpr __mmask16 kAllLanes = 0xffff;

GRADCLIP_INLINE Floats load(const Float16* values) {
  return _mm512_maskz_cvtph_ps(kAllLanes,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

GRADCLIP_INLINE void store(Floats vector, Float16* values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values),
                      _mm512_maskz_cvtps_ph(kAllLanes, vector, _MM_FROUND_TO_NEAREST_INT));
}
#else
GRADCLIP_INLINE Floats load(const Float16* values) {
  const Halves halves = *reinterpret_cast<const StoredHalves*>(values);
  const Words bits = __builtin_convertvector(halves, Words);
  const Words sign = (bits & 0x8000u) << 16;
  const Words magnitude = bits & 0x7fffu;
  const Ints number = reinterpret_cast<Ints>(magnitude);
  const Words subnormal =
      reinterpret_cast<Words>(__builtin_convertvector(number, Floats) * 0x1p-24f);
  const Words normal = (magnitude << 13) + ((127u - 15u) << 23);
  const Words inf_or_nan = (magnitude << 13) | 0x7f800000u;
  return reinterpret_cast<Floats>(
      sign | (number < 0x0400 ? subnormal : (number >= 0x7c00 ? inf_or_nan : normal)));
}

GRADCLIP_INLINE void store(Floats vector, Float16* values) {
  const Words bits = reinterpret_cast<Words>(vector);
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  const Ints number = reinterpret_cast<Ints>(magnitude);
  const Words subnormal =
      reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t rebias = static_cast<uint32_t>(15 - 127) << 23;
  const Words normal = (magnitude + (rebias + 0x0fffu) + ((magnitude >> 13) & 1u)) >> 13;
  const Words inf_or_nan = number > 0x7f800000 ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words rounded = number < 0x38800000 ? subnormal : number < 0x477ff000 ? normal : inf_or_nan;
  *reinterpret_cast<StoredHalves*>(values) = __builtin_convertvector(sign | rounded, Halves);
}
#endif

GRADCLIP_INLINE float widen(float value) { return value; }
GRADCLIP_INLINE void narrow(float value, float* result) { *result = value; }

// Two vectors of adjacent elements, in whatever order is cheap for the format.
struct TwoFloats {
  Floats first;
  Floats second;
};

template <class Element>
GRADCLIP_INLINE TwoFloats load_two(const Element* values) {
  return {load(values), load(values + kFloats)};
}

template <class Element>
GRADCLIP_INLINE void store_two(const TwoFloats& vectors, Element* values) {
  store(vectors.first, values);
  store(vectors.second, values + kFloats);
}

// A word holds two bfloat16, each of them the upper half of a float32: no shuffle is needed to make
// one vector of the even and one of the odd numbers.
constexpr uint32_t kUpperHalf = 0xffff0000u;

GRADCLIP_INLINE TwoFloats load_two(const BFloat16* values) {
  const Words words = *reinterpret_cast<const StoredWords*>(values);
  return {reinterpret_cast<Floats>(words << 16), reinterpret_cast<Floats>(words & kUpperHalf)};
}

// The rounded value in the upper half of each word; the lower half is meaningless. A NaN stays NaN
// if its lower half is 0, as it is for a bfloat16 and for the processor's default NaN.
#if GRADCLIP_X86_BITS == 512
// Here arithmetic is the limit, not memory: a test and an addition under its mask are two
// operations less than to shift the last bit into place, to cut it out and to add it.
GRADCLIP_INLINE Words rounded_to_bfloat16(Floats vector) {
  const __m512i bits = reinterpret_cast<__m512i>(vector);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i to_even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return reinterpret_cast<Words>(
      _mm512_mask_add_epi32(to_even, odd, bits, _mm512_set1_epi32(0x8000)));
}
#else
GRADCLIP_INLINE Words rounded_to_bfloat16(Floats vector) {
  const Words bits = reinterpret_cast<Words>(vector);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
#endif

GRADCLIP_INLINE void store_two(const TwoFloats& vectors, BFloat16* values) {
  *reinterpret_cast<StoredWords*>(values) = (rounded_to_bfloat16(vectors.first) >> 16) |
                                            (rounded_to_bfloat16(vectors.second) & kUpperHalf);
}

// As many numbers as a vector has float32, in float64.
struct TwoDoubles {
  Doubles first;
  Doubles second;
};

GRADCLIP_INLINE TwoDoubles widened(Floats floats) {
  FewFloats few[2];
  std::memcpy(few, &floats, sizeof few);
  return {widen_few(few[0]), widen_few(few[1])};
}

// Two short loads: splitting one long load would take a shuffle.
GRADCLIP_INLINE TwoDoubles load_widened(const float* values) {
  const StoredFewFloats* few = reinterpret_cast<const StoredFewFloats*>(values);
  return {widen_few(few[0]), widen_few(few[1])};
}

GRADCLIP_INLINE TwoDoubles load_widened(const double* values) {
  return {load(values), load(values + kDoubles)};
}

GRADCLIP_INLINE TwoDoubles load_widened(const BFloat16* values) {
  const FewWords words = *reinterpret_cast<const StoredFewWords*>(values);
  const FewFloats even = reinterpret_cast<FewFloats>(words << 16);
  const FewFloats odd = reinterpret_cast<FewFloats>(words & kUpperHalf);
  return {widen_few(even), widen_few(odd)};
}

GRADCLIP_INLINE TwoDoubles load_widened(const Float16* values) { return widened(load(values)); }
