// Multiplying runs in place, and adding a multiple of others to them. Part of kernels_body.h, and
// like it compiled once per instruction set: no include guard.

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
