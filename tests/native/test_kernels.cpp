// The bodies of the CUDA kernels, run on the CPU by emulation.h: an emulation and never a test on a
// GPU. Any schedule gives the same bits, norms and elements are right, every slot is written, no
// byte outside of a tensor changes, and nothing is read before it is complete. Built and run by
// tests/test_cuda_kernels.py.
#include "test_kernels.h"

#include <sched.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernel_testing.h"

namespace gradclip::cuda {
namespace {

struct Case {
  List list;
  std::function<Values()> values;
  Norm kind = Norm::kL2;
  Precision precision = Precision::kFloat32;
  int64_t workers = 3;
  // Of max_norm to the norm.
  double ratio = 0.37;
};

// Everything that a case leaves behind.
struct Outcome {
  Results partials;
  Results slots;
  Results norms;
  double power_sum;
  std::vector<char> gradients;

  bool operator==(const Outcome& other) const {
    return partials == other.partials && slots == other.slots && norms == other.norms &&
           bits(power_sum) == bits(other.power_sum) && gradients == other.gradients;
  }
};

// Measures and scales. The scaling kernel starts early: it has reached its wait before
// the measuring one begins.
Outcome clipped(const Case& one, Schedule schedule) {
  const Gradients before(one.list, one.values());
  Gradients gradients(one.list, one.values());
  const double expected = norm_of(before, one.kind);
  const double max_norm = std::isfinite(expected) ? one.ratio * expected : 1.0;

  const std::vector<SmallTable> tables = tables_of(gradients.index(), one.workers);
  const int32_t workers = workers_of(tables);
  const int64_t tensors = gradients.index().tensors();
  Outcome outcome = {
      Results(workers), Results(slot_count(tensors, workers)), Results(tensors), kPoison, {}};
  const DType dtype = one.precision == Precision::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  NormResult norm_result(dtype);
  const Clip clip = clip_of(one.kind, outcome.partials.to_read(), workers, max_norm, &norm_result);
  // A launch that starts early is the first of several.
  const SmallTable& first = tables.front();
  const emulation::Launch launch = {first.workers, kThreads, /*early=*/true};
  Grid scale(launch, schedule, [&] { scale_thread(first, clip); });
  const std::vector<char> bytes = gradients.bytes();
  scale.run_to_wait();
  CHECK(gradients.bytes() == bytes);
  CHECK(norm_result.is_untouched_from(0));

  run_power_sums(tables, one.kind, one.precision, schedule, &outcome.partials, &outcome.slots);
  CHECK(gradients.bytes() == bytes);
  Results partials(workers);
  run_power_sums(tables, one.kind, one.precision, schedule, &partials, nullptr);
  CHECK(partials == outcome.partials);

  // On a GPU nothing runs between the two; here it allows both to be compared.
  NormResult finished(dtype);
  outcome.power_sum =
      run_finish(one.kind, outcome.partials, workers, dtype, finished.place(), schedule);
  const double norm = finish(one.kind, outcome.power_sum);
  CHECK(is_close_norm(norm, expected, one.precision));
  CHECK(is_same(finished.get(), rounded(norm, dtype)));
  CHECK(finished.has_only_norm());

  // The last tensor's norm first.
  std::vector<int64_t> positions;
  for (int64_t t = 0; t < tensors; ++t) positions.push_back(tensors - 1 - t);
  const std::vector<SmallBorderTable> borders =
      tables_of<SmallBorderTable>(gradients.index(), one.workers, positions);
  outcome.norms = run_tensor_norms(borders, tensors, one.kind, outcome.slots, schedule);
  for (size_t t = 0; t < one.list.size(); ++t) {
    const double of_tensor = root(one.kind, power_sum_of(before, t, one.kind));
    CHECK(is_close_norm(outcome.norms.to_read()[positions[t]], of_tensor, one.precision));
  }

  scale.run();
  run_scale({tables.begin() + 1, tables.end()}, clip, schedule);
  CHECK(is_same(norm_result.get(), rounded(norm, dtype)));
  CHECK(norm_result.has_only_norm());
  CHECK(is_scaled(gradients, before, clip_coefficient(max_norm, norm)));
  outcome.gradients = gradients.bytes();
  return outcome;
}

void test_on_every_schedule(const Case& one) {
  const Outcome outcome = clipped(one, kSchedules[0]);
  for (size_t s = 1; s < std::size(kSchedules); ++s) {
    CHECK(clipped(one, kSchedules[s]) == outcome);
  }
}

Values signed_values() { return random_values(1.0); }

// Sizes around each border that the kernels know.
void test_sizes() {
  int64_t turn = 0;
  for (const DType dtype : kDTypes) {
    const int64_t tile = tile_elements(dtype);
    const int64_t vector = 16 / element_size(dtype);
    // What a block reads at once.
    const int64_t group = 4 * kThreads * vector;
    std::vector<int64_t> sizes = {1,         vector - 1,   vector,       vector + 1,  31,
                                  32,        33,           255,          256,         257,
                                  group - 1, group,        group + 1,    tile - 1,    tile,
                                  tile + 1,  2 * tile - 1, 3 * tile + 1, 5 * tile + 3};
    if (quick) sizes = {vector - 1, 33, group + 1, tile + 1, 3 * tile + 1};
    for (const int64_t numel : sizes) {
      for (const int64_t offset : {int64_t{1}, int64_t{0}, vector - 1}) {
        if (quick && offset != 1) continue;
        const List list = {{numel, dtype, offset}};
        subject = name_of(list);
        for (const Norm kind : kNorms) {
          // Each norm meets each schedule, precision and number of workers, but not all at once.
          ++turn;
          Case one = {list, signed_values, kind};
          one.precision = precision_of(turn % 2 == 0);
          one.workers = 1 + turn % 7;
          clipped(one, kSchedules[static_cast<size_t>(turn) % std::size(kSchedules)]);
        }
      }
    }
  }
}

// Lists of several tensors: borders of tensors within and on borders of workers and of launches.
void test_lists() {
  const auto bytes = [](int64_t tiles, DType dtype) { return tiles * tile_elements(dtype); };
  List single_tiles;
  List pairs_of_tiles;
  List mixed;
  for (int64_t i = 0; i < 12; ++i) {
    const DType dtype = kDTypes[i % 4];
    single_tiles.push_back({bytes(1, dtype), dtype});
    if (i < 7) pairs_of_tiles.push_back({bytes(2, dtype), dtype, i % 2});
    mixed.push_back({1 + 977 * (i % 5) * i, dtype, i % 3});
  }
  const std::vector<List> lists = {
      {{1, DType::kFloat32}, {1, DType::kFloat64}, {1, DType::kFloat16}, {1, DType::kBFloat16}},
      {{bytes(3, DType::kFloat32) + 1, DType::kFloat32, 1}, {7, DType::kFloat32, 2}},
      {{5, DType::kBFloat16, 5}, {bytes(6, DType::kBFloat16) - 1, DType::kBFloat16, 3}},
      single_tiles,
      pairs_of_tiles,
      mixed,
  };
  size_t turn = 0;
  for (const List& list : lists) {
    subject = name_of(list);
    for (const int64_t workers : {1, 2, 3, 4, 5, 6, 7}) {
      ++turn;
      if (quick && workers != 3 && workers != 4) continue;
      test_on_every_schedule(
          {list, signed_values, kNorms[turn % 3], precision_of(turn % 2 == 0), workers});
    }
  }
}

// Sums that float32 cannot hold, and such that it could but only in part.
void test_magnitudes() {
  const auto same = [](double value) {
    return [value] { return Values([value](int64_t, int64_t) { return value; }); };
  };
  // Zeros, vanishing squares, and few numbers in between.
  const auto sparse = [](double tiny, int64_t stride) {
    return [tiny, stride] {
      return Values([tiny, stride](int64_t, int64_t i) {
        return i % stride == 0 ? tiny : (i % (7 * stride) == 3 ? -tiny : 0.0);
      });
    };
  };
  for (const DType dtype : kDTypes) {
    const int64_t tile = tile_elements(dtype);
    const List list = {{2 * tile + 13, dtype, 1}, {tile / 2, dtype}};
    std::vector<std::function<Values()>> all = {
        same(0.0), same(1.0), same(1.1), same(-0.7), sparse(1.0, 11), sparse(6e-8, 5), [] {
          return random_values(1.0);
        }};
    if (dtype != DType::kFloat16) {
      for (const double magnitude : {1e22, 1e-25}) {
        all.push_back([magnitude] { return random_values(magnitude); });
        all.push_back(same(magnitude));
        all.push_back(sparse(magnitude, 3));
        all.push_back(sparse(magnitude, 1000));
      }
      // From where squares are held to where they are not.
      all.push_back([] {
        return Values(
            [](int64_t, int64_t i) { return std::ldexp(1.3, static_cast<int>(-i % 90)); });
      });
      if (dtype != DType::kFloat64) all.push_back(same(3e38));
    } else {
      all.push_back(same(65504.0));
    }
    for (size_t v = 0; v < all.size(); ++v) {
      subject = name_of(list) + "values " + std::to_string(v);
      for (const Norm kind : kNorms) {
        for (const Precision precision : {Precision::kFloat32, Precision::kFloat64}) {
          if (quick && precision == Precision::kFloat64) continue;
          clipped({list, all[v], kind, precision, 3}, kSchedules[v % std::size(kSchedules)]);
        }
      }
    }
  }
}

// Values whose roundings in float32 all go in one direction: what each sum of a run adds to the
// first number is half a unit of its last place, and is lost. The error comes up to what Precision
// allows, and not above it.
void test_bad_lists() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const int64_t vector = 16 / element_size(dtype);
    const List list = {{3 * 4 * kThreads * vector, dtype}};
    subject = name_of(list);
    for (const Norm kind : {Norm::kL1, Norm::kL2}) {
      const bool is_rounded_square = kind == Norm::kL2 && dtype == DType::kFloat32;
      const double number = is_rounded_square ? 1.0 + 0x1p-12 : 1.0;
      const double lost = kind == Norm::kL2 ? 0x1p-12 : 0x1p-24;
      const Values values = [&](int64_t, int64_t i) {
        const int64_t place = i % vector;
        const bool is_first = i / (kThreads * vector) % 4 == 0;
        if (place == 0) return is_first ? number : lost;
        // What is folded into the first sum.
        return is_first && (place & (place - 1)) == 0 ? lost : 0.0;
      };
      const Gradients gradients(list, values);
      const std::vector<SmallTable> tables = tables_of(gradients.index(), 1);
      const int workers = workers_of(tables);
      Results partials(workers);
      run_power_sums(tables, kind, Precision::kFloat32, kSchedules[0], &partials, nullptr);
      double sum = 0.0;
      for (int worker = 0; worker < workers; ++worker) sum += partials.to_read()[worker];
      const long double exact = power_sum_of(gradients, 0, kind);
      const double error = static_cast<double>((exact - sum) / exact) * 0x1p24;
      // Three in the chain, one for each halving of the sums, one of the square.
      const double roundings = (dtype == DType::kFloat32 ? 5.0 : 6.0) + is_rounded_square;
      CHECK(error <= roundings && error > 0.99 * roundings);
    }
  }
}

// A number that is not finite reaches norm and elements from wherever it is.
void test_not_finite() {
  size_t turn = 0;
  for (const DType dtype : kDTypes) {
    const int64_t tile = tile_elements(dtype);
    const List list = {{33, dtype, 1}, {2 * tile + 5, dtype, 1}, {17, dtype}};
    for (const double bad : {kNaN, kInfinity, -kInfinity}) {
      const std::vector<std::pair<int64_t, int64_t>> places = {
          {0, 0}, {1, 0}, {1, tile}, {1, 2 * tile + 4}, {2, 16}};
      for (const auto& place : places) {
        ++turn;
        const Values values = [&place, bad](int64_t tensor, int64_t i) {
          return tensor == place.first && i == place.second ? bad : 0.5;
        };
        for (const Norm kind : kNorms) {
          if (quick && static_cast<size_t>(kind) != turn % 3) continue;
          subject = name_of(list) + std::to_string(bad);
          const Case one = {list, [&values] { return values; }, kind,
                            precision_of(place.second == 0), 4};
          const Schedule schedule = kSchedules[(static_cast<size_t>(kind) + 1) % 4];
          const Outcome outcome = clipped(one, schedule);
          CHECK(std::isnan(bad) ? std::isnan(outcome.power_sum) : outcome.power_sum == kInfinity);
          // As torch: NaN spreads to all elements, infinity makes itself NaN and all others 0.
          const Gradients gradients(list, values);
          const std::vector<SmallTable> tables = tables_of(gradients.index(), one.workers);
          run_scale(tables,
                    clip_of(kind, outcome.partials.to_read(), workers_of(tables), 1.0, nullptr),
                    schedule);
          for (size_t t = 0; t < list.size(); ++t) {
            for (int64_t i = 0; i < list[t].numel; ++i) {
              const bool is_bad = static_cast<int64_t>(t) == place.first && i == place.second;
              const double value = gradients.get(t, i);
              CHECK(is_bad || std::isnan(bad) ? std::isnan(value) : value == 0.0);
            }
          }
          CHECK(gradients.guards_are_intact());
        }
      }
    }
  }
}

// What the emulation itself has to find. Each of these ends the program.
int break_a_rule(const std::string& rule) {
  const bool is_early = rule.rfind("early", 0) == 0;
  const double number = 0.0;
  Grid grid({2, kThreads, is_early}, kSchedules[0], [&] {
    const unsigned thread = threadIdx.x;
    if (rule == "barrier that a thread leaves out") {
      if (thread != 5) __syncthreads();
    } else if (rule == "shuffle that a thread leaves out") {
      if (thread != 5) shuffle_down(1.0, 1);
    } else if (rule == "shuffle beside a barrier") {
      if (thread < 5) {
        __syncthreads();
      } else {
        shuffle_down(1.0, 1);
      }
    } else if (rule == "shuffles of different offsets") {
      shuffle_down(1.0, thread == 5 ? 2 : 1);
    } else if (rule == "early exit of a thread") {
      if (thread != 5) wait_for_previous_kernel();
    } else if (rule == "early exit of a block") {
      if (blockIdx.x == 0) wait_for_previous_kernel();
    } else if (rule == "early load of a result") {
      load_result(&number);
      wait_for_previous_kernel();
    }
  });
  if (is_early) grid.run_to_wait();
  grid.run();
  std::printf("nobody noticed\n");
  return 0;
}

int test_all() {
  test_lists();
  test_sizes();
  test_magnitudes();
  test_bad_lists();
  test_not_finite();
  test_quiet();
  test_given_numbers();
  test_given_dtypes();
  test_tiny_coefficients();
  test_one_block();
  test_scale_each();
  test_clamp();
  test_clip_rows();
  test_finish();
  std::printf("%lld checks\n", static_cast<long long>(checks));
  return 0;
}

}  // namespace
}  // namespace gradclip::cuda

int main(int argc, char** argv) {
  // One thread runs at a time, and hands on faster to one on the same processor.
  cpu_set_t processor;
  CPU_ZERO(&processor);
  CPU_SET(sched_getcpu(), &processor);
  sched_setaffinity(0, sizeof processor, &processor);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--break") return gradclip::cuda::break_a_rule(argv[2]);
  gradclip::cuda::quick = mode == "--quick";
  return gradclip::cuda::test_all();
}
