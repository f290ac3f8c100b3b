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
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    const TwoFloats two = load_two(values + i);
    const TwoFloats other = load_two(others + i);
    store_two({two.first + other.first * float_factor, two.second + other.second * float_factor},
              values + i);
  }
  for (; i < count; ++i) narrow(widen(values[i]) + widen(others[i]) * float_factor, values + i);
}

void add_scaled_values(double* values, const double* others, int64_t count, double factor) {
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    store(load(values + i) + load(others + i) * factor, values + i);
  }
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
