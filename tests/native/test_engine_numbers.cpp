// The CPU engine on every number of 16 bits, and on float32 far from one. Part of the program of
// test_engine.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "cpu/passes.h"
#include "engine_testing.h"

namespace gradclip {
namespace {

// A format of 16 bits, as IEEE 754 describes it.
struct Format {
  DType dtype;
  int fraction_bits;
  int smallest_exponent;  // of normal numbers
  int largest_exponent;
};
constexpr Format kFormats[] = {{DType::kFloat16, 10, -14, 15}, {DType::kBFloat16, 7, -126, 127}};

double value_of(const Format& format, uint32_t bits) {
  const int fraction = static_cast<int>(bits & ((1u << format.fraction_bits) - 1));
  const int exponent = static_cast<int>((bits & 0x7fffu) >> format.fraction_bits);
  const int implicit = exponent == 0 ? 0 : 1 << format.fraction_bits;
  const int last_exponent = format.largest_exponent - format.smallest_exponent + 2;
  double magnitude =
      std::ldexp(implicit + fraction, format.smallest_exponent - format.fraction_bits +
                                          (exponent == 0 ? 0 : exponent - 1));
  if (exponent == last_exponent) magnitude = fraction == 0 ? INFINITY : kNaN;
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

// The nearest number of the format, of two equally near ones the one whose last bit is 0.
double rounded_to(const Format& format, double value) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.smallest_exponent);
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double rounded = std::nearbyint(value / unit) * unit;
  const double too_large = std::ldexp(1.0, format.largest_exponent + 1);
  return std::fabs(rounded) < too_large ? rounded : std::copysign(INFINITY, rounded);
}

bool same(double found, double expected) {
  return std::isnan(expected) ? std::isnan(found)
                              : found == expected && std::signbit(found) == std::signbit(expected);
}

// Every number of 16 bits, subnormal, infinite and NaN ones too, in vectors and in what is left
// over at the end of a run.
void test_all_of_16_bits(const Format& format) {
  constexpr uint32_t kNumbers = 1u << 16;
  constexpr uint32_t kRest = 5;
  std::vector<uint16_t> original(kNumbers + kRest);
  for (uint32_t i = 0; i < original.size(); ++i) {
    original[i] = static_cast<uint16_t>(i * 40503u);  // odd, so each of them comes up
  }
  std::vector<uint16_t> values = original;
  const Span span = {values.data(), static_cast<int64_t>(values.size()), format.dtype};
  const FlatIndex index({span});
  const Range all = {0, index.tiles()};
  for (int64_t i = 0; i < span.numel; ++i) {
    CHECK(same(read(span, i), value_of(format, original[static_cast<size_t>(i)])));
  }
  // Three bits and a power of two: the product is exact in float32, so it is rounded once. The
  // last one takes the way of coefficients too small for float32.
  for (const double coefficient : {0.625, 0.5, 0x1.4p-9, 2.5, 0x1.4p-101}) {
    values = original;
    cpu::scale(index, coefficient, all);
    for (int64_t i = 0; i < span.numel; ++i) {
      const double product = value_of(format, original[static_cast<size_t>(i)]) * coefficient;
      // Where float32 itself is subnormal, the product is rounded to that first.
      CHECK(same(read(span, i), rounded_to(format, static_cast<float>(product))));
    }
  }
  for (const double bound : {0.0, 1.5 * std::ldexp(1.0, format.smallest_exponent - 2), 1.0}) {
    values = original;
    cpu::clamp(index, bound, all);
    for (int64_t i = 0; i < span.numel; ++i) {
      const double before = value_of(format, original[static_cast<size_t>(i)]);
      const double expected = std::fabs(before) > bound ? std::copysign(bound, before) : before;
      CHECK(std::isnan(before) ? std::isnan(read(span, i)) : read(span, i) == expected);
    }
  }
}

// Numbers whose squares, or which themselves, are subnormal or beyond the largest in float32.
void test_far_from_one() {
  for (const int exponent : {-149, -140, -126, -75, 64, 100}) {
    for (const int64_t numel : {int64_t{1}, int64_t{7}, int64_t{640}, int64_t{10003}}) {
      std::vector<float> values(static_cast<size_t>(numel));
      double sum = 0.0;  // all of this is exact in float64
      double squares = 0.0;
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = std::ldexp(static_cast<float>(i % 8 + 1), exponent);
        sum += static_cast<double>(values[i]);
        squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);
      }
      const double largest = std::ldexp(static_cast<double>(std::min(numel, int64_t{8})), exponent);
      const FlatIndex index({{values.data(), numel, DType::kFloat32}});
      for (const Precision precision : {Precision::kFloat32, Precision::kFloat64}) {
        CHECK(measured(index, Norm::kL1, precision, 1) == sum);
        CHECK(measured(index, Norm::kL2, precision, 1) == squares);
        CHECK(measured(index, Norm::kInf, precision, 1) == largest);
      }
      const std::vector<float> original = values;
      cpu::scale(index, 0.5, {0, index.tiles()});
      for (size_t i = 0; i < values.size(); ++i) CHECK(values[i] == original[i] * 0.5f);
    }
  }
}

}  // namespace

void test_numbers() {
  test_far_from_one();
  for (const Format& format : kFormats) test_all_of_16_bits(format);
}

}  // namespace gradclip
