// The generic body of the CPU kernels. A file that includes it first defines kVectorBytes, the
// width of the machine's registers, and selects the instruction set; then it includes this inside a
// namespace of its own. It has no include guard: one program holds it once per instruction set.
//
// Vectors are the compiler's own (gcc's and clang's vector_size), so the same lines become SSE2,
// NEON, AVX2 or AVX-512. They are written out, rather than left to the auto-vectorizer, because it
// may not reorder floating-point sums.

#include "cpu/sums_body.h"

template <class Element>
void scale_values(Element* values, int64_t count, double coefficient) {
  if (std::fabs(coefficient) < kSmallestFloat32Coefficient) {
    for (int64_t i = 0; i < count; ++i) {
      narrow(static_cast<float>(widen(values[i]) * coefficient), values + i);
    }
    return;
  }
  // A caller's NaN payload may have bits in the half that bfloat16 cuts off.
  const float factor = std::isnan(coefficient) ? std::numeric_limits<float>::quiet_NaN()
                                               : static_cast<float>(coefficient);
  const auto scale_two = [&](int64_t at) {
    const TwoFloats two = load_two(values + at);
    store_two({two.first * factor, two.second * factor}, values + at);
  };
  int64_t i = for_chunks<2 * kFloats>(values, count, scale_two);
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) scale_two(i);
  for (; i < count; ++i) narrow(widen(values[i]) * factor, values + i);
}

void scale_values(double* values, int64_t count, double coefficient) {
  const auto scale_vector = [&](int64_t at) {
    store(load(values + at) * coefficient, values + at);
  };
  int64_t i = for_chunks<kDoubles>(values, count, scale_vector);
  for (; i + kDoubles <= count; i += kDoubles) scale_vector(i);
  for (; i < count; ++i) values[i] *= coefficient;
}

template <class Element>
void add_scaled_values(Element* values, const Element* others, int64_t count, double factor) {
  const float float_factor = static_cast<float>(factor);
  const auto add_two = [&](int64_t at) {
    const TwoFloats two = load_two(values + at);
    const TwoFloats other = load_two(others + at);
    store_two({two.first + other.first * float_factor, two.second + other.second * float_factor},
              values + at);
  };
  int64_t i = for_chunks<2 * kFloats>(values, count, add_two);
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) add_two(i);
  for (; i < count; ++i) narrow(widen(values[i]) + widen(others[i]) * float_factor, values + i);
}

void add_scaled_values(double* values, const double* others, int64_t count, double factor) {
  const auto add_vector = [&](int64_t at) {
    store(load(values + at) + load(others + at) * factor, values + at);
  };
  int64_t i = for_chunks<kDoubles>(values, count, add_vector);
  for (; i + kDoubles <= count; i += kDoubles) add_vector(i);
  for (; i < count; ++i) values[i] += others[i] * factor;
}

// Keeps NaN, since comparisons with it are false.
template <class Value>
GRADCLIP_INLINE Value clamped(Value value, Value bound) {
  value = value > bound ? bound : value;
  return value < -bound ? -bound : value;
}

template <class Element>
void clamp_values(Element* values, int64_t count, double bound) {
  const float float_bound = static_cast<float>(bound);
  const auto clamp_two = [&](int64_t at) {
    const TwoFloats two = load_two(values + at);
    store_two(
        {clamped(two.first, Floats{} + float_bound), clamped(two.second, Floats{} + float_bound)},
        values + at);
  };
  int64_t i = for_chunks<2 * kFloats>(values, count, clamp_two);
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) clamp_two(i);
  for (; i < count; ++i) narrow(clamped(widen(values[i]), float_bound), values + i);
}

void clamp_values(double* values, int64_t count, double bound) {
  const auto clamp_vector = [&](int64_t at) {
    store(clamped(load(values + at), Doubles{} + bound), values + at);
  };
  int64_t i = for_chunks<kDoubles>(values, count, clamp_vector);
  for (; i + kDoubles <= count; i += kDoubles) clamp_vector(i);
  for (; i < count; ++i) values[i] = clamped(values[i], bound);
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

double power_sum(Norm kind, Precision precision, const Span& run) {
  return with_elements(
      run, [&](const auto* values) { return power_sum_of(kind, precision, values, run.numel); });
}

void scale(const Span& run, double coefficient) {
  with_elements(run, [&](auto* values) { scale_values(values, run.numel, coefficient); });
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

// Rows that are too short for a block of sum: loaded as they are, without a copy of their end, and
// added up in float64, whose range needs no check.
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
  return count < kShort ? short_sum_of_squares(values, count)
                        : sum<Norm::kL2>(values, count, Precision::kFloat32);
}

GRADCLIP_INLINE double sum_of_squares(const double* values, int64_t count) {
  return sum<Norm::kL2>(values, count, Precision::kFloat64);
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
