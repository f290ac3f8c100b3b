// The CPU engine without torch: any partition of the tiles over any number of threads gives the
// same bits, the sum of every tile is written and none beyond the last, every element is scaled
// once and no byte around it changes. Built and run by tests/native/test_native_engine.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "core/duplicates.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "core/overlap.h"
#include "core/span.h"
#include "core/units.h"
#include "cpu/passes.h"
#include "engine_testing.h"

namespace gradclip {
namespace {

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

// Whatever the numbers, the bits do not depend on how tiles are shared out, and so not on which of
// them are visited side by side.
void test_bits(const std::vector<std::pair<int64_t, DType>>& shapes) {
  Lists lists = make(shapes);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const Span& span : lists.spans) {
    for (int64_t i = 0; i < span.numel; ++i) write(span, i, normal(random));
  }
  const FlatIndex index(lists.spans);
  const std::vector<std::vector<char>> original = lists.memory;
  std::vector<double> coefficients;
  for (int64_t i = 0; i < index.tensors(); ++i) {
    // Some tensors stay as they are, and some are cleared.
    coefficients.push_back(i % 7 == 3   ? 1.0
                           : i % 7 == 5 ? 0.0
                                        : 0.3 + 0.01 * static_cast<double>(i));
  }
  Lists other = make(shapes);
  std::vector<const void*> parameters;
  const FlatIndex values(other.spans);
  for (const Span& span : values.spans()) parameters.push_back(span.data);
  const Decay decay = {0.3, parameters.data()};

  struct Bits {
    std::vector<std::vector<double>> sums;
    std::vector<std::vector<std::vector<char>>> memory;
  };
  const auto bits_on = [&](int64_t threads) {
    Bits bits;
    for (const Norm kind : {Norm::kL1, Norm::kL2, Norm::kInf}) {
      for (const Precision precision : {Precision::kFloat32, Precision::kFloat64}) {
        bits.sums.push_back(sums_of_tiles(index, kind, precision, nullptr, threads));
      }
    }
    const auto written = [&](const auto& write) {
      on_threads(index, threads, write);
      bits.memory.push_back(lists.memory);
      for (size_t t = 0; t < original.size(); ++t) {
        std::copy(original[t].begin(), original[t].end(), lists.memory[t].begin());
      }
    };
    written([&](Range tiles) { cpu::scale(index, 0.37, tiles); });
    written([&](Range tiles) { cpu::scale(index, 1e-33, tiles); });
    written([&](Range tiles) { cpu::scale_each(index, coefficients.data(), tiles); });
    written([&](Range tiles) { cpu::clamp(index, 0.7, tiles); });
    written([&](Range tiles) { cpu::add_decay(index, decay, tiles); });
    written([&](Range tiles) {
      std::vector<double> sums(static_cast<size_t>(index.tiles()));
      cpu::power_sums(index, Norm::kL2, Precision::kFloat32, &decay, tiles, sums.data());
    });
    return bits;
  };
  const Bits expected = bits_on(0);  // nothing side by side
  for (const int64_t threads : {1, 3, 128}) {
    const Bits found = bits_on(threads);
    CHECK(found.sums == expected.sums);
    CHECK(found.memory == expected.memory);
  }
}

// Tensors that share memory are written one after another, as often as they are listed.
void test_shared_memory() {
  constexpr int64_t kNumel = 64 * kTileBytes / 4;
  std::vector<float> memory(kNumel + 8, 1.0f);
  std::vector<Span> spans;
  for (int64_t i = 0; i < 4; ++i) spans.push_back({memory.data() + 2 * i, kNumel, DType::kFloat32});
  const FlatIndex index(spans);
  cpu::scale(index, 0.5, {0, index.tiles()});
  for (int64_t i = 0; i < kNumel + 8; ++i) {
    const int64_t first = std::max<int64_t>(0, (i - kNumel) / 2 + (i >= kNumel ? 1 : 0));
    const int64_t last = std::min<int64_t>(3, i / 2);
    CHECK(memory[static_cast<size_t>(i)] == std::ldexp(1.0f, static_cast<int>(first - last - 1)));
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
    std::vector<double> smallest(static_cast<size_t>(index.tiles()), 1.0);
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

void test_decay() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    const int64_t tile = tile_elements(dtype);
    for (const int64_t numel : {int64_t{1}, int64_t{9}, int64_t{65}, 3 * tile + 5}) {
      // The elements of the first tensor, added to those of the second, of which they are a half.
      Lists lists = make({{numel, dtype}, {numel, dtype}});
      const Lists original = make({{numel, dtype}, {numel, dtype}});
      for (int64_t i = 0; i < numel; ++i) {
        write(lists.spans[1], i, static_cast<float>(read(lists.spans[1], i) / 2.0));
      }
      const FlatIndex index({lists.spans[0]});
      const void* const added[] = {lists.spans[1].data};
      const Decay decay = {0.5, added};
      std::vector<double> sums(static_cast<size_t>(index.tiles()), kNaN);
      cpu::power_sums(index, Norm::kL1, Precision::kFloat32, &decay, {0, index.tiles()},
                      sums.data());
      double expected = 0.0;
      for (int64_t i = 0; i < numel; ++i) {
        const double value = read(original.spans[0], i) + read(original.spans[1], i) / 4.0;
        CHECK(read(lists.spans[0], i) == value);
        expected += std::fabs(value);
      }
      CHECK(cpu::total_power_sum(Norm::kL1, sums) == expected);
    }
  }
}

void test_any_twice() {
  std::vector<int64_t> objects(1000);
  std::vector<const void*> items;
  CHECK(!any_twice(items.data(), 0));
  for (int64_t& object : objects) {
    items.push_back(&object);
    CHECK(!any_twice(items.data(), items.size()));
  }
  for (const size_t place : {0, 1, 500, 998}) {
    items.back() = &objects[place];
    CHECK(any_twice(items.data(), items.size()));
  }
}

// Whatever lists were asked about before.
void test_share_memory() {
  char* memory = reinterpret_cast<char*>(uintptr_t{1} << 40);
  const Span first = {memory, 100, DType::kFloat32};
  const auto share = [](std::vector<Span> spans) { return share_memory(FlatIndex(spans)); };
  for (int round = 0; round < 3; ++round) {
    for (int64_t shift = 0; shift < 6; ++shift) {
      char* behind = memory + 400 + 16 * shift;
      CHECK(!share({first, {behind, 7, DType::kFloat64}}));
      CHECK(!share({{behind, 7, DType::kFloat64}, first}));
      // As long, in another dtype or from another address.
      CHECK(share({first, {behind, 7, DType::kFloat64}, {behind + 48, 7, DType::kFloat64}}));
      CHECK(share({{memory, 101 + 4 * shift, DType::kFloat32}, {behind, 7, DType::kFloat64}}));
      CHECK(share({{memory, 100, DType::kFloat64}, {behind, 7, DType::kFloat64}}));
      CHECK(share({first, {behind - 4 - 16 * shift, 7, DType::kFloat64}}));
      CHECK(share({first, first}));
    }
  }
  CHECK(!share({first}));
  CHECK(!share({}));
  CHECK(!share({first, {memory, 0, DType::kFloat32}}));
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
  gradclip::test_any_twice();
  gradclip::test_share_memory();
  gradclip::test_numbers();
  gradclip::test_decay();
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
  // Long enough for streams, with borders of tensors anywhere in them.
  List large;
  for (int64_t i = 0; i < 40; ++i) {
    large.push_back(
        {gradclip::tile_elements(dtypes[i % 4]) * (i + 1) + (i % 3 == 0 ? i : 0), dtypes[i % 4]});
  }
  for (int64_t i = 0; i < 600; ++i)
    large.push_back({gradclip::tile_elements(DType::kFloat64), DType::kFloat64});
  gradclip::test_list(large);
  for (const DType dtype : dtypes) {
    const int64_t tile = gradclip::tile_elements(dtype);
    gradclip::test_bits({{67 * tile + 7, dtype}});
    List rests;
    for (int64_t i = 0; i < 24; ++i) rests.push_back({i % 5 == 0 ? i : (i % 9) * tile + i, dtype});
    gradclip::test_bits(rests);
  }
  List mixed;
  for (int64_t i = 0; i < 20; ++i) {
    mixed.push_back({gradclip::tile_elements(dtypes[i % 4]) * (i % 11) + i, dtypes[i % 4]});
  }
  gradclip::test_bits(mixed);
  gradclip::test_shared_memory();
  for (const int64_t length : {1, 2, 9, 31, 130, 1030, 5000}) {
    for (const DType dtype : dtypes) {
      gradclip::test_rows({{1, dtype}, {60, dtype}, {7, DType::kFloat32}, {3, dtype}}, length);
    }
  }
  std::printf("%d checks\n", gradclip::checks);
  return 0;
}
