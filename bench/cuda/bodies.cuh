// What one block does in each variant of the sweep, in terms of the engine's own parts: walking
// over tensors, measuring and scaling with the knobs as template parameters. With the engine's
// choice of every knob (kLoads in flight, contiguous tiles, back to front) these loops are the
// engine's.
#pragma once

#include "cuda/bodies.cuh"
#include "hopper.cuh"

namespace gradclip::cuda::sweep {

using Total = Accumulator<Norm::kL2>;

// Calls visit(data, numel, dtype) for the parts of tensors in these tiles of kTile bytes, ascending
// or descending. `tensor` holds the first tile visited or comes before it on the way, and is where
// the next walk in this direction goes on from.
template <bool kForward, int kTile, class AnyTable, class Visit>
__device__ __forceinline__ void walk(const AnyTable& table, Range tiles, int* tensor,
                                     const Visit& visit) {
  int64_t begin = tiles.begin;
  int64_t end = tiles.end;
#pragma unroll 1
  while (begin < end) {
    if constexpr (kForward) {
#pragma unroll 1
      while (end_tile(table.first_tile, table.tensors, table.tiles, *tensor) <= begin) ++*tensor;
    } else {
#pragma unroll 1
      while (table.first_tile[*tensor] >= end) --*tensor;
    }
    const int64_t first = table.first_tile[*tensor];
    const int64_t behind = end_tile(table.first_tile, table.tensors, table.tiles, *tensor);
    const int64_t segment_begin = first > begin ? first : begin;
    const int64_t segment_end = behind < end ? behind : end;
    const uint64_t packed = table.numel_and_dtype[*tensor];
    const DType dtype = dtype_of(packed);
    const int64_t offset = (segment_begin - first) * kTile;
    const int64_t all = numel_of(packed) - (offset >> element_shift(dtype));
    const int64_t most = (segment_end - segment_begin) * kTile >> element_shift(dtype);
    visit(static_cast<char*>(table.data[*tensor]) + offset, all < most ? all : most, dtype);
    if constexpr (kForward) {
      begin = segment_end;
    } else {
      end = segment_begin;
    }
  }
}

template <class AnyTable>
__device__ __forceinline__ Range equal_share(const AnyTable& table, int worker, int workers) {
  return tiles_of_worker(static_cast<uint32_t>(worker), static_cast<uint32_t>(workers),
                         table.tiles);
}

// The tiles of a worker, as far as the parameters of the kernel alone decide: what can be computed
// before the results of the previous kernel are there. Contiguous: an equal share. Strided: chunks
// of `step` tiles, dealt out to the workers in turn.
template <bool kForward, bool kStrided>
struct WorkerTiles {
  template <class AnyTable>
  __device__ __forceinline__ WorkerTiles(const AnyTable& table, int worker, int step) {
    if constexpr (kStrided) {
      const uint32_t chunks =
          (table.tiles + static_cast<uint32_t>(step) - 1) / static_cast<uint32_t>(step);
      const uint32_t workers = static_cast<uint32_t>(table.workers);
      left = (chunks - static_cast<uint32_t>(worker) + workers - 1) / workers;
      begin = worker + (kForward ? 0 : (left - 1) * table.workers);
      const int64_t last = begin * step + step - 1;
      const int64_t first_visited =
          kForward ? begin * step : (last < table.tiles ? last : table.tiles - 1);
      tensor = find_tensor(table.first_tile, table.tensors, first_visited);
    } else {
      const Range tiles = equal_share(table, worker, table.workers);
      begin = tiles.begin;
      left = tiles.end - tiles.begin;
      tensor = find_tensor(table.first_tile, table.tensors, kForward ? tiles.begin : tiles.end - 1);
    }
  }

  template <class AnyTable, class Visit>
  __device__ __forceinline__ void visit(const AnyTable& table, int step, const Visit& visit_part) {
    if constexpr (kStrided) {
#pragma unroll 1
      for (; left > 0; --left) {
        const int64_t end = (begin + 1) * step;
        walk<kForward, kTileBytes>(table, {begin * step, end < table.tiles ? end : table.tiles},
                                   &tensor, visit_part);
        begin += kForward ? table.workers : -table.workers;
      }
    } else {
      walk<kForward, kTileBytes>(table, {begin, begin + left}, &tensor, visit_part);
    }
  }

  // In tiles, or chunks of them.
  int64_t begin;
  int64_t left;
  int tensor;
};

// As run_sum in csrc/cuda/segments.cuh, for chains of any length.
template <DType kDType, int kCount>
__device__ __forceinline__ double chain_sum(const uint4 (&vectors)[kCount]) {
  using Format = Elements<kDType>;
  typename Format::Value sums[Format::kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    typename Format::Value values[Format::kCount];
    Format::unpack(vectors[k], values);
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) {
      sums[j] = k == 0 ? map<Norm::kL2>(values[j]) : accumulate<Norm::kL2>(sums[j], values[j]);
    }
  }
  return folded(sums);
}

// Of kInFlight vectors, all loaded before the first is used. They are added up in chains of at most
// kLoads, which is what the bound of the norm's error allows.
template <int kInFlight, DType kDType, int kTeam, bool kWhole>
__device__ __forceinline__ double measured_vectors(const uint4* vectors, int64_t left,
                                                   Precision precision) {
  constexpr int kChain = kInFlight < kLoads ? kInFlight : kLoads;
  constexpr int kChains = kInFlight / kChain;
  uint4 loaded[kChains][kChain];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    loaded[k / kChain][k % kChain] =
        kWhole || k * kTeam < left ? vectors[k * kTeam] : make_uint4(0, 0, 0, 0);
  }
  double total = 0.0;
  bool all_in_range = true;
#pragma unroll
  for (int c = 0; c < kChains; ++c) {
    const double sum = chain_sum<kDType>(loaded[c]);
    all_in_range = all_in_range && in_range<Norm::kL2>(sum);
    total = c == 0 ? sum : total + sum;
  }
  if (kDType == DType::kFloat64 || (precision == Precision::kFloat32 && all_in_range)) {
    return total;
  }
  constexpr int64_t kMost = int64_t{kChain} * kTeam;
  total = 0.0;
#pragma unroll 1
  for (int c = 0; c < kChains; ++c, vectors += kMost, left -= kMost) {
    total += run_sum_in_double<Norm::kL2, kDType, kTeam>(vectors, left < kMost ? left : kMost);
  }
  return total;
}

// As measure in csrc/cuda/segments.cuh, by a team of kTeam threads: a block or one of its warps.
template <int kInFlight, DType kDType, int kTeam>
__device__ __forceinline__ void measure_by_team(const Segment<kDType, kTeam>& segment,
                                                Precision precision, Total* own) {
  using Format = Elements<kDType>;
  constexpr int kGroup = kInFlight * kTeam;
  const int rank = static_cast<int>(threadIdx.x) % kTeam;
  const auto add = [&](int64_t i) {
    own->add(map<Norm::kL2>(static_cast<double>(Format::get(segment.data, i))));
  };
  if (rank < segment.head) add(rank);
  if (rank < segment.tail) add(segment.numel - segment.tail + rank);
  const uint4* vectors = segment.body() + rank;
  int64_t left = segment.vectors;
#pragma unroll 1
  for (; left >= kGroup; left -= kGroup, vectors += kGroup) {
    own->add(measured_vectors<kInFlight, kDType, kTeam, true>(vectors, left - rank, precision));
  }
  if (left > 0) {
    own->add(measured_vectors<kInFlight, kDType, kTeam, false>(vectors, left - rank, precision));
  }
}

// Which accesses of the scaling pass are not to stay in the cache.
enum class Streaming { kNone, kLoads, kStores, kBoth };

template <int kInFlight, Streaming kStreaming, DType kDType, int kTeam, bool kWhole>
__device__ __forceinline__ void scale_vectors(uint4* vectors, int64_t left, const Scale& scale) {
  using Format = Elements<kDType>;
  constexpr bool kLoadStreaming = kStreaming == Streaming::kLoads || kStreaming == Streaming::kBoth;
  constexpr bool kStoreStreaming =
      kStreaming == Streaming::kStores || kStreaming == Streaming::kBoth;
  uint4 loaded[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (!kWhole && k * kTeam >= left) {
      loaded[k] = make_uint4(0, 0, 0, 0);
    } else {
      loaded[k] = kLoadStreaming ? load_streaming(vectors + k * kTeam) : vectors[k * kTeam];
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    typename Format::Value values[Format::kCount];
    Format::unpack(loaded[k], values);
#pragma unroll
    for (int j = 0; j < Format::kCount; ++j) values[j] = scale(values[j]);
    if (!kWhole && k * kTeam >= left) continue;
    if constexpr (kStoreStreaming) {
      store_streaming(vectors + k * kTeam, Format::pack(values));
    } else {
      vectors[k * kTeam] = Format::pack(values);
    }
  }
}

// As scale_segment in csrc/cuda/bodies.cuh.
template <int kInFlight, bool kForward, Streaming kStreaming, DType kDType, int kTeam>
__device__ __forceinline__ void scale_by_team(const Segment<kDType, kTeam>& segment,
                                              double coefficient) {
  using Format = Elements<kDType>;
  constexpr int kGroup = kInFlight * kTeam;
  const int rank = static_cast<int>(threadIdx.x) % kTeam;
  if (fabs(coefficient) < kSmallestFloat32Coefficient) {
#pragma unroll 1
    for (int64_t i = rank; i < segment.numel; i += kTeam) {
      const double product = static_cast<double>(Format::get(segment.data, i)) * coefficient;
      Format::put(segment.data, i, static_cast<typename Format::Value>(product));
    }
    return;
  }
  const Scale scale = {static_cast<float>(coefficient), coefficient};
  const auto scale_element = [&](int64_t i) {
    Format::put(segment.data, i, scale(Format::get(segment.data, i)));
  };
  if (rank < segment.head) scale_element(rank);
  if (rank < segment.tail) scale_element(segment.numel - segment.tail + rank);
  const int64_t groups = segment.vectors / kGroup;
  const int64_t rest = segment.vectors - groups * kGroup;
  uint4* vectors = segment.body() + (kForward ? 0 : groups * kGroup) + rank;
  const auto scale_rest = [&] {
    if (rest > 0) {
      scale_vectors<kInFlight, kStreaming, kDType, kTeam, false>(vectors, rest - rank, scale);
    }
  };
  if constexpr (!kForward) scale_rest();
#pragma unroll 1
  for (int64_t group = groups; group > 0; --group) {
    if constexpr (!kForward) vectors -= kGroup;
    scale_vectors<kInFlight, kStreaming, kDType, kTeam, true>(vectors, kGroup, scale);
    if constexpr (kForward) vectors += kGroup;
  }
  if constexpr (kForward) scale_rest();
}

// As power_sums_body. After the trigger the scaling kernel may start while this one runs.
enum class Trigger { kNever, kFirst, kLast };

template <int kThreads, int kInFlight, bool kStrided, Trigger kTrigger, class AnyTable>
__device__ __forceinline__ void measure_tiles(const AnyTable& table, int step, Precision precision,
                                              double* partials) {
  if constexpr (kTrigger == Trigger::kFirst) trigger_next_kernel();
  const int worker = static_cast<int>(blockIdx.x);
  Total own = Total::zero();
  WorkerTiles<true, kStrided> tiles(table, worker, step);
  tiles.visit(table, step, [&](char* data, int64_t numel, DType dtype) {
    with_dtype<kThreads>(data, numel, dtype, [&](const auto& segment) {
      measure_by_team<kInFlight>(segment, precision, &own);
    });
  });
  if constexpr (kTrigger == Trigger::kLast) trigger_next_kernel();
  const Total total = block_total<kThreads>(own);
  if (threadIdx.x == 0) partials[worker] = total.value();
}

// The power sum of all workers, in the first thread; unrolled, with four loads in flight.
template <int kThreads, bool kUnrolled>
__device__ __forceinline__ double folded_results(const double* partials, int count) {
  Total own = Total::zero();
  int i = static_cast<int>(threadIdx.x);
  if constexpr (kUnrolled) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (; i < count; i += kAtOnce * kThreads) {
      double loaded[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        loaded[k] = i + k * kThreads < count ? load_result(partials + i + k * kThreads) : 0.0;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) own.add(loaded[k]);
    }
  } else {
#pragma unroll 1
    for (; i < count; i += kThreads) own.add(load_result(partials + i));
  }
  return block_total<kThreads>(own).value();
}

// As scale_body. With kHoisted, what the parameters decide is computed before the wait.
template <int kThreads, int kInFlight, bool kForward, bool kStrided, Streaming kStreaming,
          bool kUnrolled, bool kHoisted, class AnyTable>
__device__ __forceinline__ void scale_tiles(const AnyTable& table, int step, const Clip& clip) {
  const int block = static_cast<int>(blockIdx.x);
  const int worker = kForward ? block : table.workers - 1 - block;
  if constexpr (!kHoisted) wait_for_previous_kernel();
  WorkerTiles<kForward, kStrided> tiles(table, worker, step);
  if constexpr (kHoisted) wait_for_previous_kernel();
  const double sum = folded_results<kThreads, kUnrolled>(clip.partials, clip.count);
  const double coefficient = shared_coefficient(clip, finish(Norm::kL2, sum));
  if (coefficient == 1.0) return;
  tiles.visit(table, step, [&](char* data, int64_t numel, DType dtype) {
    with_dtype<kThreads>(data, numel, dtype, [&](const auto& segment) {
      scale_by_team<kInFlight, kForward, kStreaming>(segment, coefficient);
    });
  });
}

// A whole list in one launch: of one block, or of one cluster, whose blocks read each other's sums
// in shared memory. A worker is a team of kTeam threads, a block or a warp, and owns an equal range
// of tiles of kTile bytes. The number of blocks is table.workers.
template <int kThreads, int kTeam, int kTile, bool kCluster, class AnyTable>
__device__ __forceinline__ void clip_by_teams(const AnyTable& table, Precision precision,
                                              const Clip& clip) {
  constexpr int kTeams = kThreads / kTeam;
  const int team = static_cast<int>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  const Range tiles = equal_share(table, team, table.workers * kTeams);
  int tensor = find_tensor(table.first_tile, table.tensors, tiles.begin);
  Total own = Total::zero();
  walk<true, kTile>(table, tiles, &tensor, [&](char* data, int64_t numel, DType dtype) {
    with_dtype<kTeam>(data, numel, dtype, [&](const auto& segment) {
      measure_by_team<kLoads>(segment, precision, &own);
    });
  });
  Total total = block_total<kThreads>(own);
  if constexpr (kCluster) {
    __shared__ Total of_block;
    if (threadIdx.x == 0) of_block = total;
    arrive_at_cluster_barrier();
    wait_at_cluster_barrier();
    // Every block adds up in the same order, and so gets the same coefficient.
    if (threadIdx.x < kWarpThreads) {
      const int block = static_cast<int>(threadIdx.x);
      total = block < table.workers ? load_from_block(of_block, block) : Total::zero();
      total = warp_total(total);
    }
    // No block may end before the others have read its sum; see the end.
    arrive_at_cluster_barrier();
  }
  const double coefficient = shared_coefficient(clip, finish(Norm::kL2, total.value()));
  if (coefficient != 1.0) {
    walk<false, kTile>(table, tiles, &tensor, [&](char* data, int64_t numel, DType dtype) {
      with_dtype<kTeam>(data, numel, dtype, [&](const auto& segment) {
        scale_by_team<kLoads, false, Streaming::kNone>(segment, coefficient);
      });
    });
  }
  if constexpr (kCluster) wait_at_cluster_barrier();
}

}  // namespace gradclip::cuda::sweep
