// Families "scale", how the second kernel goes over its tiles, and "prologue", how it gets there.
#include <algorithm>

#include "bodies.cuh"
#include "tables.h"
#include "variants.h"

namespace gradclip::cuda::sweep {
namespace {

template <int kThreads, int kInFlight, bool kForward, bool kStrided, Streaming kStreaming>
__global__ void __launch_bounds__(kThreads, resident_threads(kInFlight) / kThreads)
    scale_tiles_kernel(GRADCLIP_GRID_CONSTANT(Table<kWideTable>) table, int step,
                       GRADCLIP_GRID_CONSTANT(Clip) clip) {
  scale_tiles<kThreads, kInFlight, kForward, kStrided, kStreaming, false, false>(table, step, clip);
}

constexpr int kThreads = 256;
constexpr int kBlocks = 6;

template <bool kUnrolled, bool kHoisted>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scale_after_prologue_kernel(GRADCLIP_GRID_CONSTANT(Table<kMediumTable>) table,
                                GRADCLIP_GRID_CONSTANT(Clip) clip) {
  scale_tiles<kThreads, kLoads, false, false, Streaming::kNone, kUnrolled, kHoisted>(table, 1,
                                                                                     clip);
}

template <Trigger kTrigger>
__global__ void __launch_bounds__(kThreads, kBlocks)
    measure_before_trigger_kernel(GRADCLIP_GRID_CONSTANT(Table<kMediumTable>) table,
                                  Precision precision, double* partials) {
  measure_tiles<kThreads, kLoads, false, kTrigger>(table, 1, precision, partials);
}

int64_t workers_of(const Job& job, int64_t chunks, int blocks) {
  return std::min(chunks, int64_t{blocks} * job.multiprocessors);
}

// A step of 0 is contiguous.
template <int kBlockThreads, int kInFlight, bool kForward, bool kStrided,
          Streaming kStreaming = Streaming::kNone>
Variant scaling(const std::string& name, int step, int blocks) {
  const auto launch = [=](const Job& job, cudaStream_t stream) -> Queued {
    if (job.index->tensors() > kWideTable) return cudaErrorNotSupported;
    Clip clip = job.clip;
    const cudaError_t error = measure_as_today(job, &clip, stream);
    if (error != cudaSuccess) return error;
    const int64_t tiles = job.index->tiles();
    const int64_t chunks = kStrided ? (tiles + step - 1) / step : tiles;
    const int64_t workers = workers_of(job, chunks, blocks);
    return with_table_of<kWideTable>(
        *job.index, kTileBytes, workers, [&](const Table<kWideTable>& table) {
          return launch_kernel(
              &scale_tiles_kernel<kBlockThreads, kInFlight, kForward, kStrided, kStreaming>,
              workers, kBlockThreads, stream, false, table, step, clip);
        });
  };
  return {name, kBlockThreads, blocks, kInFlight, launch};
}

template <bool kUnrolled, bool kHoisted>
cudaError_t scale_after_prologue(const Job& job, const Clip& clip, bool early,
                                 cudaStream_t stream) {
  const int64_t workers = workers_of(job, job.index->tiles(), kBlocks);
  return with_table_of<kMediumTable>(
      *job.index, kTileBytes, workers, [&](const Table<kMediumTable>& table) {
        return launch_kernel(&scale_after_prologue_kernel<kUnrolled, kHoisted>, workers, kThreads,
                             stream, early, table, clip);
      });
}

template <Trigger kTrigger, bool kUnrolled, bool kHoisted>
Variant prologue(const std::string& name, bool early) {
  const auto launch = [=](const Job& job, cudaStream_t stream) -> Queued {
    if (job.index->tensors() > kMediumTable) return cudaErrorNotSupported;
    const int64_t workers = workers_of(job, job.index->tiles(), kBlocks);
    const cudaError_t error = with_table_of<kMediumTable>(
        *job.index, kTileBytes, workers, [&](const Table<kMediumTable>& table) {
          return launch_kernel(&measure_before_trigger_kernel<kTrigger>, workers, kThreads, stream,
                               false, table, job.precision, job.partials);
        });
    if (error != cudaSuccess) return error;
    Clip clip = job.clip;
    clip.partials = job.partials;
    clip.count = static_cast<int32_t>(workers);
    return scale_after_prologue<kUnrolled, kHoisted>(job, clip, early, stream);
  };
  return {name, kThreads, kBlocks, kLoads, launch};
}

Variant two_launches_of_today(bool early) {
  return {kToday, kThreads, 0, kLoads, [=](const Job& job, cudaStream_t stream) -> Queued {
            return clip_as_today(job, false, early, stream);
          }};
}

}  // namespace

std::vector<Variant> scaling_variants() {
  constexpr bool kForward = true;
  constexpr bool kBackward = false;
  constexpr bool kStrided = true;
  constexpr bool kContiguous = false;
  std::vector<Variant> all = {
      two_launches_of_today(false),
      scaling<256, 4, kBackward, kContiguous>("contiguous, backward", 0, 6),
      scaling<256, 4, kForward, kContiguous>("contiguous, forward", 0, 6),
      scaling<256, 4, kBackward, kContiguous, Streaming::kLoads>("contiguous, backward, ldcs", 0,
                                                                 6),
      scaling<256, 4, kBackward, kContiguous, Streaming::kStores>("contiguous, backward, stcs", 0,
                                                                  6),
      scaling<256, 4, kBackward, kContiguous, Streaming::kBoth>("contiguous, backward, ldcs, stcs",
                                                                0, 6),
      scaling<256, 4, kForward, kContiguous, Streaming::kBoth>("contiguous, forward, ldcs, stcs", 0,
                                                               6),
  };
  for (const int step : {1, 4, 16}) {
    const std::string order = "strided by " + std::to_string(step);
    all.push_back(scaling<256, 4, kBackward, kStrided>(order + ", backward", step, 6));
    all.push_back(scaling<256, 4, kForward, kStrided>(order + ", forward", step, 6));
    all.push_back(scaling<256, 4, kBackward, kStrided, Streaming::kStores>(
        order + ", backward, stcs", step, 6));
  }
  for (const int blocks : {1, 2, 3, 4, 8, 12, 24}) {
    all.push_back(scaling<256, 4, kBackward, kContiguous>("contiguous, backward", 0, blocks));
    all.push_back(scaling<256, 4, kBackward, kStrided>("strided by 4, backward", 4, blocks));
  }
  for (const int times : {1, 2}) {
    all.push_back(scaling<128, 4, kBackward, kContiguous>("contiguous, backward", 0, 12 * times));
    all.push_back(scaling<512, 4, kBackward, kContiguous>("contiguous, backward", 0, 3 * times));
    all.push_back(scaling<256, 2, kBackward, kContiguous>("contiguous, backward", 0, 8 * times));
    all.push_back(scaling<256, 8, kBackward, kContiguous>("contiguous, backward", 0, 4 * times));
  }
  return all;
}

std::vector<Variant> prologue_variants() {
  Variant early = two_launches_of_today(true);
  Variant plain = two_launches_of_today(false);
  plain.name = "today's, not early";
  return {
      early,
      plain,
      prologue<Trigger::kNever, false, false>("plain", false),
      prologue<Trigger::kNever, false, false>("early", true),
      prologue<Trigger::kNever, true, false>("early, unrolled", true),
      prologue<Trigger::kNever, false, true>("early, hoisted", true),
      prologue<Trigger::kNever, true, true>("early, unrolled, hoisted", true),
      prologue<Trigger::kFirst, false, false>("early, trigger at the start", true),
      prologue<Trigger::kFirst, true, true>("early, trigger at the start, unrolled, hoisted", true),
      prologue<Trigger::kLast, true, true>("early, trigger at the end, unrolled, hoisted", true),
      prologue<Trigger::kNever, true, true>("unrolled, hoisted, not early", false),
  };
}

}  // namespace gradclip::cuda::sweep
