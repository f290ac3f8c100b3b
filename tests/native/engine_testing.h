// What the tests of the CPU engine share: lists of tensors with guards around them, and their sums
// on several threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "cpu/float16.h"
#include "cpu/passes.h"

namespace gradclip {

inline int checks = 0;

inline void check(bool condition, const char* what, const char* file, int line) {
  ++checks;
  if (condition) return;
  std::printf("%s:%d: not true: %s\n", file, line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __FILE__, __LINE__)

// Elements before and after each tensor; odd, so that tensors straddle vector boundaries.
inline constexpr int64_t kGuard = 61;
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline double read(const Span& span, int64_t i) {
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

inline void write(const Span& span, int64_t i, float value) {
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

inline Lists make(const std::vector<std::pair<int64_t, DType>>& shapes) {
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

// Shares out the tiles in contiguous ranges, one per thread, like torch's thread pool. With 0
// threads the caller does them all, one after another.
template <class Work>
void on_threads(const FlatIndex& index, int64_t threads, const Work& work) {
  if (threads == 0) {
    for (int64_t tile = 0; tile < index.tiles(); ++tile) work(Range{tile, tile + 1});
    return;
  }
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    const Range range = {index.tiles() * t / threads, index.tiles() * (t + 1) / threads};
    if (range.begin < range.end) running.emplace_back([&work, range] { work(range); });
  }
  for (std::thread& thread : running) thread.join();
}

inline std::vector<double> sums_of_tiles(const FlatIndex& index, Norm kind, Precision precision,
                                         const Decay* decay, int64_t threads) {
  const size_t tiles = static_cast<size_t>(index.tiles());
  std::vector<double> sums(tiles + 1, kNaN);
  on_threads(index, threads, [&](Range range) {
    cpu::power_sums(index, kind, precision, decay, range, sums.data());
  });
  for (size_t i = 0; i < tiles; ++i) CHECK(!std::isnan(sums[i]));
  CHECK(std::isnan(sums[tiles]));
  sums.pop_back();
  return sums;
}

inline double measured(const FlatIndex& index, Norm kind, Precision precision, int64_t threads) {
  const std::vector<double> sums = sums_of_tiles(index, kind, precision, nullptr, threads);
  PowerSum total(kind);
  for (const double sum : sums) total.add(sum);
  CHECK(cpu::total_power_sum(kind, sums) == total.value());
  return total.value();
}

// In test_engine_numbers.cpp.
void test_numbers();

}  // namespace gradclip
