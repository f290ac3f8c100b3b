// The generic body of the CPU kernels. A file that includes it first defines kVectorBytes, the
// width of the machine's registers, and selects the instruction set; then it includes this inside a
// namespace of its own. It has no include guard: one program holds it once per instruction set.
//
// Vectors are the compiler's own (gcc's and clang's vector_size), so the same lines become SSE2,
// NEON, AVX2 or AVX-512. They are written out, rather than left to the auto-vectorizer, because it
// may not reorder floating-point sums.

#include "cpu/sums_body.h"

// Elements in two vectors' worth of numbers, which loops handle at once.
template <class Element>
constexpr int64_t kTwoVectors = 2 * kFloats;
template <>
constexpr int64_t kTwoVectors<double> = 2 * kDoubles;

// Calls work(stream, values) for kChunk elements after another of kStreams runs side by side, which
// take turns. A load that follows a store to the same offset in another page waits for it, so the
// streams are kept a fraction of a page apart: each starts that far into its run, and its beginning
// comes last.
template <int64_t kChunk, class Element, class Work>
GRADCLIP_INLINE void for_streams(Element* const* runs, int64_t count, const Work& work) {
  constexpr uintptr_t kPage = 4096;
  constexpr uintptr_t kTurnBytes = 512;
  constexpr int64_t kTurn = kTurnBytes / sizeof(Element);
  int64_t places[kStreams];
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    const uintptr_t apart =
        reinterpret_cast<uintptr_t>(runs[stream]) - reinterpret_cast<uintptr_t>(runs[0]);
    const uintptr_t skew = (static_cast<uintptr_t>(stream) * (kPage / kStreams) - apart) % kPage;
    places[stream] = static_cast<int64_t>(skew / kTurnBytes) * kTurn;
  }
  for (int64_t done = 0; done < count; done += kTurn) {
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      Element* values = runs[stream] + places[stream];
#pragma GCC unroll 8
      for (int64_t at = 0; at < kTurn; at += kChunk) work(stream, values + at);
      places[stream] += kTurn;
      if (places[stream] == count) places[stream] = 0;
    }
  }
}

// A coefficient in the form that elements are multiplied by.
template <class Element>
GRADCLIP_INLINE float factor_of(double coefficient, const Element*) {
  // A caller's NaN payload may have bits in the half that bfloat16 cuts off.
  return std::isnan(coefficient) ? std::numeric_limits<float>::quiet_NaN()
                                 : static_cast<float>(coefficient);
}

GRADCLIP_INLINE double factor_of(double coefficient, const double*) { return coefficient; }

template <class Element>
GRADCLIP_INLINE void scale_two(Element* values, float factor) {
  const TwoFloats two = load_two(values);
  store_two({two.first * factor, two.second * factor}, values);
}

GRADCLIP_INLINE void scale_two(double* values, double factor) {
  store(load(values) * factor, values);
  store(load(values + kDoubles) * factor, values + kDoubles);
}

template <class Element>
GRADCLIP_INLINE void scale_one(Element* value, float factor) {
  narrow(widen(*value) * factor, value);
}

GRADCLIP_INLINE void scale_one(double* value, double factor) { *value *= factor; }

// Whether elements have to be multiplied in float64, though they are narrower.
template <class Element>
bool leaves_float32(double coefficient) {
  return !std::is_same_v<Element, double> && std::fabs(coefficient) < kSmallestFloat32Coefficient;
}

template <class Element>
void scale_values(Element* values, int64_t count, double coefficient) {
  if constexpr (!std::is_same_v<Element, double>) {
    if (leaves_float32<Element>(coefficient)) {
      for (int64_t i = 0; i < count; ++i) {
        narrow(static_cast<float>(widen(values[i]) * coefficient), values + i);
      }
      return;
    }
  }
  const auto factor = factor_of(coefficient, values);
  constexpr int64_t kTwo = kTwoVectors<Element>;
  int64_t i = 0;
  for (; i + kTwo <= count; i += kTwo) scale_two(values + i, factor);
  for (; i < count; ++i) scale_one(values + i, factor);
}

template <class Element>
void scale_values_of_streams(Element* const* values, int64_t count, const double* coefficients) {
  decltype(factor_of(0.0, *values)) factors[kStreams];
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    if (leaves_float32<Element>(coefficients[stream])) {
      for (int64_t one = 0; one < kStreams; ++one)
        scale_values(values[one], count, coefficients[one]);
      return;
    }
    factors[stream] = factor_of(coefficients[stream], *values);
  }
  for_streams<kTwoVectors<Element>>(
      values, count, [&](int64_t stream, Element* two) { scale_two(two, factors[stream]); });
}

template <class Element>
GRADCLIP_INLINE void add_scaled_two(Element* values, const Element* others, float factor) {
  const TwoFloats two = load_two(values);
  const TwoFloats other = load_two(others);
  store_two({two.first + other.first * factor, two.second + other.second * factor}, values);
}

GRADCLIP_INLINE void add_scaled_two(double* values, const double* others, double factor) {
  store(load(values) + load(others) * factor, values);
  store(load(values + kDoubles) + load(others + kDoubles) * factor, values + kDoubles);
}

template <class Element>
GRADCLIP_INLINE void add_scaled_one(Element* value, Element other, float factor) {
  narrow(widen(*value) + widen(other) * factor, value);
}

GRADCLIP_INLINE void add_scaled_one(double* value, double other, double factor) {
  *value += other * factor;
}

template <class Element>
void add_scaled_values(Element* values, const Element* others, int64_t count, double factor) {
  const auto own_factor = factor_of(factor, values);
  constexpr int64_t kTwo = kTwoVectors<Element>;
  int64_t i = 0;
  for (; i + kTwo <= count; i += kTwo) add_scaled_two(values + i, others + i, own_factor);
  for (; i < count; ++i) add_scaled_one(values + i, others[i], own_factor);
}

// A bound in the form that elements are compared with. Keeps NaN, since comparisons with it are
// false.
GRADCLIP_INLINE float bound_of(double bound, const float*) { return static_cast<float>(bound); }
GRADCLIP_INLINE double bound_of(double bound, const double*) { return bound; }

template <class Value>
GRADCLIP_INLINE Value clamped(Value value, Value bound) {
  value = value > bound ? bound : value;
  return value < -bound ? -bound : value;
}

GRADCLIP_INLINE void clamp_two(float* values, float bound) {
  const TwoFloats two = load_two(values);
  store_two({clamped(two.first, Floats{} + bound), clamped(two.second, Floats{} + bound)}, values);
}

GRADCLIP_INLINE void clamp_two(double* values, double bound) {
  store(clamped(load(values), Doubles{} + bound), values);
  store(clamped(load(values + kDoubles), Doubles{} + bound), values + kDoubles);
}

template <class Value>
GRADCLIP_INLINE void clamp_one(Value* value, Value bound) {
  *value = clamped(*value, bound);
}

// In 16 bits an element stays as it is or becomes the rounded bound, so nothing is widened:
// magnitudes compare as integers, and those above infinity are NaN.
struct Bound16 {
  int16_t rounded;
  int16_t infinity;
};

template <class Element>
Bound16 bound_of(double bound, const Element*) {
  Element rounded;
  Element infinity;
  narrow(static_cast<float>(bound), &rounded);
  narrow(std::numeric_limits<float>::infinity(), &infinity);
  return {static_cast<int16_t>(rounded.bits), static_cast<int16_t>(infinity.bits)};
}

GRADCLIP_INLINE Shorts clamped_bits(Shorts bits, const Bound16& bound) {
  const Shorts magnitude = bits & std::numeric_limits<int16_t>::max();
  const Shorts exceeds = (magnitude > bound.rounded) & (magnitude <= bound.infinity);
  // A magnitude becomes the bound where the mask is set; the sign stays.
  return bits ^ ((magnitude ^ bound.rounded) & exceeds);
}

template <class Element>
GRADCLIP_INLINE void clamp_two(Element* values, const Bound16& bound) {
  StoredShorts* stored = reinterpret_cast<StoredShorts*>(values);
  *stored = clamped_bits(*stored, bound);
}

template <class Element>
GRADCLIP_INLINE void clamp_one(Element* value, const Bound16& bound) {
  const int16_t magnitude = static_cast<int16_t>(value->bits & 0x7fff);
  if (magnitude <= bound.rounded || magnitude > bound.infinity) return;
  value->bits = static_cast<uint16_t>((value->bits & 0x8000) | bound.rounded);
}

template <class Element>
void clamp_values(Element* values, int64_t count, double bound) {
  constexpr int64_t kTwo = kTwoVectors<Element>;
  const auto own_bound = bound_of(bound, values);
  int64_t i = 0;
  for (; i + kTwo <= count; i += kTwo) clamp_two(values + i, own_bound);
  for (; i < count; ++i) clamp_one(values + i, own_bound);
}

template <class Element>
void clamp_values_of_streams(Element* const* values, int64_t count, double bound) {
  const auto own_bound = bound_of(bound, *values);
  for_streams<kTwoVectors<Element>>(values, count,
                                    [&](int64_t, Element* two) { clamp_two(two, own_bound); });
}

// Calls work with the data of a run as a pointer to its element type.
template <class Work>
GRADCLIP_INLINE void with_elements(const Span& run, const Work& work) {
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

// The same with the data of kStreams runs.
template <class Work>
GRADCLIP_INLINE void with_streams(const Span* runs, const Work& work) {
  with_elements(runs[0], [&](auto* first) {
    decltype(first) values[kStreams];
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      values[stream] = static_cast<decltype(first)>(runs[stream].data);
    }
    work(values);
  });
}

void power_sums(Norm kind, Precision precision, const Span& run, double* sums) {
  const int64_t tile = tile_elements(run.dtype);
  with_elements(run, [&](const auto* values) {
    for (int64_t begin = 0; begin < run.numel; begin += tile, values += tile) {
      power_sums_of<1>(kind, precision, &values, std::min(tile, run.numel - begin), sums++);
    }
  });
}

void power_sums_of_streams(Norm kind, Precision precision, const Span* runs, double* const* sums) {
  const int64_t tile = tile_elements(runs[0].dtype);
  with_streams(runs, [&](auto* const* values) {
    const std::remove_pointer_t<std::remove_const_t<std::remove_pointer_t<decltype(values)>>>*
        tiles[kStreams] = {values[0], values[1], values[2], values[3]};
    for (int64_t k = 0; k < runs[0].numel / tile; ++k) {
      double results[kStreams];
      power_sums_of<kStreams>(kind, precision, tiles, tile, results);
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        sums[stream][k] = results[stream];
        tiles[stream] += tile;
      }
    }
  });
}

void scale(const Span& run, double coefficient) {
  with_elements(run, [&](auto* values) { scale_values(values, run.numel, coefficient); });
}

void scale_streams(const Span* runs, const double* coefficients) {
  with_streams(runs, [&](auto* const* values) {
    scale_values_of_streams(values, runs[0].numel, coefficients);
  });
}

void add_scaled(const Span& run, const void* others, double factor) {
  with_elements(run, [&](auto* values) {
    add_scaled_values(values, static_cast<decltype(values)>(const_cast<void*>(others)), run.numel,
                      factor);
  });
}

void clamp(const Span& run, double bound) {
  with_elements(run, [&](auto* values) { clamp_values(values, run.numel, bound); });
}

void clamp_streams(const Span* runs, double bound) {
  with_streams(runs,
               [&](auto* const* values) { clamp_values_of_streams(values, runs[0].numel, bound); });
}

// Rows that are too short for chains of additions: loaded as they are, without a copy of their
// end, and added up in float64, whose range needs no check.
template <class Element>
GRADCLIP_INLINE double short_sum_of_squares(const Element* values, int64_t count) {
  Doubles first = {};
  Doubles second = {};
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const TwoDoubles widened = load_widened(values + i);
    first += widened.first * widened.first;
    second += widened.second * widened.second;
  }
  double even = 0.0;
  double odd = 0.0;
  if (i > 0) {
    double lanes[kDoubles];
    store(first + second, lanes);
    for (int64_t lane = 0; lane < kDoubles; lane += 2) {
      even += lanes[lane];
      odd += lanes[lane + 1];
    }
  }
  for (; i + 2 <= count; i += 2) {
    const double value = widen(values[i]);
    const double next = widen(values[i + 1]);
    even += value * value;
    odd += next * next;
  }
  if (i < count) {
    const double value = widen(values[i]);
    even += value * value;
  }
  return even + odd;
}

template <class Element>
GRADCLIP_INLINE double sum_of_squares(const Element* values, int64_t count) {
  constexpr int64_t kShort = 8 * kFloats;
  if (count < kShort) return short_sum_of_squares(values, count);
  double result;
  sums<Norm::kL2, 1>(&values, count, Precision::kFloat32, &result);
  return result;
}

GRADCLIP_INLINE double sum_of_squares(const double* values, int64_t count) {
  double result;
  sums<Norm::kL2, 1>(&values, count, Precision::kFloat64, &result);
  return result;
}

// Bytes of a row that are added up at once, while as many that follow are fetched: rows are too
// short for the streams of a long run.
constexpr int64_t kCacheLineBytes = 64;
constexpr int64_t kRowPieceBytes = 4 * 1024;

void row_sums(const Span& run, int64_t count, double* sums) {
  const int64_t length = run.numel / count;
  with_elements(run, [&](const auto* values) {
    constexpr int64_t kPiece = kRowPieceBytes / static_cast<int64_t>(sizeof(*values));
    constexpr int64_t kLine = kCacheLineBytes / static_cast<int64_t>(sizeof(*values));
    for (int64_t row = 0; row < count; ++row) {
      double total = 0.0;
      for (int64_t begin = 0; begin < length; begin += kPiece) {
        const auto* piece = values + row * length + begin;
        const int64_t numel = std::min(kPiece, length - begin);
        for (int64_t i = 0; i < numel; i += kLine) __builtin_prefetch(piece + kPiece + i);
        total += sum_of_squares(piece, numel);
      }
      sums[row] = total;
    }
  });
}

void scale_rows(const Span& run, int64_t count, const double* coefficients) {
  const int64_t length = run.numel / count;
  with_elements(run, [&](auto* values) {
    for (int64_t row = 0; row < count; ++row) {
      if (coefficients[row] == 1.0) continue;
      scale_values(values + row * length, length, coefficients[row]);
    }
  });
}
