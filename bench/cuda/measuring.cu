// Family "order": who measures which tiles, with how many threads, blocks and loads in flight.
#include <algorithm>

#include "bodies.cuh"
#include "tables.h"
#include "variants.h"

namespace gradclip::cuda::sweep {
namespace {

template <int kThreads, int kInFlight, bool kStrided>
__global__ void __launch_bounds__(kThreads, resident_threads(kInFlight) / kThreads)
    measure_tiles_kernel(GRADCLIP_GRID_CONSTANT(Table<kWideTable>) table, int step,
                         Precision precision, double* partials) {
  measure_tiles<kThreads, kInFlight, kStrided, Trigger::kNever>(table, step, precision, partials);
}

template <int kThreads, int kInFlight, bool kStrided>
Queued measure(const Job& job, int step, int blocks, cudaStream_t stream) {
  if (job.index->tensors() > kWideTable) return cudaErrorNotSupported;
  const int64_t chunks = kStrided ? (job.index->tiles() + step - 1) / step : job.index->tiles();
  const int64_t workers = std::min(chunks, int64_t{blocks} * job.multiprocessors);
  const auto launch = [&](const Table<kWideTable>& table) {
    return launch_kernel(&measure_tiles_kernel<kThreads, kInFlight, kStrided>, workers, kThreads,
                         stream, false, table, step, job.precision, job.partials);
  };
  return {with_table_of<kWideTable>(*job.index, kTileBytes, workers, launch), workers};
}

// A step of 0 is contiguous.
template <int kThreads, int kInFlight>
Variant variant(int step, int blocks) {
  const auto launch = [=](const Job& job, cudaStream_t stream) {
    return step == 0 ? measure<kThreads, kInFlight, false>(job, step, blocks, stream)
                     : measure<kThreads, kInFlight, true>(job, step, blocks, stream);
  };
  const std::string order = step == 0 ? "contiguous" : "strided by " + std::to_string(step);
  return {order, kThreads, blocks, kInFlight, launch};
}

}  // namespace

std::vector<Variant> measuring_variants() {
  std::vector<Variant> all;
  all.push_back({kToday, 256, 0, 4, [](const Job& job, cudaStream_t stream) {
                   Clip clip = job.clip;
                   const cudaError_t error = measure_as_today(job, &clip, stream);
                   return Queued(error, clip.count);
                 }});
  constexpr int kOrders[] = {0, 1, 4, 16};
  for (const int step : kOrders) {
    for (const int blocks : {1, 2, 3, 4, 5, 6, 8, 12, 16, 24}) {
      all.push_back(variant<256, 4>(step, blocks));
    }
  }
  // These interact: loads take registers, and so decide how many threads are resident.
  for (const int step : {0, 4}) {
    for (const int times : {1, 2, 4}) {
      all.push_back(variant<128, 2>(step, 16 * times));
      all.push_back(variant<128, 4>(step, 12 * times));
      all.push_back(variant<128, 8>(step, 8 * times));
      all.push_back(variant<256, 2>(step, 8 * times));
      all.push_back(variant<256, 8>(step, 4 * times));
      all.push_back(variant<512, 2>(step, 4 * times));
      all.push_back(variant<512, 4>(step, 3 * times));
      all.push_back(variant<512, 8>(step, 2 * times));
    }
  }
  return all;
}

}  // namespace gradclip::cuda::sweep
