// The generic body of the CPU kernels. A file that includes it first defines kVectorBytes, the
// width of the machine's registers, and selects the instruction set; then it includes this inside a
// namespace of its own. It has no include guard: one program holds it once per instruction set.
//
// Vectors are the compiler's own (gcc's and clang's vector_size), so the same lines become SSE2,
// NEON, AVX2 or AVX-512. They are spelled out, and not left to the auto-vectorizer, because that
// keeps its hands off sums, whose order it may not change.
//
// Every value is widened to float64 before it is squared or added: nothing overflows or vanishes
// there that was finite in float32 or 16 bits, and memory, not arithmetic, is what takes the time.

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
// As many as a vector has float64 (FewFloats, FewWords) or float32 (Halves).
typedef float FewFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FewWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// The same in memory, where gradients lie at any multiple of their element size. Always to be
// named: `auto` and template parameters drop the alignment and assume that of a whole vector.
typedef float StoredFloats __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef float StoredFewFloats __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
typedef double StoredDoubles __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef uint32_t StoredWords __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint32_t StoredFewWords
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint16_t StoredHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

constexpr int64_t kFloats = kVectorBytes / 4;
constexpr int64_t kDoubles = kVectorBytes / 8;

// Additions in a row before the sum goes into a compensated one. Rounding errors of equal values
// all point the same way, so the row has to be short.
constexpr int64_t kChain = 8;

// A coefficient this small would lose bits, or vanish, in float32.
constexpr double kSmallestFloatCoefficient = 0x1p-100;

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

// See float16.h for the scalar originals of the conversions.
#if GRADCLIP_F16C_BITS == 256
GRADCLIP_INLINE Floats load(const Float16* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

GRADCLIP_INLINE void store(Floats vector, Float16* values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values),
                   _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}
#elif GRADCLIP_F16C_BITS == 512
// gcc warns of its own header where the unmasked forms leave lanes undefined.
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

GRADCLIP_INLINE double widen(double value) { return value; }
GRADCLIP_INLINE float widen(float value) { return value; }
GRADCLIP_INLINE void narrow(float value, float* result) { *result = value; }

// Two vectors of numbers that lie side by side, in an order that the format makes cheap.
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

// The rounded number in the upper half of each word; what is left in the lower half means nothing.
GRADCLIP_INLINE Words rounded_to_bfloat16(Floats vector) {
  const Words bits = reinterpret_cast<Words>(vector);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Ints magnitude = reinterpret_cast<Ints>(bits & 0x7fffffffu);
  return magnitude > 0x7f800000 ? Words{} + 0x7fc00000u : rounded;
}

GRADCLIP_INLINE void store_two(const TwoFloats& vectors, BFloat16* values) {
  *reinterpret_cast<StoredWords*>(values) = (rounded_to_bfloat16(vectors.first) >> 16) |
                                            (rounded_to_bfloat16(vectors.second) & kUpperHalf);
}

// As many numbers as a vector has float32, in float64.
struct TwoDoubles {
  Doubles first;
  Doubles second;
};

// Two short loads, where one long load would need a shuffle to be taken apart.
GRADCLIP_INLINE TwoDoubles load_widened(const float* values) {
  const StoredFewFloats* few = reinterpret_cast<const StoredFewFloats*>(values);
  return {__builtin_convertvector(few[0], Doubles), __builtin_convertvector(few[1], Doubles)};
}

GRADCLIP_INLINE TwoDoubles load_widened(const double* values) {
  return {load(values), load(values + kDoubles)};
}

GRADCLIP_INLINE TwoDoubles load_widened(const BFloat16* values) {
  const FewWords words = *reinterpret_cast<const StoredFewWords*>(values);
  const FewFloats even = reinterpret_cast<FewFloats>(words << 16);
  const FewFloats odd = reinterpret_cast<FewFloats>(words & kUpperHalf);
  return {__builtin_convertvector(even, Doubles), __builtin_convertvector(odd, Doubles)};
}

GRADCLIP_INLINE TwoDoubles load_widened(const Float16* values) {
  const Floats floats = load(values);
  FewFloats few[2];
  std::memcpy(few, &floats, sizeof few);
  return {__builtin_convertvector(few[0], Doubles), __builtin_convertvector(few[1], Doubles)};
}

GRADCLIP_INLINE Ints magnitude_bits(Floats vector) {
  return reinterpret_cast<Ints>(vector) & std::numeric_limits<int32_t>::max();
}

GRADCLIP_INLINE Longs magnitude_bits(Doubles vector) {
  return reinterpret_cast<Longs>(vector) & std::numeric_limits<int64_t>::max();
}

template <Norm kNorm, class Vector>
GRADCLIP_INLINE Vector map(Vector vector) {
  if constexpr (kNorm == Norm::kL2) {
    return vector * vector;
  } else {
    return reinterpret_cast<Vector>(magnitude_bits(vector));
  }
}

template <Norm kNorm>
GRADCLIP_INLINE double map_one(double value) {
  return kNorm == Norm::kL2 ? value * value : std::fabs(value);
}

// Magnitudes compare as integers: NaN > inf > finite, so nothing has to be tested for.
template <class Element>
double largest_magnitude(const Element* values, int64_t count) {
  Ints even = {};
  Ints odd = {};
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    const TwoFloats two = load_two(values + i);
    const Ints first = magnitude_bits(two.first);
    const Ints second = magnitude_bits(two.second);
    even = first > even ? first : even;
    odd = second > odd ? second : odd;
  }
  even = odd > even ? odd : even;
  int32_t largest = 0;
  for (int64_t lane = 0; lane < kFloats; ++lane) largest = std::max<int32_t>(largest, even[lane]);
  for (; i < count; ++i) {
    const uint32_t bits = bits_of(widen(values[i])) & 0x7fffffffu;
    largest = std::max(largest, static_cast<int32_t>(bits));
  }
  return float_of(static_cast<uint32_t>(largest));
}

double largest_magnitude(const double* values, int64_t count) {
  Longs even = {};
  Longs odd = {};
  int64_t i = 0;
  for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) {
    const Longs first = magnitude_bits(load(values + i));
    const Longs second = magnitude_bits(load(values + i + kDoubles));
    even = first > even ? first : even;
    odd = second > odd ? second : odd;
  }
  even = odd > even ? odd : even;
  int64_t largest = 0;
  for (int64_t lane = 0; lane < kDoubles; ++lane) largest = std::max<int64_t>(largest, even[lane]);
  for (; i < count; ++i) {
    int64_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max(largest, bits & std::numeric_limits<int64_t>::max());
  }
  double result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

// A sum and what rounding took from it (Knuth's TwoSum): together they grow by exactly `value`.
template <class Value>
GRADCLIP_INLINE void add_compensated(Value* sum, Value* compensation, Value value) {
  const Value total = *sum + value;
  const Value added = total - *sum;
  *compensation += (*sum - (total - added)) + (value - added);
  *sum = total;
}

template <Norm kNorm, class Element>
double sum(const Element* values, int64_t count) {
  // Sums side by side, so that no addition waits for the one before; as many as registers allow.
  constexpr int64_t kStreams = kVectorBytes == 16 ? 2 : 4;
  constexpr int64_t kBlock = kChain * kStreams * kFloats;
  Doubles sums[kStreams] = {};
  Doubles compensations[kStreams] = {};
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    Doubles first[kStreams] = {};
    Doubles second[kStreams] = {};
#pragma GCC unroll 8
    for (int64_t step = 0; step < kBlock; step += kStreams * kFloats) {
#pragma GCC unroll 4
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        const TwoDoubles widened = load_widened(values + i + step + stream * kFloats);
        first[stream] += map<kNorm>(widened.first);
        second[stream] += map<kNorm>(widened.second);
      }
    }
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      add_compensated(&sums[stream], &compensations[stream], first[stream] + second[stream]);
    }
  }
  for (; i + kFloats <= count; i += kFloats) {
    const TwoDoubles widened = load_widened(values + i);
    add_compensated(&sums[0], &compensations[0],
                    map<kNorm>(widened.first) + map<kNorm>(widened.second));
  }
  for (int64_t stream = 1; stream < kStreams; ++stream) {
    add_compensated(&sums[0], &compensations[0], sums[stream]);
    compensations[0] += compensations[stream];
  }
  double sum = 0.0;
  double compensation = 0.0;
  for (int64_t lane = 0; lane < kDoubles; ++lane) {
    add_compensated(&sum, &compensation, static_cast<double>(sums[0][lane]));
    compensation += compensations[0][lane];
  }
  for (; i < count; ++i) add_compensated(&sum, &compensation, map_one<kNorm>(widen(values[i])));
  // Once the sum is not finite the compensation holds inf - inf and means nothing.
  return std::isfinite(sum) ? sum + compensation : sum;
}

template <class Element>
double power_sum_of(Norm norm, const Element* values, int64_t count) {
  switch (norm) {
    case Norm::kL1:
      return sum<Norm::kL1>(values, count);
    case Norm::kL2:
      return sum<Norm::kL2>(values, count);
    case Norm::kInf:
      return largest_magnitude(values, count);
  }
  return 0.0;
}

template <class Element>
void multiply(Element* values, int64_t count, double coefficient) {
  if (std::fabs(coefficient) < kSmallestFloatCoefficient) {
    for (int64_t i = 0; i < count; ++i) {
      narrow(static_cast<float>(widen(values[i]) * coefficient), values + i);
    }
    return;
  }
  const float factor = static_cast<float>(coefficient);
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    const TwoFloats two = load_two(values + i);
    store_two({two.first * factor, two.second * factor}, values + i);
  }
  for (; i < count; ++i) narrow(widen(values[i]) * factor, values + i);
}

void multiply(double* values, int64_t count, double coefficient) {
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) store(load(values + i) * coefficient, values + i);
  for (; i < count; ++i) values[i] *= coefficient;
}

// Written so that NaN, for which no comparison holds, is kept.
template <class Value>
GRADCLIP_INLINE Value limited(Value value, Value bound) {
  value = value > bound ? bound : value;
  return value < -bound ? -bound : value;
}

template <class Element>
void limit(Element* values, int64_t count, double bound) {
  const float float_bound = static_cast<float>(bound);
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    const TwoFloats two = load_two(values + i);
    store_two(
        {limited(two.first, Floats{} + float_bound), limited(two.second, Floats{} + float_bound)},
        values + i);
  }
  for (; i < count; ++i) narrow(limited(widen(values[i]), float_bound), values + i);
}

void limit(double* values, int64_t count, double bound) {
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    store(limited(load(values + i), Doubles{} + bound), values + i);
  }
  for (; i < count; ++i) values[i] = limited(values[i], bound);
}

// Calls work with the run's data as a pointer to its element type.
template <class Work>
GRADCLIP_INLINE auto with_elements(const Span& run, const Work& work) {
  switch (run.dtype) {
    case DType::kFloat64:
      return work(static_cast<double*>(run.data));
    case DType::kFloat16:
      return work(static_cast<Float16*>(run.data));
    case DType::kBFloat16:
      return work(static_cast<BFloat16*>(run.data));
    default:
      return work(static_cast<float*>(run.data));
  }
}

double power_sum(Norm norm, const Span& run) {
  return with_elements(run,
                       [&](const auto* values) { return power_sum_of(norm, values, run.numel); });
}

void scale(const Span& run, double coefficient) {
  with_elements(run, [&](auto* values) { multiply(values, run.numel, coefficient); });
}

void clamp(const Span& run, double bound) {
  with_elements(run, [&](auto* values) { limit(values, run.numel, bound); });
}
