// What a block does with one segment: a contiguous stretch of one tensor. In the aligned body each
// thread loads 16 bytes at a time and has several loads in flight before it uses the first; the few
// elements before and after it, if the tensor is not aligned, take one thread each.
#pragma once

#include "cuda/accumulators.cuh"

namespace gradclip::cuda {

// Independent loads in flight per thread.
inline constexpr int kLoads = 4;

template <DType kDType, int kThreads>
struct Segment {
  using Format = Elements<kDType>;
  // Vectors that a block loads at once.
  static constexpr int kGroup = kLoads * kThreads;

  __device__ __forceinline__ Segment(char* start, int64_t elements) : data(start), numel(elements) {
    const int gap = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(start) & 15)) & 15);
    head = gap / Format::kBytes;
    if (head > numel) head = static_cast<int>(numel);
    vectors = (numel - head) / Format::kCount;
    tail = static_cast<int>(numel - head - vectors * Format::kCount);
  }

  __device__ __forceinline__ uint4* body() const {
    return reinterpret_cast<uint4*>(data + head * Format::kBytes);
  }

  // Calls work(i) for each element outside of the body, one per thread.
  template <class Work>
  __device__ __forceinline__ void for_ends(const Work& work) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < head) work(static_cast<int64_t>(thread));
    if (thread < tail) work(numel - tail + thread);
  }

  char* data;
  int64_t numel;
  int64_t vectors;
  int head;
  int tail;
};

template <Norm kNorm, class Value>
__device__ __forceinline__ Value map(Value value) {
  return kNorm == Norm::kL2 ? value * value : fabs(value);
}

// Adds one more value; a square is added with a single rounding, too.
template <Norm kNorm, class Value>
__device__ __forceinline__ Value accumulate(Value sum, Value value) {
  return kNorm == Norm::kL2 ? fma(value, value, sum) : sum + fabs(value);
}

// Pairwise by halves: adding equal values only doubles them, which is exact.
template <int kCount, class Value>
__device__ __forceinline__ Value folded(Value (&sums)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// The sum of a run, the kLoads vectors of one thread, in the values' own precision. Between an
// element and the result there are at most kLoads - 1 roundings of the chain, log2(kCount) of
// folding (2 for float32, 3 for 16 bits), and for L2 one of the square: never more than on the CPU.
// See Precision for what that makes of the norm.
template <Norm kNorm, DType kDType>
__device__ __forceinline__ double run_sum(const uint4 (&vectors)[kLoads]) {
  using Format = Elements<kDType>;
  typename Format::Value sums[Format::kCount];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    typename Format::Value values[Format::kCount];
    Format::unpack(vectors[k], values);
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) {
      sums[j] = k == 0 ? map<kNorm>(values[j]) : accumulate<kNorm>(sums[j], values[j]);
    }
  }
  return folded(sums);
}

template <DType kDType>
__device__ __forceinline__ double run_maximum(const uint4 (&vectors)[kLoads]) {
  using Format = Elements<kDType>;
  if constexpr (kDType == DType::kFloat64) {
    uint64_t largest = 0;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      double values[Format::kCount];
      Format::unpack(vectors[k], values);
#pragma unroll
      for (int j = 0; j < Format::kCount; ++j) {
        const uint64_t bits = bits_of(fabs(values[j]));
        largest = bits > largest ? bits : largest;
      }
    }
    return double_of(largest);
  } else {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      float values[Format::kCount];
      Format::unpack(vectors[k], values);
#pragma unroll
      for (int j = 0; j < Format::kCount; ++j) {
        const uint32_t bits = __float_as_uint(values[j]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
      }
    }
    return static_cast<double>(__uint_as_float(largest));
  }
}

// Whether a float32 sum is as good as a float64 one. A square may lose what is below the smallest
// float32, 2^-149, which is negligible in a sum of at most 32 squares above 2^-95.
template <Norm kNorm>
__device__ __forceinline__ bool in_range(double sum) {
  return sum <= 3.4028234663852886e38 && (kNorm != Norm::kL2 || sum >= 0x1p-95);
}

// The same sum in float64. It reloads the run: keeping the values until it is known whether they
// are needed would raise the register pressure of the common path, and so would unrolling.
template <Norm kNorm, DType kDType, int kThreads>
__device__ __forceinline__ double run_sum_in_double(const uint4* vectors, int64_t left) {
  using Format = Elements<kDType>;
  double sum = 0.0;
#pragma unroll 1
  for (int k = 0; k < kLoads; ++k) {
    if (k * kThreads >= left) break;
    const uint4 vector = vectors[k * kThreads];
    // A vector of zeros, as in the gradient of an embedding, need not be unpacked.
    if ((vector.x | vector.y | vector.z | vector.w) == 0) continue;
    typename Format::Value values[Format::kCount];
    Format::unpack(vector, values);
    double sums[Format::kCount];
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) {
      sums[j] = map<kNorm>(static_cast<double>(values[j]));
    }
    sum += folded(sums);
  }
  return sum;
}

// Measures one run. `left` is how many vectors the segment has from this thread's first one on.
template <Norm kNorm, DType kDType, int kThreads, bool kWhole>
__device__ __forceinline__ double measured_run(const uint4* vectors, int64_t left,
                                               Precision precision) {
  uint4 loaded[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    loaded[k] = kWhole || k * kThreads < left ? vectors[k * kThreads] : make_uint4(0, 0, 0, 0);
  }
  if constexpr (kNorm == Norm::kInf) {
    return run_maximum<kDType>(loaded);
  } else {
    const double sum = run_sum<kNorm, kDType>(loaded);
    if (kDType == DType::kFloat64 || (precision == Precision::kFloat32 && in_range<kNorm>(sum)))
      return sum;
    return run_sum_in_double<kNorm, kDType, kThreads>(vectors, left);
  }
}

// Adds the power sum of a segment to this thread's share.
template <Norm kNorm, DType kDType, int kThreads, class Sums>
__device__ __forceinline__ void measure(const Segment<kDType, kThreads>& segment,
                                        Precision precision, Sums* sums) {
  using Format = Elements<kDType>;
  constexpr int kGroup = Segment<kDType, kThreads>::kGroup;
  const int thread = static_cast<int>(threadIdx.x);
  segment.for_ends(
      [&](int64_t i) { sums->add(map<kNorm>(static_cast<double>(Format::get(segment.data, i)))); });
  const uint4* vectors = segment.body() + thread;
  int64_t left = segment.vectors;
#pragma unroll 1
  for (; left >= kGroup; left -= kGroup, vectors += kGroup) {
    sums->add(measured_run<kNorm, kDType, kThreads, true>(vectors, left - thread, precision));
  }
  if (left > 0) {
    sums->add(measured_run<kNorm, kDType, kThreads, false>(vectors, left - thread, precision));
  }
}

// Adds a multiple of the parameters to one run of gradients.
template <DType kDType, int kThreads, bool kWhole>
__device__ __forceinline__ void decay_run(uint4* gradients, const uint4* parameters, int64_t left,
                                          typename Elements<kDType>::Value factor) {
  using Format = Elements<kDType>;
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    if (!kWhole && k * kThreads >= left) break;
    typename Format::Value values[Format::kCount];
    typename Format::Value others[Format::kCount];
    Format::unpack(gradients[k * kThreads], values);
    Format::unpack(parameters[k * kThreads], others);
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) values[j] = fma(others[j], factor, values[j]);
    gradients[k * kThreads] = Format::pack(values);
  }
}

// As measure, after adding a multiple of the parameter. Each thread measures what it has just
// written itself, which is still in the cache. Gradient and parameter must have the same offset
// from a 16-byte boundary.
template <Norm kNorm, DType kDType, int kThreads, class Sums>
__device__ __forceinline__ void decay_and_measure(const Segment<kDType, kThreads>& segment,
                                                  const char* parameter, double factor,
                                                  Precision precision, Sums* sums) {
  using Format = Elements<kDType>;
  using Value = typename Format::Value;
  constexpr int kGroup = Segment<kDType, kThreads>::kGroup;
  const int thread = static_cast<int>(threadIdx.x);
  const Value own_factor = static_cast<Value>(factor);
  segment.for_ends([&](int64_t i) {
    const Value gradient = Format::get(segment.data, i);
    Format::put(segment.data, i, fma(Format::get(parameter, i), own_factor, gradient));
    sums->add(map<kNorm>(static_cast<double>(Format::get(segment.data, i))));
  });
  uint4* vectors = segment.body() + thread;
  const uint4* others =
      reinterpret_cast<const uint4*>(parameter + segment.head * Format::kBytes) + thread;
  int64_t left = segment.vectors;
#pragma unroll 1
  for (; left >= kGroup; left -= kGroup, vectors += kGroup, others += kGroup) {
    decay_run<kDType, kThreads, true>(vectors, others, left - thread, own_factor);
    sums->add(measured_run<kNorm, kDType, kThreads, true>(vectors, left - thread, precision));
  }
  if (left > 0) {
    decay_run<kDType, kThreads, false>(vectors, others, left - thread, own_factor);
    sums->add(measured_run<kNorm, kDType, kThreads, false>(vectors, left - thread, precision));
  }
}

// Multiplies by the coefficient, rounded to the values' own precision.
struct Scale {
  float factor;
  double wide_factor;
  __device__ __forceinline__ float operator()(float value) const { return value * factor; }
  __device__ __forceinline__ double operator()(double value) const { return value * wide_factor; }
};

struct Clear {
  template <class Value>
  __device__ __forceinline__ Value operator()(Value) const {
    return Value{0};
  }
};

// Clamps to [-bound, bound]. Comparisons with NaN are false, so NaN is kept.
struct Clamp {
  float bound;
  double wide_bound;
  __device__ __forceinline__ float operator()(float value) const {
    return value > bound ? bound : (value < -bound ? -bound : value);
  }
  __device__ __forceinline__ double operator()(double value) const {
    return value > wide_bound ? wide_bound : (value < -wide_bound ? -wide_bound : value);
  }
};

template <DType kDType, int kThreads, bool kWhole, class Operation>
__device__ __forceinline__ void apply_to_run(uint4* vectors, int64_t left,
                                             const Operation& operation) {
  using Format = Elements<kDType>;
  uint4 loaded[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    loaded[k] = kWhole || k * kThreads < left ? vectors[k * kThreads] : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    typename Format::Value values[Format::kCount];
    Format::unpack(loaded[k], values);
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) values[j] = operation(values[j]);
    if (kWhole || k * kThreads < left) vectors[k * kThreads] = Format::pack(values);
  }
}

// Applies the operation to every element in place, from back to front.
template <DType kDType, int kThreads, class Operation>
__device__ __forceinline__ void apply(const Segment<kDType, kThreads>& segment,
                                      const Operation& operation) {
  using Format = Elements<kDType>;
  constexpr int kGroup = Segment<kDType, kThreads>::kGroup;
  const int thread = static_cast<int>(threadIdx.x);
  segment.for_ends(
      [&](int64_t i) { Format::put(segment.data, i, operation(Format::get(segment.data, i))); });
  const int64_t groups = segment.vectors / kGroup;
  const int64_t rest = segment.vectors - groups * kGroup;
  uint4* vectors = segment.body() + groups * kGroup + thread;
  if (rest > 0) apply_to_run<kDType, kThreads, false>(vectors, rest - thread, operation);
#pragma unroll 1
  for (int64_t group = groups; group > 0; --group) {
    vectors -= kGroup;
    apply_to_run<kDType, kThreads, true>(vectors, kGroup, operation);
  }
}

// For a coefficient that float32 would round or flush to zero. Rare, so it need not be fast.
template <DType kDType, int kThreads>
__device__ __forceinline__ void scale_in_double(const Segment<kDType, kThreads>& segment,
                                                double coefficient) {
  using Format = Elements<kDType>;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < segment.numel; i += kThreads) {
    const double product = static_cast<double>(Format::get(segment.data, i)) * coefficient;
    Format::put(segment.data, i, static_cast<typename Format::Value>(product));
  }
}

}  // namespace gradclip::cuda
