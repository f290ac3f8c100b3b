// Power sums and largest magnitudes of a run. Part of kernels_body.h, and like it compiled once per
// instruction set: no include guard.
//
// Sums are taken in float64 throughout (Precision::kFloat64), or, where the result is rounded to
// float32 or less anyway, in short chains of float32 that are added up in float64.
//
// Each function measures `kTiles` runs side by side: one, or kStreams full tiles. A tile's sum has
// the same bits either way, since its additions are the same and in the same order.

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
template <int64_t kTiles, class Element>
void largest_magnitudes(const Element* const* tiles, int64_t count, double* largest) {
  Ints even[kTiles] = {};
  Ints odd[kTiles] = {};
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const TwoFloats two = load_two(tiles[tile] + i);
      const Ints first = magnitude_bits(two.first);
      const Ints second = magnitude_bits(two.second);
      even[tile] = first > even[tile] ? first : even[tile];
      odd[tile] = second > odd[tile] ? second : odd[tile];
    }
  }
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    const Ints both = odd[tile] > even[tile] ? odd[tile] : even[tile];
    int32_t most = 0;
    for (int64_t lane = 0; lane < kFloats; ++lane) most = std::max<int32_t>(most, both[lane]);
    for (int64_t k = i; k < count; ++k) {
      const uint32_t bits = bits_of(widen(tiles[tile][k])) & 0x7fffffffu;
      most = std::max(most, static_cast<int32_t>(bits));
    }
    largest[tile] = float_of(static_cast<uint32_t>(most));
  }
}

template <int64_t kTiles>
void largest_magnitudes(const double* const* tiles, int64_t count, double* largest) {
  Longs even[kTiles] = {};
  Longs odd[kTiles] = {};
  int64_t i = 0;
  for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) {
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const Longs first = magnitude_bits(load(tiles[tile] + i));
      const Longs second = magnitude_bits(load(tiles[tile] + i + kDoubles));
      even[tile] = first > even[tile] ? first : even[tile];
      odd[tile] = second > odd[tile] ? second : odd[tile];
    }
  }
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    const Longs both = odd[tile] > even[tile] ? odd[tile] : even[tile];
    int64_t most = 0;
    for (int64_t lane = 0; lane < kDoubles; ++lane) most = std::max<int64_t>(most, both[lane]);
    for (int64_t k = i; k < count; ++k) {
      int64_t bits;
      std::memcpy(&bits, tiles[tile] + k, sizeof bits);
      most = std::max(most, bits & std::numeric_limits<int64_t>::max());
    }
    std::memcpy(largest + tile, &most, sizeof most);
  }
}

// A sum and its rounding error (Knuth's TwoSum): together they grow by exactly `value`.
template <class Value>
GRADCLIP_INLINE void add_compensated(Value* sum, Value* compensation, Value value) {
  const Value total = *sum + value;
  const Value added = total - *sum;
  *compensation += (*sum - (total - added)) + (value - added);
  *sum = total;
}

// Adds less than a block: what is left of a run that is no full tile.
template <class Element, class AddVector>
GRADCLIP_INLINE void add_rest(const Element* values, int64_t count, const AddVector& add_vector) {
  for (; count >= kFloats; values += kFloats, count -= kFloats) add_vector(values);
  if (count > 0) {
    Element rest[kFloats] = {};
    std::copy(values, values + count, rest);
    add_vector(rest);
  }
}

// All in float64, where nothing overflows or underflows that was finite in float32 or 16 bits.
template <Norm kNorm, int64_t kTiles, class Element>
void exact_sums(const Element* const* tiles, int64_t count, double* results) {
  constexpr int64_t kStep = kChain * kFloats;
  Doubles sums[kTiles] = {};
  Doubles compensations[kTiles] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      Doubles first = {};
      Doubles second = {};
#pragma GCC unroll 8
      for (int64_t step = 0; step < kChain; ++step) {
        const TwoDoubles widened = load_widened(tiles[tile] + i + step * kFloats);
        first += map<kNorm>(widened.first);
        second += map<kNorm>(widened.second);
      }
      add_compensated(&sums[tile], &compensations[tile], first + second);
    }
  }
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    const auto add_vector = [&](const Element* vector) {
      const TwoDoubles widened = load_widened(vector);
      add_compensated(&sums[tile], &compensations[tile],
                      map<kNorm>(widened.first) + map<kNorm>(widened.second));
    };
    if constexpr (kTiles == 1) add_rest(tiles[tile] + i, count - i, add_vector);
    double lanes[kDoubles];
    double lost[kDoubles];
    store(sums[tile], lanes);
    store(compensations[tile], lost);
    for (int64_t half = kDoubles / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) {
        add_compensated(&lanes[lane], &lost[lane], lanes[lane + half]);
        lost[lane] += lost[lane + half];
      }
    }
    // If the sum is not finite, the compensation is inf - inf and meaningless.
    results[tile] = std::isfinite(lanes[0]) ? lanes[0] + lost[0] : lanes[0];
  }
}

// Short chains of float32. For data in cache that is several times as fast as exact_sums. Between
// an element and the float64 sum there are at most kFloatChain - 1 roundings of the chain, 3 of
// folding 8 chains, and for L2 one of the square (in the float64 tail none): the relative error of
// the sum is below 6 x 2^-24 (L1) or 7 x 2^-24 (L2), on random values about 1e-8. See Precision for
// what that makes of the norm. The result is wrong if squares leave the range of float32, which the
// caller checks.
constexpr int64_t kFloatChain = 4;

// Two chains side by side for each tile, folded. Streams take turns after every two vectors, which
// keeps the most loads on their way.
template <Norm kNorm, int64_t kTiles, class Element>
GRADCLIP_INLINE void chain_sums(const Element* const* tiles, int64_t offset, Floats* folded) {
  Floats first[kTiles];
  Floats second[kTiles];
#pragma GCC unroll 4
  for (int64_t step = 0; step < kFloatChain; ++step) {
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const TwoFloats two = load_two(tiles[tile] + offset + step * 2 * kFloats);
      if (step == 0) {
        first[tile] = map<kNorm>(two.first);
        second[tile] = map<kNorm>(two.second);
      } else {
        first[tile] += map<kNorm>(two.first);
        second[tile] += map<kNorm>(two.second);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t tile = 0; tile < kTiles; ++tile) folded[tile] = first[tile] + second[tile];
}

template <Norm kNorm, int64_t kTiles, class Element>
void float_sums(const Element* const* tiles, int64_t count, double* results) {
  constexpr int64_t kPiece = kFloatChain * 2 * kFloats;
  constexpr int64_t kPieces = 4;
  Doubles first[kTiles] = {};
  Doubles second[kTiles] = {};
  int64_t i = 0;
  for (; i + kPieces * kPiece <= count; i += kPieces * kPiece) {
    // Pairwise: adding equal values only doubles them, which is exact.
    Floats sums[kTiles];
    Floats early[kTiles];
    Floats late[kTiles];
    chain_sums<kNorm, kTiles>(tiles, i, early);
    chain_sums<kNorm, kTiles>(tiles, i + kPiece, sums);
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) early[tile] += sums[tile];
    chain_sums<kNorm, kTiles>(tiles, i + 2 * kPiece, late);
    chain_sums<kNorm, kTiles>(tiles, i + 3 * kPiece, sums);
#pragma GCC unroll 4
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const TwoDoubles all = widened(early[tile] + (late[tile] + sums[tile]));
      first[tile] += all.first;
      second[tile] += all.second;
    }
  }
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    const auto add_vector = [&](const Element* vector) {
      const TwoDoubles widened = load_widened(vector);
      first[tile] += map<kNorm>(widened.first);
      second[tile] += map<kNorm>(widened.second);
    };
    if constexpr (kTiles == 1) {
      for (; i + kPiece <= count; i += kPiece) {
        Floats folded;
        chain_sums<kNorm, 1>(tiles, i, &folded);
        const TwoDoubles both = widened(folded);
        first[tile] += both.first;
        second[tile] += both.second;
      }
      add_rest(tiles[tile] + i, count - i, add_vector);
    }
    double lanes[kDoubles];
    store(first[tile] + second[tile], lanes);
    results[tile] = 0.0;
    for (int64_t lane = 0; lane < kDoubles; ++lane) results[tile] += lanes[lane];
  }
}

template <Norm kNorm, int64_t kTiles>
void sums(const double* const* tiles, int64_t count, Precision, double* results) {
  exact_sums<kNorm, kTiles>(tiles, count, results);
}

template <Norm kNorm, int64_t kTiles, class Element>
void sums(const Element* const* tiles, int64_t count, Precision precision, double* results) {
  if (precision == Precision::kFloat64) return exact_sums<kNorm, kTiles>(tiles, count, results);
  float_sums<kNorm, kTiles>(tiles, count, results);
  // Each square may lose up to 2^-126, where subnormal numbers are flushed to zero: above this
  // threshold that is less than 2^-32 of the sum.
  const double smallest = static_cast<double>(count) * 0x1p-94;
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    double& result = results[tile];
    if (result >= smallest && result <= std::numeric_limits<double>::max()) continue;
    largest_magnitudes<1>(tiles + tile, count, &result);
    if (result != 0.0) exact_sums<kNorm, 1>(tiles + tile, count, &result);
  }
}

template <int64_t kTiles, class Element>
void power_sums_of(Norm kind, Precision precision, const Element* const* tiles, int64_t count,
                   double* results) {
  switch (kind) {
    case Norm::kL1:
      return sums<Norm::kL1, kTiles>(tiles, count, precision, results);
    case Norm::kL2:
      return sums<Norm::kL2, kTiles>(tiles, count, precision, results);
    case Norm::kInf:
      return largest_magnitudes<kTiles>(tiles, count, results);
  }
}
