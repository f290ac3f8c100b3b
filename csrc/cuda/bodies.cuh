// The bodies of the kernels: what one block does. kernels.cuh wraps them for the GPU; the tests run
// them on the CPU. Between two kernels nothing is shared but the partial sums: no atomics, no
// counters, nothing to be reset.
//
//   tensor   |------ a ----|-- b --|--------- c ---------|   end to end, cut into tiles of 16 KB
//   worker   |    0     |    1     |    2     |    3     |   a block: an equal range of tiles
//   segment  |   a, 0   |a1| b, 1  |   c, 2   |   c, 3   |   where a tensor and a worker meet
//   run      kLoads vectors of each thread of the block, all in flight before the first is used
//   vector   16 bytes, 2 to 8 elements: what a thread loads or stores at once
//   ends     the elements before the first and behind the last 16-byte border, one for each thread
//   partial  the power sum of a worker, at partials[worker]
//   slot     that of a segment, at slots[tensor + worker]
#pragma once

#include "core/units.h"
#include "cuda/clip.h"
#include "cuda/segments.cuh"
#include "cuda/table.h"

namespace gradclip::cuda {

// A worker's tiles, and the tensor that the first of them is part of; the last if it goes backward.
struct Share {
  Range tiles;
  int tensor;
};

// Reads nothing but the table.
template <bool kForward, class AnyTable>
__device__ __forceinline__ Share share_of_worker(const AnyTable& table, int worker) {
  const Range tiles = tiles_of_worker(static_cast<uint32_t>(worker),
                                      static_cast<uint32_t>(table.workers), table.tiles);
  const int64_t first = kForward ? tiles.begin : tiles.end - 1;
  return {tiles, find_tensor(table.first_tile, table.tensors, first)};
}

// Calls visit(tensor, data, numel, dtype) for the parts of tensors in a share, in ascending or
// descending order.
template <bool kForward, class AnyTable, class Visit>
__device__ __forceinline__ void for_segments(const AnyTable& table, const Share& share,
                                             const Visit& visit) {
  int64_t begin = share.tiles.begin;
  int64_t end = share.tiles.end;
  int tensor = share.tensor;
#pragma unroll 1
  while (begin < end) {
    const int64_t first = table.first_tile[tensor];
    const int64_t behind = end_tile(table.first_tile, table.tensors, table.tiles, tensor);
    const int64_t segment_begin = first > begin ? first : begin;
    const int64_t segment_end = behind < end ? behind : end;
    const uint64_t packed = table.numel_and_dtype[tensor];
    const DType dtype = dtype_of(packed);
    const int64_t from = (segment_begin - first) * tile_elements(dtype);
    const int64_t all = numel_of(packed) - from;
    const int64_t most = (segment_end - segment_begin) * tile_elements(dtype);
    visit(tensor, static_cast<char*>(table.data[tensor]) + (segment_begin - first) * kTileBytes,
          all < most ? all : most, dtype);
    if (kForward) {
      begin = segment_end;
      ++tensor;
    } else {
      end = segment_begin;
      --tensor;
    }
  }
}

// Calls work(segment) with the segment's dtype known to the compiler.
template <int kThreads, class Work>
__device__ __forceinline__ void with_dtype(char* data, int64_t numel, DType dtype,
                                           const Work& work) {
  switch (dtype) {
    case DType::kFloat32:
      return work(Segment<DType::kFloat32, kThreads>(data, numel));
    case DType::kFloat64:
      return work(Segment<DType::kFloat64, kThreads>(data, numel));
    case DType::kFloat16:
      return work(Segment<DType::kFloat16, kThreads>(data, numel));
    case DType::kBFloat16:
      return work(Segment<DType::kBFloat16, kThreads>(data, numel));
  }
}

// A thread's share of the worker's sum and, with kPerTensor, of the current tensor's.
template <Norm kNorm, bool kPerTensor>
struct Sums {
  Accumulator<kNorm> total;
  Accumulator<kNorm> tensor;

  __device__ __forceinline__ void add(double partial) {
    total.add(partial);
    if (kPerTensor) tensor.add(partial);
  }
};

// Measures the worker's tiles with measure_part(tensor, segment, sums); returns, in the first
// thread, the worker's power sum. With kPerTensor each (tensor, worker) pair that meets also gets
// its own in slots[tensor + worker], and slots that no pair owns get 0. The total is added up in
// the same way with and without.
template <Norm kNorm, bool kPerTensor, int kThreads, class AnyTable, class MeasurePart>
__device__ __forceinline__ double measured_worker(const AnyTable& table, int worker, double* slots,
                                                  const MeasurePart& measure_part) {
  const Share share = share_of_worker<true>(table, worker);
  Sums<kNorm, kPerTensor> sums = {Accumulator<kNorm>::zero(), Accumulator<kNorm>::zero()};
  for_segments<true>(table, share, [&](int tensor, char* data, int64_t numel, DType dtype) {
    with_dtype<kThreads>(data, numel, dtype,
                         [&](const auto& segment) { measure_part(tensor, segment, &sums); });
    if constexpr (kPerTensor) {
      const double of_tensor = block_total<kThreads>(sums.tensor).value();
      sums.tensor = Accumulator<kNorm>::zero();
      if (threadIdx.x == 0) {
        const int64_t slot =
            slot_of(table.first_tensor + tensor, int64_t{table.first_worker} + worker);
        slots[slot] = of_tensor;
        // Worker and tensor begin on the same tile, so tensor + worker skipped a slot.
        if (slot > 0 && table.first_worker + worker > 0 &&
            table.first_tile[tensor] == share.tiles.begin) {
          slots[slot - 1] = 0.0;
        }
      }
    }
  });
  return block_total<kThreads>(sums.total).value();
}

template <class AnyTable>
__device__ __forceinline__ void leave_partial(const AnyTable& table, int worker, double sum,
                                              double* partials) {
  if (threadIdx.x == 0) partials[table.first_worker + worker] = sum;
}

// Measures a part of a tensor; if the table holds parameters, after a multiple of the parameter was
// added to it. (Not in the lambda that calls it, where nvcc 11.8 compiles both branches.)
template <Norm kNorm, class AnyTable, class AnySegment, class AnySums>
__device__ __forceinline__ void measure_segment(const AnyTable& table, int tensor,
                                                const AnySegment& segment, Precision precision,
                                                AnySums* sums) {
  if constexpr (AnyTable::kDecays) {
    const int64_t offset = segment.data - static_cast<char*>(table.data[tensor]);
    const char* parameter = static_cast<const char*>(table.parameters[tensor]) + offset;
    decay_and_measure<kNorm>(segment, parameter, table.factor, precision, sums);
  } else {
    measure<kNorm>(segment, precision, sums);
  }
}

template <Norm kNorm, bool kPerTensor, int kThreads, class AnyTable>
__device__ __forceinline__ void power_sums_body(const AnyTable& table, Precision precision,
                                                double* partials, double* slots) {
  const int worker = static_cast<int>(blockIdx.x);
  const double sum = measured_worker<kNorm, kPerTensor, kThreads>(
      table, worker, slots, [&](int tensor, const auto& segment, auto* sums) {
        measure_segment<kNorm>(table, tensor, segment, precision, sums);
      });
  leave_partial(table, worker, sum, partials);
}

// The power sum of all workers, in the first thread. Every block adds in the same order, each
// thread with several loads in flight; 0 for what is not there changes no sum.
template <Norm kNorm, int kThreads>
__device__ __forceinline__ double folded_partials(const double* partials, int count) {
  Accumulator<kNorm> own = Accumulator<kNorm>::zero();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kLoads * kThreads) {
    double loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      loaded[k] = i + k * kThreads < count ? load_result(partials + i + k * kThreads) : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) own.add(loaded[k]);
  }
  return block_total<kThreads>(own).value();
}

template <int kThreads>
__device__ __forceinline__ double folded_partials(Norm kind, const double* partials, int count) {
  return kind == Norm::kInf ? folded_partials<Norm::kInf, kThreads>(partials, count)
                            : folded_partials<Norm::kL2, kThreads>(partials, count);
}

// Calls work(format) with the Elements of a dtype.
template <class Work>
__device__ __forceinline__ auto with_format(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::kFloat64:
      return work(Elements<DType::kFloat64>());
    case DType::kFloat16:
      return work(Elements<DType::kFloat16>());
    case DType::kBFloat16:
      return work(Elements<DType::kBFloat16>());
    default:
      return work(Elements<DType::kFloat32>());
  }
}

__device__ __forceinline__ double value_of(const Scalar& scalar) {
  if (scalar.pointer == nullptr) return scalar.value;
  return with_format(scalar.dtype, [&](auto format) {
    return static_cast<double>(decltype(format)::get(scalar.pointer, 0));
  });
}

__device__ __forceinline__ void write_norm(double norm, DType dtype, void* result) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    Format::put(result, 0, static_cast<typename Format::Value>(norm));
  });
}

// A negative number becomes NaN: raising an error would take a device sync.
__device__ __forceinline__ double max_norm_of(const Scalar& scalar) {
  const double max_norm = value_of(scalar);
  return max_norm >= 0.0 ? max_norm : static_cast<double>(NAN);
}

// Turns the norm, known to the first thread, into the coefficient in every thread. The first block
// stores the norm if that is requested.
__device__ __forceinline__ double shared_coefficient(const Clip& clip, double norm) {
  __shared__ double coefficient;
  if (threadIdx.x == 0) {
    coefficient = clip.is_coefficient ? norm : clip_coefficient(max_norm_of(clip.max_norm), norm);
    if (blockIdx.x == 0 && clip.norm_result != nullptr) {
      write_norm(norm, clip.norm_dtype, clip.norm_result);
    }
  }
  __syncthreads();
  return coefficient;
}

template <int kThreads>
__device__ __forceinline__ void scale_segment(char* data, int64_t numel, DType dtype,
                                              double coefficient) {
  const bool in_double = fabs(coefficient) < kSmallestFloat32Coefficient;
  const Scale scale = {static_cast<float>(coefficient), coefficient};
  with_dtype<kThreads>(data, numel, dtype, [&](const auto& segment) {
    if (in_double) return scale_in_double(segment, coefficient);
    apply(segment, scale);
  });
}

// Multiplies a share back to front, so that what was measured last, and is still in the L2 cache,
// is written first. A coefficient of exactly 1 writes nothing; NaN has to be written.
template <int kThreads, class AnyTable>
__device__ __forceinline__ void scale_share(const AnyTable& table, const Share& share,
                                            double coefficient) {
  if (coefficient == 1.0) return;
  for_segments<false>(table, share, [&](int, char* data, int64_t numel, DType dtype) {
    scale_segment<kThreads>(data, numel, dtype, coefficient);
  });
}

// The share of a block that writes: what was measured last comes first.
template <class AnyTable>
__device__ __forceinline__ Share share_from_the_back(const AnyTable& table) {
  return share_of_worker<false>(table, table.workers - 1 - static_cast<int>(blockIdx.x));
}

template <int kThreads, class AnyTable>
__device__ __forceinline__ void scale_body(const AnyTable& table, const Clip& clip) {
  // Needs the table alone, so it does not have to wait.
  const Share share = share_from_the_back(table);
  // In every thread before any exit, any load of results and any store.
  wait_for_previous_kernel();
  double norm = 0.0;
  if (clip.partials != nullptr) {
    norm = finish(clip.kind, folded_partials<kThreads>(clip.kind, clip.partials, clip.count));
  } else if (threadIdx.x == 0) {
    norm = value_of(clip.given_norm);
  }
  scale_share<kThreads>(table, share, shared_coefficient(clip, norm));
}

// Multiplies each tensor by its own coefficient: 1 writes nothing, 0 clears, including NaN and
// infinity.
template <int kThreads, class AnyTable>
__device__ __forceinline__ void scale_each_body(const AnyTable& table, const double* coefficients) {
  const Share share = share_from_the_back(table);
  for_segments<false>(table, share, [&](int tensor, char* data, int64_t numel, DType dtype) {
    const double coefficient = coefficients[table.positions[tensor]];
    if (coefficient == 1.0) return;
    if (coefficient != 0.0) return scale_segment<kThreads>(data, numel, dtype, coefficient);
    with_dtype<kThreads>(data, numel, dtype, [&](const auto& segment) { apply(segment, Clear()); });
  });
}

template <int kThreads, class AnyTable>
__device__ __forceinline__ void clamp_body(const AnyTable& table, double bound) {
  const Clamp clamp = {static_cast<float>(bound), bound};
  for_segments<false>(table, share_from_the_back(table),
                      [&](int, char* data, int64_t numel, DType dtype) {
                        with_dtype<kThreads>(data, numel, dtype,
                                             [&](const auto& segment) { apply(segment, clamp); });
                      });
}

// A whole small list in one block and one launch: norm, barrier, scale.
template <Norm kNorm, int kThreads, class AnyTable>
__device__ __forceinline__ void clip_in_one_block_body(const AnyTable& table, Precision precision,
                                                       const Clip& clip) {
  const double sum = measured_worker<kNorm, false, kThreads>(
      table, 0, nullptr,
      [&](int, const auto& segment, auto* sums) { measure<kNorm>(segment, precision, sums); });
  scale_share<kThreads>(table, share_from_the_back(table),
                        shared_coefficient(clip, finish(kNorm, sum)));
}

// The norm of one row, in the first thread.
template <int kThreads>
__device__ __forceinline__ double row_norm(const void* rows, uint64_t packed_row, int64_t row) {
  const int64_t numel = numel_of(packed_row);
  const DType dtype = dtype_of(packed_row);
  char* data = static_cast<char*>(const_cast<void*>(rows)) + row * numel * element_size(dtype);
  Sums<Norm::kL2, false> sums = {Accumulator<Norm::kL2>::zero(), Accumulator<Norm::kL2>::zero()};
  with_dtype<kThreads>(data, numel, dtype, [&](const auto& segment) {
    measure<Norm::kL2>(segment, Precision::kFloat32, &sums);
  });
  return unit_norm(block_total<kThreads>(sums.total).value(), dtype);
}

// Unit-wise clipping: a block measures one row of a parameter and of its gradient, and scales that,
// while both are in cache; then the next one. Each worker leaves its smallest coefficient.
template <int kThreads, class AnyTable>
__device__ __forceinline__ void clip_rows_body(const AnyTable& table, const UnitLimit& limit,
                                               double* smallest) {
  __shared__ double coefficient;
  const int worker = static_cast<int>(blockIdx.x);
  double own_smallest = 1.0;
#pragma unroll 1
  for (int64_t row = worker; row < table.rows; row += table.workers) {
    const int tensor = find_tensor(table.first_row, table.tensors, row);
    const int64_t row_of_tensor = row - table.first_row[tensor];
    const uint64_t packed = table.gradient_row[tensor];
    const double weights_norm =
        row_norm<kThreads>(table.weights[tensor], table.weights_row[tensor], row_of_tensor);
    const double norm = row_norm<kThreads>(table.gradients[tensor], packed, row_of_tensor);
    if (threadIdx.x == 0) {
      coefficient = limit.coefficient(weights_norm, norm);
      own_smallest = coefficient < own_smallest ? coefficient : own_smallest;
    }
    // The barriers of the next row's norms keep its coefficient from being written too early.
    __syncthreads();
    if (coefficient == 1.0) continue;
    const DType dtype = dtype_of(packed);
    char* data = static_cast<char*>(table.gradients[tensor]);
    data += row_of_tensor * numel_of(packed) * element_size(dtype);
    scale_segment<kThreads>(data, numel_of(packed), dtype, coefficient);
  }
  if (threadIdx.x == 0) smallest[table.first_worker + worker] = own_smallest;
}

// For a call that only measures: stores the power sum, the norm in the result's dtype, or both.
template <int kThreads>
__device__ __forceinline__ void finish_body(Norm kind, const double* partials, int count,
                                            double* power_sum, DType norm_dtype,
                                            void* norm_result) {
  wait_for_previous_kernel();
  const double sum = folded_partials<kThreads>(kind, partials, count);
  if (threadIdx.x != 0) return;
  if (power_sum != nullptr) *power_sum = sum;
  if (norm_result != nullptr) write_norm(finish(kind, sum), norm_dtype, norm_result);
}

// The norm of each tensor from the slots of measured_worker, a warp for each, to its place in the
// caller's list.
template <Norm kNorm, int kThreads, class AnyTable>
__device__ __forceinline__ void tensor_norms_body(const AnyTable& table, const double* slots,
                                                  double* norms) {
  wait_for_previous_kernel();
  const int thread = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int tensor = thread / kWarpThreads;
  if (tensor >= table.tensors) return;
  const int64_t first = table.first_tile[tensor];
  const int64_t behind = end_tile(table.first_tile, table.tensors, table.tiles, tensor);
  const int64_t number = table.first_tensor + tensor;
  const int64_t begin = table.first_worker + worker_of_tile(first, table.workers, table.tiles);
  const int64_t end = table.first_worker + worker_of_tile(behind - 1, table.workers, table.tiles);
  Accumulator<kNorm> own = Accumulator<kNorm>::zero();
#pragma unroll 1
  for (int64_t worker = begin + thread % kWarpThreads; worker <= end; worker += kWarpThreads) {
    own.add(load_result(slots + slot_of(number, worker)));
  }
  const double sum = warp_total(own).value();
  if (thread % kWarpThreads == 0) norms[table.positions[tensor]] = finish(kNorm, sum);
}

}  // namespace gradclip::cuda
