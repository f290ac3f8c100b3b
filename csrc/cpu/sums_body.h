// Power sums and largest magnitudes of a run. Part of kernels_body.h, and like it compiled once per
// instruction set: no include guard.
//
// Sums are taken in float64 throughout (Precision::kFloat64), or, where the result is rounded to
// float32 or less anyway, in short chains of float32 that are added up in float64.

#include "cpu/streams_body.h"
#include "cpu/vectors_body.h"

// Additions in a chain before it goes into a compensated sum. Rounding errors of equal values have
// the same sign, so the chain has to be short.
constexpr int64_t kChain = 8;

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

// Magnitudes compare as integers: NaN > inf > finite, so NaN needs no test.
template <class Element>
double largest_magnitude(const Element* values, int64_t count) {
  Ints even = {};
  Ints odd = {};
  const auto compare_two = [&](int64_t at) {
    const TwoFloats two = load_two(values + at);
    const Ints first = magnitude_bits(two.first);
    const Ints second = magnitude_bits(two.second);
    even = first > even ? first : even;
    odd = second > odd ? second : odd;
  };
  int64_t i = for_chunks<2 * kFloats>(values, count, compare_two);
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) compare_two(i);
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
  const auto compare_two = [&](int64_t at) {
    const Longs first = magnitude_bits(load(values + at));
    const Longs second = magnitude_bits(load(values + at + kDoubles));
    even = first > even ? first : even;
    odd = second > odd ? second : odd;
  };
  int64_t i = for_chunks<2 * kDoubles>(values, count, compare_two);
  for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) compare_two(i);
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

// A sum and its rounding error (Knuth's TwoSum): together they grow by exactly `value`.
template <class Value>
GRADCLIP_INLINE void add_compensated(Value* sum, Value* compensation, Value value) {
  const Value total = *sum + value;
  const Value added = total - *sum;
  *compensation += (*sum - (total - added)) + (value - added);
  *sum = total;
}

// All in float64, where nothing overflows or underflows that was finite in float32 or 16 bits.
template <Norm kNorm, class Element>
double exact_sum(const Element* values, int64_t count) {
  // Independent sums hide the latency of additions; as many as the registers allow.
  constexpr int64_t kStreams = kVectorBytes == 16 ? 2 : 4;
  const Streams<kStreams, kChain * kFloats> streams(count, sizeof(Element));
  Doubles sums[kStreams] = {};
  Doubles compensations[kStreams] = {};
  for (int64_t block = 0; block < streams.blocks; ++block) {
    const Element* start = values + block * streams.advance;
    Doubles first[kStreams] = {};
    Doubles second[kStreams] = {};
#pragma GCC unroll 8
    for (int64_t step = 0; step < kChain; ++step) {
#pragma GCC unroll 4
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        const TwoDoubles widened = load_widened(start + stream * streams.stride + step * kFloats);
        first[stream] += map<kNorm>(widened.first);
        second[stream] += map<kNorm>(widened.second);
      }
    }
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      add_compensated(&sums[stream], &compensations[stream], first[stream] + second[stream]);
    }
  }
  int64_t i = streams.covered();
  for (int64_t stream = 1; stream < kStreams && i > 0; ++stream) {
    add_compensated(&sums[0], &compensations[0], sums[stream]);
    compensations[0] += compensations[stream];
  }
  const auto add_vector = [&](const Element* vector) {
    const TwoDoubles widened = load_widened(vector);
    add_compensated(&sums[0], &compensations[0],
                    map<kNorm>(widened.first) + map<kNorm>(widened.second));
  };
  for (; i + kFloats <= count; i += kFloats) add_vector(values + i);
  if (i < count) {
    Element rest[kFloats] = {};
    for (int64_t k = 0; i + k < count; ++k) rest[k] = values[i + k];
    add_vector(rest);
  }
  double lanes[kDoubles];
  double lost[kDoubles];
  store(sums[0], lanes);
  store(compensations[0], lost);
  for (int64_t half = kDoubles / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      add_compensated(&lanes[lane], &lost[lane], lanes[lane + half]);
      lost[lane] += lost[lane + half];
    }
  }
  // If the sum is not finite, the compensation is inf - inf and meaningless.
  return std::isfinite(lanes[0]) ? lanes[0] + lost[0] : lanes[0];
}

// Short chains of float32. For data in cache that is several times as fast as exact_sum. Between an
// element and the float64 sum there are at most kFloatChain - 1 roundings of the chain, 3 of
// folding its 8 sums, and for L2 one of the square (in the float64 tail none): the relative error
// of the sum is below 6 x 2^-24 (L1) or 7 x 2^-24 (L2), on random values about 1e-8. See Precision
// for what that makes of the norm. The result is wrong if squares leave the range of float32, which
// the caller checks.
constexpr int64_t kFloatChain = 4;

// The sums of one block, lane by lane.
template <Norm kNorm, int64_t kStreams, int64_t kSteps, class Element>
GRADCLIP_INLINE Floats chain_sum(const Element* values, int64_t stride) {
  Floats sums[2 * kStreams];
#pragma GCC unroll 4
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    const TwoFloats two = load_two(values + stream * stride);
    sums[2 * stream] = map<kNorm>(two.first);
    sums[2 * stream + 1] = map<kNorm>(two.second);
  }
#pragma GCC unroll 4
  for (int64_t step = 1; step < kSteps; ++step) {
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const TwoFloats two = load_two(values + stream * stride + step * 2 * kFloats);
      sums[2 * stream] += map<kNorm>(two.first);
      sums[2 * stream + 1] += map<kNorm>(two.second);
    }
  }
  // Pairwise by halves: adding equal values only doubles them, which is exact.
#pragma GCC unroll 4
  for (int64_t half = kStreams; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <Norm kNorm, class Element>
double float_sum(const Element* values, int64_t count) {
  constexpr int64_t kStreams = 4;
  constexpr int64_t kTwo = 2 * kFloats;
  const Streams<kStreams, kFloatChain * kTwo> streams(count, sizeof(Element));
  Doubles first = {};
  Doubles second = {};
  const auto add = [&](const TwoDoubles& vectors) {
    first += vectors.first;
    second += vectors.second;
  };
  for (int64_t block = 0; block < streams.blocks; ++block) {
    const Element* start = values + block * streams.advance;
    add(widened(chain_sum<kNorm, kStreams, kFloatChain>(start, streams.stride)));
  }
  int64_t i = streams.covered();
  for (; i + kStreams * kTwo <= count; i += kStreams * kTwo) {
    add(widened(chain_sum<kNorm, kStreams, 1>(values + i, kTwo)));
  }
  const auto add_vector = [&](const Element* vector) {
    const TwoDoubles widened = load_widened(vector);
    add({map<kNorm>(widened.first), map<kNorm>(widened.second)});
  };
  for (; i + kFloats <= count; i += kFloats) add_vector(values + i);
  if (i < count) {
    Element rest[kFloats] = {};
    for (int64_t k = 0; i + k < count; ++k) rest[k] = values[i + k];
    add_vector(rest);
  }
  double lanes[kDoubles];
  store(first + second, lanes);
  double total = 0.0;
  for (int64_t lane = 0; lane < kDoubles; ++lane) total += lanes[lane];
  return total;
}

template <Norm kNorm>
double sum(const double* values, int64_t count, Precision) {
  return exact_sum<kNorm>(values, count);
}

template <Norm kNorm, class Element>
double sum(const Element* values, int64_t count, Precision precision) {
  if (precision == Precision::kFloat64) return exact_sum<kNorm>(values, count);
  const double total = float_sum<kNorm>(values, count);
  // Each square may lose up to 2^-126, where subnormal numbers are flushed to zero: above this
  // threshold that is less than 2^-32 of the sum.
  const double smallest = static_cast<double>(count) * 0x1p-94;
  if (total >= smallest && total <= std::numeric_limits<double>::max()) return total;
  return largest_magnitude(values, count) == 0.0 ? 0.0 : exact_sum<kNorm>(values, count);
}

template <class Element>
double power_sum_of(Norm kind, Precision precision, const Element* values, int64_t count) {
  switch (kind) {
    case Norm::kL1:
      return sum<Norm::kL1>(values, count, precision);
    case Norm::kL2:
      return sum<Norm::kL2>(values, count, precision);
    case Norm::kInf:
      return largest_magnitude(values, count);
  }
  return 0.0;
}
