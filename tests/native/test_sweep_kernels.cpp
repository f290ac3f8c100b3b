// The bodies of the sweep's variants on the CPU, in the emulation: whatever the knobs, the norm is
// that of a reference in long double, every gradient is scaled once by the coefficient of the norm
// that was found, and nothing else is written. Built and run by test_sweep.py, also with mistakes
// in the bodies.
#include <sched.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "kernel_testing.h"
#include "sweep_kernels.h"

namespace gradclip::cuda::sweep {
namespace {

SweepTable table_of(const Gradients& gradients, int64_t tile_bytes, int64_t workers) {
  SweepTable table;
  std::memset(&table, 0x77, sizeof table);
  fill(gradients.index(), tile_bytes, workers, &table);
  return table;
}

std::vector<List> lists() {
  List many = small_mixed_list();
  for (int64_t i = 0; i < 30; ++i) {
    many.push_back({1 + 53 * i, kDTypes[i % 4], i % 2});
  }
  return {many,
          small_mixed_list(),
          {{1, DType::kFloat32}},
          {{9 * tile_elements(DType::kFloat32) + 3, DType::kFloat32, 1}},
          {{2 * tile_elements(DType::kBFloat16) + 9, DType::kBFloat16, 1}, {3, DType::kFloat64}}};
}

// Numbers whose squares leave the range of float32, so that they are read again.
double extreme(int64_t tensor, int64_t i) {
  return i % 700 == 699 ? (tensor % 2 == 0 ? 1e25 : 1e-30) : static_cast<double>(i % 7) - 3.0;
}

void test_order() {
  for (const List& list : lists()) {
    const Gradients gradients(list, random_values(1.0));
    const double expected = norm_of(gradients, Norm::kL2);
    const std::vector<char> bytes = gradients.bytes();
    for (const int step : {0, 1, 3, 16}) {
      for (const int loads : {2, 4, 8}) {
        for (const int64_t workers : {1, 3, 7}) {
          subject = "step " + std::to_string(step) + ", loads " + std::to_string(loads) + ", " +
                    std::to_string(workers) + " workers, " + name_of(list);
          const SweepTable table = table_of(gradients, kTileOfBlock, workers);
          Results partials(workers);
          const Schedule schedule = kSchedules[(workers + loads) % 4];
          Grid({table.workers, kThreads}, schedule, [&] {
            measure_tiles_thread(table, step, loads, Precision::kFloat32, partials.to_write());
          }).run();
          partials.publish();
          CHECK(partials.is_complete());
          long double sum = 0.0L;
          for (int64_t i = 0; i < workers; ++i) sum += partials.to_read()[i];
          CHECK(is_close_norm(root(Norm::kL2, sum), expected, Precision::kFloat32));
        }
      }
    }
    CHECK(gradients.bytes() == bytes);
    if (quick) break;
  }
  for (const int loads : {2, 4, 8}) {
    subject = "numbers out of range, loads " + std::to_string(loads);
    List list = small_mixed_list();
    list.erase(list.begin() + 2);
    const Gradients gradients(list, extreme);
    const SweepTable table = table_of(gradients, kTileOfBlock, 2);
    Results partials(2);
    Grid({2, kThreads}, kSchedules[0], [&] {
      measure_tiles_thread(table, 4, loads, Precision::kFloat32, partials.to_write());
    }).run();
    partials.publish();
    const long double sum = static_cast<long double>(partials.to_read()[0]) + partials.to_read()[1];
    CHECK(is_close_norm(root(Norm::kL2, sum), norm_of(gradients, Norm::kL2), Precision::kFloat32));
  }
}

// The power sum in as many partials, which appear only once the previous kernel has ended.
template <class Launch>
void check_scaling(const List& list, int64_t workers, double ratio, const Launch& launch) {
  const Gradients before(list, random_values(1.0));
  const Gradients gradients(list, random_values(1.0));
  const SweepTable table = table_of(gradients, kTileOfBlock, workers);
  const double norm = norm_of(before, Norm::kL2);
  // More than a thread adds up at once.
  const int count = 5 * kThreads + 3;
  Results partials(count);
  NormResult result(DType::kFloat64);
  const Clip clip = clip_of(Norm::kL2, partials.to_read(), count, ratio * norm, &result);
  Grid grid({table.workers, kThreads, /*early=*/true}, kSchedules[workers % 4],
            [&] { launch(table, clip); });
  grid.run_to_wait();
  for (int i = 0; i < count; ++i) partials.to_write()[i] = norm * norm / count;
  partials.publish();
  grid.run();
  CHECK(is_close(result.get(), norm));
  CHECK(is_scaled(gradients, before, clip_coefficient(ratio * norm, result.get())));
}

void test_scaling() {
  for (const List& list : lists()) {
    for (const int64_t workers : {1, 3, 7}) {
      for (int knobs = 0; knobs < 16; ++knobs) {
        const int step = knobs % 4 == 0 ? 0 : knobs % 4 + 1;
        const int loads = 2 << (knobs + workers) % 3;
        const double ratio = knobs == 5 ? 2.0 : knobs == 7 ? 1e-33 : 0.3;
        const bool forward = (knobs & 4) != 0;
        const bool streaming = (knobs & 8) != 0;
        subject = "scale, step " + std::to_string(step) + ", loads " + std::to_string(loads) +
                  ", " + std::to_string(workers) + " workers, " + name_of(list);
        check_scaling(list, workers, ratio, [&](const SweepTable& table, const Clip& clip) {
          scale_tiles_thread(table, step, loads, forward, streaming, clip);
        });
        if (knobs >= 4) continue;
        subject += " prologue";
        check_scaling(list, workers, 0.3, [&](const SweepTable& table, const Clip& clip) {
          scale_after_prologue_thread(table, (knobs & 1) != 0, (knobs & 2) != 0, clip);
        });
      }
    }
    if (quick) break;
  }
}

void test_teams() {
  for (const List& list : lists()) {
    for (const Team team : {Team::kBlock, Team::kWarp}) {
      for (const int blocks : {1, 2, 4, 8, 16}) {
        for (const double ratio : {0.3, 2.0, 1e-33}) {
          subject = std::to_string(blocks) + " blocks of " +
                    (team == Team::kWarp ? "warps, " : "one team, ") + name_of(list);
          const Gradients before(list, random_values(1.0));
          const double expected = norm_of(before, Norm::kL2);
          double first = kPoison;
          for (const Schedule& schedule : kSchedules) {
            const Gradients gradients(list, random_values(1.0));
            const SweepTable table =
                table_of(gradients, team == Team::kWarp ? kTileOfWarp : kTileOfBlock, blocks);
            NormResult result(DType::kFloat64);
            const Clip clip = clip_of(Norm::kL2, nullptr, 0, ratio * expected, &result);
            Grid({blocks, kThreads}, schedule, [&] {
              clip_by_teams_thread(table, team, blocks > 1, Precision::kFloat32, clip);
            }).run();
            const double actual = result.get();
            CHECK(is_close_norm(actual, expected, Precision::kFloat32));
            CHECK(is_scaled(gradients, before, clip_coefficient(ratio * expected, actual)));
            CHECK(is_poison(first) || bits(first) == bits(actual));
            first = actual;
            if (quick) break;
          }
        }
      }
    }
    if (quick) break;
  }
}

}  // namespace
}  // namespace gradclip::cuda::sweep

int main(int argc, char** argv) {
  // One thread runs at a time, and hands on faster to one on the same processor.
  cpu_set_t processor;
  CPU_ZERO(&processor);
  CPU_SET(sched_getcpu(), &processor);
  sched_setaffinity(0, sizeof processor, &processor);
  gradclip::cuda::quick = argc > 1 && std::string(argv[1]) == "--quick";
  gradclip::cuda::sweep::test_order();
  gradclip::cuda::sweep::test_scaling();
  gradclip::cuda::sweep::test_teams();
  std::printf("%lld checks\n", static_cast<long long>(gradclip::cuda::checks));
  return 0;
}
