// Sums of rows, and rows multiplied each by a coefficient of its own. Part of kernels_body.h, and
// like it compiled once per instruction set: no include guard.

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
