// The CPU engine without torch: any partition of the workers over any number of threads gives the
// same bits, every slot is written and none beyond the last, every element is scaled once and no
// byte around it changes. Built and run by tests/native/test_native_engine.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "core/units.h"
#include "cpu/float16.h"
#include "cpu/passes.h"

namespace gradclip {
namespace {

int checks = 0;

void check(bool condition, const char* what, int line) {
  ++checks;
  if (condition) return;
  std::printf("line %d: not true: %s\n", line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

// Elements before and after each tensor; odd, so that tensors straddle vector boundaries.
constexpr int64_t kGuard = 61;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double read(const Span& span, int64_t i) {
  switch (span.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(span.data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(span.data)[i];
    case DType::kFloat16:
      return cpu::widen(static_cast<const cpu::Float16*>(span.data)[i]);
    case DType::kBFloat16:
      return cpu::widen(static_cast<const cpu::BFloat16*>(span.data)[i]);
  }
  return kNaN;
}

void write(const Span& span, int64_t i, float value) {
  switch (span.dtype) {
    case DType::kFloat32:
      static_cast<float*>(span.data)[i] = value;
      break;
    case DType::kFloat64:
      static_cast<double*>(span.data)[i] = value;
      break;
    case DType::kFloat16:
      cpu::narrow(value, static_cast<cpu::Float16*>(span.data) + i);
      break;
    case DType::kBFloat16:
      cpu::narrow(value, static_cast<cpu::BFloat16*>(span.data) + i);
      break;
  }
}

struct Lists {
  std::vector<std::vector<char>> memory;
  std::vector<Span> spans;
};

Lists make(const std::vector<std::pair<int64_t, DType>>& shapes) {
  Lists lists;
  std::mt19937 random(1);
  // Multiples of 1/8 up to 2: halving them is exact in every dtype.
  std::uniform_int_distribution<int> eighths(-16, 16);
  for (const auto& [numel, dtype] : shapes) {
    lists.memory.emplace_back(static_cast<size_t>((numel + 2 * kGuard) * element_size(dtype)));
    char* begin = lists.memory.back().data();
    const Span all = {begin, numel + 2 * kGuard, dtype};
    for (int64_t i = 0; i < all.numel; ++i) write(all, i, 100.0f);
    const Span span = {begin + kGuard * element_size(dtype), numel, dtype};
    for (int64_t i = 0; i < numel; ++i) write(span, i, static_cast<float>(eighths(random)) / 8.0f);
    lists.spans.push_back(span);
  }
  return lists;
}

// Shares out the workers in contiguous ranges, one per thread, like torch's thread pool.
template <class Work>
void on_threads(const FlatIndex& index, int64_t threads, const Work& work) {
  const int64_t workers = cpu::worker_count(index);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    const Range range = {workers * t / threads, workers * (t + 1) / threads};
    if (range.begin < range.end) running.emplace_back([&work, range] { work(range); });
  }
  for (std::thread& thread : running) thread.join();
}

double measured(const FlatIndex& index, Norm kind, Precision precision, int64_t threads) {
  const size_t slots = static_cast<size_t>(slot_count(index.tensors(), cpu::worker_count(index)));
  std::vector<double> scratch(slots + 1, kNaN);
  on_threads(index, threads, [&](Range range) {
    cpu::power_sums(index, kind, precision, nullptr, range, scratch.data());
  });
  PowerSum total(kind);
  for (size_t i = 0; i < slots; ++i) {
    CHECK(!std::isnan(scratch[i]));
    total.add(scratch[i]);
  }
  CHECK(std::isnan(scratch[slots]));
  return total.value();
}

void test_list(const std::vector<std::pair<int64_t, DType>>& shapes) {
  Lists lists = make(shapes);
  const FlatIndex index(lists.spans);
  const Lists original = make(shapes);

  int64_t tiles = 0;
  for (const Span& span : index.spans()) tiles += tile_count(span);
  CHECK(tiles == index.tiles());
  for (int64_t tile = 0; tile < index.tiles(); ++tile) {
    const int64_t tensor = index.tensor_of(tile);
    CHECK(index.first_tile(tensor) <= tile);
    CHECK(tensor + 1 == index.tensors() || tile < index.first_tile(tensor + 1));
  }
  if (index.tiles() == 0) return;

  for (const Norm kind : {Norm::kL1, Norm::kL2, Norm::kInf}) {
    double expected = 0.0;  // eighths and their squares: exact in float64
    for (const Span& span : lists.spans) {
      for (int64_t i = 0; i < span.numel; ++i) {
        const double value = std::fabs(read(span, i));
        if (kind == Norm::kInf) {
          expected = value > expected ? value : expected;
        } else {
          expected += kind == Norm::kL2 ? value * value : value;
        }
      }
    }
    for (const Precision precision : {Precision::kFloat32, Precision::kFloat64}) {
      for (const int64_t threads : {1, 2, 3, 5, 8}) {
        CHECK(measured(index, kind, precision, threads) == expected);
      }
    }
  }

  for (const int64_t threads : {1, 3}) {
    on_threads(index, threads, [&](Range range) { cpu::scale(index, 0.5, range); });
  }
  for (size_t t = 0; t < lists.spans.size(); ++t) {
    const Span& span = lists.spans[t];
    for (int64_t i = 0; i < span.numel; ++i) {
      CHECK(read(span, i) == read(original.spans[t], i) / 4.0);
    }
  }
  on_threads(index, 2, [&](Range range) { cpu::clamp(index, 0.25, range); });
  for (size_t t = 0; t < lists.spans.size(); ++t) {
    const Span& span = lists.spans[t];
    for (int64_t i = 0; i < span.numel; ++i) {
      const double before = read(original.spans[t], i) / 4.0;
      CHECK(read(span, i) == std::fmin(0.25, std::fmax(-0.25, before)));
    }
    const int64_t size = element_size(span.dtype);
    const Span all = {lists.memory[t].data(), span.numel + 2 * kGuard, span.dtype};
    CHECK(span.data == static_cast<char*>(all.data) + kGuard * size);
    for (int64_t i = 0; i < kGuard; ++i) {
      CHECK(read(all, i) == 100.0 && read(all, all.numel - 1 - i) == 100.0);
    }
  }
}

double norm_of_row(const Span& span, int64_t first, int64_t length) {
  double sum = 0.0;  // exact: multiples of 1/64
  for (int64_t i = first; i < first + length; ++i) sum += read(span, i) * read(span, i);
  return unit_norm(sum, span.dtype);
}

// Each row is clipped once, by a coefficient of its own, whatever the number of threads; each
// gradient gets its decay once, and nothing around it changes.
void test_rows(const std::vector<std::pair<int64_t, DType>>& rows_of_shapes, int64_t length) {
  std::vector<std::pair<int64_t, DType>> shapes;
  for (const auto& [rows, dtype] : rows_of_shapes) shapes.push_back({rows * length, dtype});
  const Lists weights = make(shapes);
  const Lists original = make(shapes);
  // A power of two, so that scaling is exact where all rows have the norm of their parameter's.
  const UnitLimit limit = {0.25, 1e-3};
  for (const int64_t threads : {1, 2, 3, 8}) {
    const Lists gradients = make(shapes);
    const FlatIndex index(gradients.spans);
    std::vector<Rows> rows;
    std::vector<const void*> parameters;
    for (size_t t = 0; t < shapes.size(); ++t) {
      rows.push_back({gradients.spans[t], weights.spans[t], rows_of_shapes[t].first});
      parameters.push_back(weights.spans[t].data);
    }
    std::vector<double> smallest(static_cast<size_t>(cpu::worker_count(index)), 1.0);
    on_threads(index, threads, [&](Range range) {
      smallest[static_cast<size_t>(range.begin)] = cpu::clip_rows(index, rows.data(), limit, range);
    });
    CHECK(*std::min_element(smallest.begin(), smallest.end()) == 0.25);
    for (size_t t = 0; t < shapes.size(); ++t) {
      for (int64_t first = 0; first < shapes[t].first; first += length) {
        const double norm = norm_of_row(original.spans[t], first, length);
        const double coefficient = norm > 0.25 * std::fmax(norm, 1e-3) ? 0.25 : 1.0;
        for (int64_t i = first; i < first + length; ++i) {
          CHECK(read(gradients.spans[t], i) == read(original.spans[t], i) * coefficient);
        }
      }
    }
    on_threads(index, threads,
               [&](Range range) { cpu::add_decay(index, {0.5, parameters.data()}, range); });
    for (size_t t = 0; t < shapes.size(); ++t) {
      const Span& span = gradients.spans[t];
      for (int64_t i = 0; i < span.numel; ++i) {
        CHECK(read(span, i) == read(original.spans[t], i) * 0.75);
      }
      const Span all = {const_cast<char*>(gradients.memory[t].data()), span.numel + 2 * kGuard,
                        span.dtype};
      for (int64_t i = 0; i < kGuard; ++i) {
        CHECK(read(all, i) == 100.0 && read(all, all.numel - 1 - i) == 100.0);
      }
    }
  }
}

void test_unit_limit() {
  const UnitLimit limit = {0.5, 1e-3};
  CHECK(limit.coefficient(2.0, 4.0) == 0.25);
  CHECK(limit.coefficient(2.0, 1.0) == 1.0);
  CHECK(limit.coefficient(0.0, 1.0) == 0.5 * 1e-3);
  CHECK(limit.coefficient(2.0, kNaN) == 1.0);
  CHECK(limit.coefficient(2.0, INFINITY) == 1.0);
  CHECK(limit.coefficient(kNaN, 4.0) == 1.0);
  CHECK(limit.coefficient(INFINITY, 4.0) == 1.0);
  CHECK((UnitLimit{1e-9, 1e-3}).coefficient(0.0, 1e-7) == 1e-3 * 1e-9 / 1e-6);
}

void test_power_sum() {
  PowerSum sum(Norm::kL2);
  for (const double value : {1e16, 1.0, 1.0, -1e16}) sum.add(value);
  CHECK(sum.value() == 2.0);
  PowerSum infinite(Norm::kL1);
  infinite.add(1.0);
  infinite.add(INFINITY);
  infinite.add(2.0);
  CHECK(infinite.value() == INFINITY);
  infinite.add(kNaN);
  CHECK(std::isnan(infinite.value()));
  PowerSum largest(Norm::kInf);
  largest.add(kNaN);
  largest.add(INFINITY);
  CHECK(std::isnan(largest.value()));
}

void test_clip_coefficient() {
  CHECK(clip_coefficient(1.0, 0.5) == 1.0);
  CHECK(clip_coefficient(1.0, 4.0) == 1.0 / (4.0 + 1e-6));
  CHECK(clip_coefficient(1.0, INFINITY) == 0.0);
  CHECK(clip_coefficient(INFINITY, INFINITY) == 1.0);
  CHECK(clip_coefficient(INFINITY, kNaN) == 1.0);
  CHECK(std::isnan(clip_coefficient(1.0, kNaN)));
  CHECK(std::isnan(clip_coefficient(kNaN, 1.0)));
  CHECK(clip_coefficient(0.0, 1.0) == 0.0);
}

}  // namespace
}  // namespace gradclip

int main() {
  using gradclip::DType;
  using List = std::vector<std::pair<int64_t, DType>>;
  gradclip::test_power_sum();
  gradclip::test_clip_coefficient();
  gradclip::test_unit_limit();
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  for (const DType dtype : dtypes) {
    const int64_t tile = gradclip::tile_elements(dtype);
    for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{8}, int64_t{9},
                                int64_t{63}, int64_t{64}, int64_t{65}, int64_t{511}, int64_t{513},
                                tile - 1, tile, tile + 1, 3 * tile, 3 * tile + 5}) {
      gradclip::test_list({{numel, dtype}});
      gradclip::test_list({{numel, dtype}, {0, DType::kFloat64}, {tile, dtype}, {numel, dtype}});
    }
  }
  List many;
  for (int64_t i = 0; i < 3000; ++i) many.push_back({i % 37, dtypes[i % 4]});
  gradclip::test_list(many);
  // More tiles than workers, with borders of tensors inside and on the borders of workers.
  List large;
  for (int64_t i = 0; i < 40; ++i) {
    large.push_back(
        {gradclip::tile_elements(dtypes[i % 4]) * (i + 1) + (i % 3 == 0 ? i : 0), dtypes[i % 4]});
  }
  for (int64_t i = 0; i < 600; ++i)
    large.push_back({gradclip::tile_elements(DType::kFloat64), DType::kFloat64});
  gradclip::test_list(large);
  for (const int64_t length : {1, 2, 9, 31, 130, 1030, 5000}) {
    for (const DType dtype : dtypes) {
      gradclip::test_rows({{1, dtype}, {60, dtype}, {7, DType::kFloat32}, {3, dtype}}, length);
    }
  }
  std::printf("%d checks\n", gradclip::checks);
  return 0;
}
