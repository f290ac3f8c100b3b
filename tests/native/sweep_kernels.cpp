#include "sweep_kernels.h"

#include <cstdlib>
#include <type_traits>

#include "bodies.cuh"

namespace gradclip::cuda::sweep {
namespace {

constexpr int kThreads = GRADCLIP_THREADS;

template <class Work>
void with_flag(bool flag, const Work& work) {
  if (flag) return work(std::true_type());
  work(std::false_type());
}

template <class Work>
void with_loads(int loads, const Work& work) {
  switch (loads) {
    case 2:
      return work(std::integral_constant<int, 2>());
    case 4:
      return work(std::integral_constant<int, 4>());
    case 8:
      return work(std::integral_constant<int, 8>());
    default:
      std::abort();
  }
}

}  // namespace

void measure_tiles_thread(const SweepTable& table, int step, int loads, Precision precision,
                          double* partials) {
  with_loads(loads, [&](auto in_flight) {
    with_flag(step > 0, [&](auto strided) {
      measure_tiles<kThreads, decltype(in_flight)::value, decltype(strided)::value,
                    Trigger::kFirst>(table, step, precision, partials);
    });
  });
}

void scale_tiles_thread(const SweepTable& table, int step, int loads, bool forward, bool streaming,
                        const Clip& clip) {
  with_loads(loads, [&](auto in_flight) {
    with_flag(forward, [&](auto forwards) {
      with_flag(step > 0, [&](auto strided) {
        with_flag(streaming, [&](auto streams) {
          constexpr Streaming kStreaming =
              decltype(streams)::value ? Streaming::kBoth : Streaming::kNone;
          scale_tiles<kThreads, decltype(in_flight)::value, decltype(forwards)::value,
                      decltype(strided)::value, kStreaming, false, false>(table, step, clip);
        });
      });
    });
  });
}

void scale_after_prologue_thread(const SweepTable& table, bool unrolled, bool hoisted,
                                 const Clip& clip) {
  with_flag(unrolled, [&](auto unrolls) {
    with_flag(hoisted, [&](auto hoists) {
      scale_tiles<kThreads, kLoads, false, false, Streaming::kNone, decltype(unrolls)::value,
                  decltype(hoists)::value>(table, 1, clip);
    });
  });
}

void clip_by_teams_thread(const SweepTable& table, Team team, bool in_cluster, Precision precision,
                          const Clip& clip) {
  with_flag(in_cluster, [&](auto cluster) {
    constexpr bool kCluster = decltype(cluster)::value;
    if (team == Team::kWarp) {
      clip_by_teams<kThreads, kWarpThreads, kTileOfWarp, kCluster>(table, precision, clip);
    } else {
      clip_by_teams<kThreads, kThreads, kTileOfBlock, kCluster>(table, precision, clip);
    }
  });
}

}  // namespace gradclip::cuda::sweep
