// The generic body of the CPU kernels: plain loops over lanes, written so that the compiler turns
// them into the vectors of whatever instruction set the including file is compiled for. It is
// included once per instruction set, inside a namespace of its own, and has no include guard.
//
// Sums are taken in float64 from the first addition on: a float32 square never overflows or
// vanishes there, and memory, not arithmetic, is what takes the time. Each lane adds kChain numbers
// before they go into a compensated sum, so the error does not grow with the size.

constexpr int64_t kLanes = 8;
constexpr int64_t kChain = 8;
constexpr int64_t kBlock = kLanes * kChain;
constexpr int64_t kStaged = 512;  // 16-bit elements widened at a time: 2 KB, always in L1

// A coefficient this small would lose bits, or vanish, as a float32.
constexpr double kSmallestFloatCoefficient = 0x1p-100;

template <Norm kNorm>
GRADCLIP_INLINE double map(double value) {
  return kNorm == Norm::kL2 ? value * value : std::fabs(value);
}

// A sum and what rounding took from it (Knuth's TwoSum): together they grow by exactly `value`.
GRADCLIP_INLINE void add_compensated(double* sum, double* compensation, double value) {
  const double total = *sum + value;
  const double added = total - *sum;
  *compensation += (*sum - (total - added)) + (value - added);
  *sum = total;
}

template <Norm kNorm, class Real>
double sum(const Real* values, int64_t count) {
  double sums[kLanes] = {};
  double compensations[kLanes] = {};
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    double chain[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) chain[lane] = map<kNorm>(values[i + lane]);
    for (int64_t step = kLanes; step < kBlock; step += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        chain[lane] += map<kNorm>(values[i + step + lane]);
      }
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      add_compensated(&sums[lane], &compensations[lane], chain[lane]);
    }
  }
  double tail[kLanes] = {};
  for (; i < count; ++i) tail[i % kLanes] += map<kNorm>(values[i]);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    add_compensated(&sums[lane], &compensations[lane], tail[lane]);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      add_compensated(&sums[lane], &compensations[lane], sums[lane + half]);
      compensations[lane] += compensations[lane + half];
    }
  }
  // Once the sum is not finite the compensation holds inf - inf and means nothing.
  return std::isfinite(sums[0]) ? sums[0] + compensations[0] : sums[0];
}

// Magnitudes compare as integers: NaN > inf > finite, so nothing has to be tested for.
template <class Real, class Integer>
double largest_magnitude(const Real* values, int64_t count) {
  Integer largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Integer bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= std::numeric_limits<Integer>::max();
    largest = bits > largest ? bits : largest;
  }
  Real result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

template <class Real>
double power_sum_of(Norm norm, const Real* values, int64_t count) {
  switch (norm) {
    case Norm::kL1:
      return sum<Norm::kL1>(values, count);
    case Norm::kL2:
      return sum<Norm::kL2>(values, count);
    case Norm::kInf:
      using Integer = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
      return largest_magnitude<Real, Integer>(values, count);
  }
  return 0.0;
}

// Hands the run to work(floats, count) in staged pieces of widened values; with kStore what work
// left there is rounded back into the run.
template <bool kStore, class Half, class Work>
GRADCLIP_INLINE void staged(Half* values, int64_t count, const Work& work) {
  alignas(64) float stage[kStaged];
  for (int64_t begin = 0; begin < count; begin += kStaged) {
    const int64_t length = std::min(kStaged, count - begin);
    for (int64_t i = 0; i < length; ++i) stage[i] = widen(values[begin + i]);
    work(stage, length);
    if constexpr (kStore) {
      for (int64_t i = 0; i < length; ++i) narrow(stage[i], values + begin + i);
    }
  }
}

template <class Half>
double power_sum_of_halves(Norm norm, Half* values, int64_t count) {
  PowerSum result(norm);
  staged<false>(values, count, [&](const float* stage, int64_t length) {
    result.add(power_sum_of(norm, stage, length));
  });
  return result.value();
}

double power_sum(Norm norm, const Span& run) {
  switch (run.dtype) {
    case DType::kFloat32:
      return power_sum_of(norm, static_cast<const float*>(run.data), run.numel);
    case DType::kFloat64:
      return power_sum_of(norm, static_cast<const double*>(run.data), run.numel);
    case DType::kFloat16:
      return power_sum_of_halves(norm, static_cast<Float16*>(run.data), run.numel);
    case DType::kBFloat16:
      return power_sum_of_halves(norm, static_cast<BFloat16*>(run.data), run.numel);
  }
  return 0.0;
}

template <class Real, class Factor>
GRADCLIP_INLINE void multiply(Real* values, int64_t count, Factor factor) {
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Real>(values[i] * factor);
}

GRADCLIP_INLINE void multiply_floats(float* values, int64_t count, double coefficient) {
  if (std::fabs(coefficient) < kSmallestFloatCoefficient) {
    multiply(values, count, coefficient);
  } else {
    multiply(values, count, static_cast<float>(coefficient));
  }
}

void scale(const Span& run, double coefficient) {
  const auto multiply_stage = [&](float* stage, int64_t length) {
    multiply_floats(stage, length, coefficient);
  };
  switch (run.dtype) {
    case DType::kFloat32:
      return multiply_floats(static_cast<float*>(run.data), run.numel, coefficient);
    case DType::kFloat64:
      return multiply(static_cast<double*>(run.data), run.numel, coefficient);
    case DType::kFloat16:
      return staged<true>(static_cast<Float16*>(run.data), run.numel, multiply_stage);
    case DType::kBFloat16:
      return staged<true>(static_cast<BFloat16*>(run.data), run.numel, multiply_stage);
  }
}

// Written so that NaN, for which no comparison holds, is kept.
template <class Real>
GRADCLIP_INLINE void limit(Real* values, int64_t count, Real bound) {
  for (int64_t i = 0; i < count; ++i) {
    const Real value = values[i] > bound ? bound : values[i];
    values[i] = value < -bound ? -bound : value;
  }
}

void clamp(const Span& run, double bound) {
  const auto limit_stage = [&](float* stage, int64_t length) {
    limit(stage, length, static_cast<float>(bound));
  };
  switch (run.dtype) {
    case DType::kFloat32:
      return limit_stage(static_cast<float*>(run.data), run.numel);
    case DType::kFloat64:
      return limit(static_cast<double*>(run.data), run.numel, bound);
    case DType::kFloat16:
      return staged<true>(static_cast<Float16*>(run.data), run.numel, limit_stage);
    case DType::kBFloat16:
      return staged<true>(static_cast<BFloat16*>(run.data), run.numel, limit_stage);
  }
}
