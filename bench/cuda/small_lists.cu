// Family "small": lists for which a second launch may cost more than more blocks gain.
#include "bodies.cuh"
#include "tables.h"
#include "variants.h"

namespace gradclip::cuda::sweep {
namespace {

// A run of a warp, and about one of a block: smaller tiles would leave loads unused.
constexpr int kTileOfWarp = 2 * 1024;
constexpr int kTileOfBlock = 16 * 1024;
// Beyond this a single block takes longer than all others together.
constexpr int64_t kMostOfOneBlock = 4 << 20;

template <int kThreads, int kTeam, int kTile, bool kCluster, class AnyTable>
__global__ void __launch_bounds__(kThreads)
    clip_by_teams_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, Precision precision,
                         GRADCLIP_GRID_CONSTANT(Clip) clip) {
  clip_by_teams<kThreads, kTeam, kTile, kCluster>(table, precision, clip);
}

template <int kThreads, int kTeam>
Variant by_teams(const std::string& name, int blocks) {
  constexpr int kTile = kTeam == kWarpThreads ? kTileOfWarp : kTileOfBlock;
  const auto launch = [=](const Job& job, cudaStream_t stream) -> Queued {
    if (blocks == 1 && job.index->bytes() > kMostOfOneBlock) return cudaErrorNotSupported;
    return with_fitting_table(*job.index, kTile, blocks, [&](const auto& table) {
      using AnyTable = std::decay_t<decltype(table)>;
      if (blocks == 1) {
        return launch_kernel(&clip_by_teams_kernel<kThreads, kTeam, kTile, false, AnyTable>, 1,
                             kThreads, stream, false, table, job.precision, job.clip);
      }
      return launch_cluster(&clip_by_teams_kernel<kThreads, kTeam, kTile, true, AnyTable>, blocks,
                            kThreads, stream, table, job.precision, job.clip);
    });
  };
  const auto prepare = [=]() -> cudaError_t {
    if (blocks == 1) return cudaSuccess;
    // The kernels for tables of every size.
    const auto allow = [&](auto... tables) {
      cudaError_t error = cudaSuccess;
      (void)((error = allow_cluster(
                  &clip_by_teams_kernel<kThreads, kTeam, kTile, true, decltype(tables)>, blocks,
                  kThreads),
              error == cudaSuccess) &&
             ...);
      return error;
    };
    return allow(Table<kSmallTable>(), Table<kMediumTable>(), Table<kWideTable>(),
                 Table<kLargeTable>());
  };
  return {name, kThreads, blocks, kLoads, launch, prepare};
}

}  // namespace

std::vector<Variant> small_list_variants() {
  const auto today = [](const Job& job, cudaStream_t stream) -> Queued {
    return clip_as_today(job, takes_one_block_today(*job.index), true, stream);
  };
  const auto one_block = [](const Job& job, cudaStream_t stream) -> Queued {
    // The engine has this kernel for the smallest table alone.
    if (job.index->tensors() > kSmallTable || job.index->bytes() > kMostOfOneBlock) {
      return cudaErrorNotSupported;
    }
    return clip_as_today(job, true, false, stream);
  };
  const auto two_launches = [](bool early) {
    return [=](const Job& job, cudaStream_t stream) -> Queued {
      return clip_as_today(job, false, early, stream);
    };
  };
  std::vector<Variant> all = {
      {kToday, 0, 0, kLoads, today},
      {"one block of today", 512, 1, kLoads, one_block},
      {"two launches, early", 256, 0, kLoads, two_launches(true)},
      {"two launches, not early", 256, 0, kLoads, two_launches(false)},
      by_teams<512, 512>("one block", 1),
      by_teams<512, kWarpThreads>("warps", 1),
      by_teams<1024, kWarpThreads>("warps", 1),
  };
  for (const int blocks : {4, 8, 16}) {
    all.push_back(by_teams<512, 512>("cluster of blocks", blocks));
    all.push_back(by_teams<512, kWarpThreads>("cluster of warps", blocks));
    all.push_back(by_teams<1024, kWarpThreads>("cluster of warps", blocks));
  }
  return all;
}

}  // namespace gradclip::cuda::sweep
