// Clamping runs in place. Part of kernels_body.h, and like it compiled once per instruction set: no
// include guard.

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
