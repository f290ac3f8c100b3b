// The tests of kernels that write; see test_kernels.cpp.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/units.h"
#include "cuda/plan.h"
#include "kernel_testing.h"
#include "test_kernels.h"

namespace gradclip::cuda {

// Nothing is written where the coefficient is 1, not even what is there already.
void test_quiet() {
  for (const double ratio : {1.001, kInfinity}) {
    for (const double bad : {0.25, kInfinity, kNaN}) {
      // Only with an infinite max_norm does such a norm leave the gradients alone.
      if (!std::isfinite(bad) && std::isfinite(ratio)) continue;
      subject = "quiet " + std::to_string(ratio) + " " + std::to_string(bad);
      const Values values = [bad](int64_t, int64_t i) { return i == 5 ? bad : 0.5; };
      Gradients gradients(small_mixed_list(), values);
      const double norm = norm_of(gradients, Norm::kL2);
      const std::vector<SmallTable> tables = tables_of(gradients.index(), 3);
      NormResult norm_result(DType::kFloat64);
      const double max_norm = std::isinf(ratio) ? ratio : ratio * norm;
      gradients.forbid_writing();
      for (const Schedule& schedule : kSchedules) {
        Results partials(workers_of(tables));
        run_power_sums(tables, Norm::kL2, Precision::kFloat64, schedule, &partials, nullptr);
        const Clip clip =
            clip_of(Norm::kL2, partials.to_read(), workers_of(tables), max_norm, &norm_result);
        run_scale(tables, clip, schedule);
        CHECK(is_close(norm_result.get(), norm));
        SmallTable table = tables.front();
        table.workers = 1;
        Grid({1, kThreads}, schedule, [&] {
          clip_in_one_block_thread(table, Precision::kFloat64, clip);
        }).run();
      }
      gradients.allow_writing();
    }
  }
}

// A norm that the caller gives, and max_norm; each as a number or on the GPU, where it is complete
// only when the kernel before has ended.
void test_given_numbers() {
  for (const double norm : {0.5, 8.0, 1e300, kInfinity, kNaN}) {
    for (const double max_norm : {0.0, 3.0, -1.0, kNaN, kInfinity}) {
      for (const int where : {0, 1, 2, 3}) {
        const bool norm_on_gpu = (where & 1) != 0;
        const bool max_norm_on_gpu = (where & 2) != 0;
        // The binding refuses these before it launches anything.
        if (!max_norm_on_gpu && !(max_norm >= 0.0)) continue;
        subject = "norm " + std::to_string(norm) + ", max_norm " + std::to_string(max_norm);
        const Gradients before(small_mixed_list(), random_values(1.0));
        const Gradients gradients(small_mixed_list(), random_values(1.0));
        const std::vector<SmallTable> tables = tables_of(gradients.index(), 4);
        Results numbers(2);
        NormResult norm_result(DType::kFloat64);
        const Clip clip = clip_of(
            norm_on_gpu ? on_gpu(numbers.to_read(), DType::kFloat64) : known(norm),
            max_norm_on_gpu ? on_gpu(numbers.to_read() + 1, DType::kFloat64) : known(max_norm),
            &norm_result);
        const SmallTable& table = tables.front();
        const emulation::Launch launch = {table.workers, kThreads, /*early=*/true};
        Grid scale(launch, kSchedules[where], [&] { scale_thread(table, clip); });
        scale.run_to_wait();
        numbers.to_write()[0] = norm;
        numbers.to_write()[1] = max_norm;
        numbers.publish();
        scale.run();
        const double coefficient = max_norm >= 0.0 ? clip_coefficient(max_norm, norm) : kNaN;
        CHECK(is_scaled(gradients, before, coefficient));
        CHECK(is_same(norm_result.get(), norm));
      }
    }
  }
}

// Numbers on the GPU have any dtype, and a given norm may be the coefficient itself.
void test_given_dtypes() {
  const List list = small_mixed_list();
  for (const DType dtype : kDTypes) {
    for (const double number : {0.375, 1.0, 2.0, -0.5, kNaN}) {
      subject = "coefficient " + std::to_string(number);
      const Gradients before(list, random_values(1.0));
      const Gradients gradients(list, random_values(1.0));
      const std::vector<SmallTable> tables = tables_of(gradients.index(), 4);
      double place = kPoison;
      write(&place, dtype, 0, number);
      Clip clip = clip_of(on_gpu(&place, dtype), known(kPoison), nullptr);
      clip.is_coefficient = true;
      run_scale(tables, clip, kSchedules[1]);
      CHECK(is_scaled(gradients, before, number));

      const Gradients limited(list, random_values(1.0));
      run_scale(tables_of(limited.index(), 4), clip_of(known(2.0), on_gpu(&place, dtype), nullptr),
                kSchedules[2]);
      CHECK(is_scaled(limited, before, clip_coefficient(number >= 0.0 ? number : kNaN, 2.0)));
    }
  }
}

// Around 2^-100, from where on float32 would lose bits of the coefficient.
void test_tiny_coefficients() {
  const List list = {{2 * tile_elements(DType::kFloat32) + 5, DType::kFloat32, 1},
                     {801, DType::kFloat64, 1},
                     {900, DType::kBFloat16, 3},
                     {33, DType::kFloat16}};
  for (const double coefficient :
       {1e-29, 0x1.8p-100, 0x1p-100, 0x1.fffp-101, 1e-33, 1e-44, 1e-60, 0.0}) {
    subject = "coefficient " + std::to_string(std::log2(coefficient));
    const auto values = [] {
      return Values([](int64_t tensor, int64_t i) {
        return (tensor == 3 ? 1.0 : 1e30) * (1.0 + static_cast<double>(i % 100) / 64.0);
      });
    };
    const Gradients before(list, values());
    const Gradients gradients(list, values());
    // Large, so that the epsilon is lost in it.
    const double norm = 0x1p60;
    const Clip clip = clip_of(known(norm), known(coefficient * norm), nullptr);
    run_scale(tables_of(gradients.index(), 3), clip, kSchedules[1]);
    CHECK(is_scaled(gradients, before, coefficient));
  }
}

// Norm, barrier and scale in one launch.
void test_one_block() {
  std::vector<List> lists = {small_mixed_list(), {{1, DType::kFloat32}}};
  for (const DType dtype : kDTypes)
    lists.push_back({{2 * tile_elements(dtype) + 9, dtype, 1}, {3, dtype}});
  for (const List& list : lists) {
    for (const Norm kind : kNorms) {
      for (const double ratio : {0.3, 2.0}) {
        subject = "one block " + name_of(list);
        const Precision precision = precision_of(ratio > 1.0);
        const Gradients before(list, random_values(1.0));
        const double expected = norm_of(before, kind);
        const double max_norm = ratio * expected;
        double first = kPoison;
        for (const Schedule& schedule : kSchedules) {
          const Gradients gradients(list, random_values(1.0));
          SmallTable table = tables_of(gradients.index(), 1).front();
          NormResult norm_result(DType::kFloat64);
          const Clip clip = clip_of(kind, nullptr, 0, max_norm, &norm_result);
          Grid({1, kThreads}, schedule, [&] {
            clip_in_one_block_thread(table, precision, clip);
          }).run();
          const double actual = norm_result.get();
          CHECK(is_close_norm(actual, expected, precision));
          CHECK(is_scaled(gradients, before, clip_coefficient(max_norm, actual)));
          CHECK(is_poison(first) || bits(first) == bits(actual));
          first = actual;
        }
      }
    }
  }
}

// Each tensor by its own coefficient: 1 leaves it alone, 0 clears also what is not finite.
void test_scale_each() {
  const double coefficients[] = {0.375, 0.0, 1.0, kNaN, 1e-40, 1.0, 0.0};
  // Where the coefficients are in a list that also counts parameters without a gradient.
  const std::vector<int64_t> positions = {1, 2, 4, 5, 6, 9, 10};
  std::vector<double> listed(12, kPoison);
  for (size_t t = 0; t < positions.size(); ++t) listed[positions[t]] = coefficients[t];
  List list = small_mixed_list();
  // Takes a second launch.
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16}) {
    list.push_back({3 * tile_elements(dtype) + 7, dtype, 1});
  }
  const Values values = [](int64_t tensor, int64_t i) {
    return i == 3 ? kNaN : (i == 5 ? -kInfinity : static_cast<double>(tensor + i % 9) / 8.0);
  };
  for (int64_t workers = 1; workers <= 7; ++workers) {
    subject = "scale each with " + std::to_string(workers) + " workers";
    const Gradients before(list, values);
    const Gradients gradients(list, values);
    for (const SmallPositionTable& table :
         tables_of<SmallPositionTable>(gradients.index(), workers, positions)) {
      const Schedule schedule = kSchedules[workers % 4];
      Grid({table.workers, kThreads}, schedule, [&] {
        scale_each_thread(table, listed.data());
      }).run();
    }
    for (size_t t = 0; t < list.size(); ++t) {
      for (int64_t i = 0; i < list[t].numel; ++i) {
        const double expected =
            coefficients[t] == 0.0 ? 0.0 : scaled(before.get(t, i), coefficients[t], list[t].dtype);
        CHECK(is_same(gradients.get(t, i), expected));
      }
    }
    CHECK(gradients.guards_are_intact());
  }
}

void test_clamp() {
  const Values values = [](int64_t tensor, int64_t i) {
    if (i % 101 == 7) return i % 2 == 0 ? kNaN : (i % 3 == 0 ? kInfinity : -kInfinity);
    return static_cast<double>((i * 37 + tensor) % 201 - 100) / 64.0;
  };
  for (const double bound : {0.3, 0.0, 1.0, 1e300, kInfinity}) {
    for (int64_t workers = 1; workers <= 5; workers += 2) {
      subject = "clamp " + std::to_string(bound);
      const Gradients before(small_mixed_list(), values);
      const Gradients gradients(small_mixed_list(), values);
      for (const SmallTable& table : tables_of(gradients.index(), workers)) {
        const Schedule schedule = kSchedules[workers % 4];
        Grid({table.workers, kThreads}, schedule, [&] { clamp_thread(table, bound); }).run();
      }
      for (size_t t = 0; t < before.list().size(); ++t) {
        const DType dtype = before.list()[t].dtype;
        const double own = dtype == DType::kFloat64 ? bound : static_cast<float>(bound);
        for (int64_t i = 0; i < before.list()[t].numel; ++i) {
          const double value = before.get(t, i);
          const double limited = value > own ? own : (value < -own ? -own : value);
          CHECK(is_same(gradients.get(t, i), rounded(limited, dtype)));
        }
      }
      CHECK(gradients.guards_are_intact());
    }
  }
}

namespace {

struct Units {
  int64_t rows;
  int64_t row;
  DType gradient;
  DType weights;
  int64_t offset;
};

// What a row asks of the kernel; each tensor begins with another kind.
enum RowKind { kWithin, kAbove, kNoWeights, kNotFinite, kTinyCoefficient, kRowKinds };

constexpr UnitLimit kUnitLimit = {0.25, 0x1p-10};

RowKind kind_of(size_t tensor, int64_t row) {
  return static_cast<RowKind>((tensor + static_cast<size_t>(row)) % kRowKinds);
}

// Never near 0, so that a row of one element is as clearly above its limit or within it as others.
Values magnitudes(const std::vector<Units>& units, bool of_weights) {
  auto random = std::make_shared<std::mt19937>(of_weights ? 1 : 2);
  return [=](int64_t tensor, int64_t i) {
    const Units& own = units[static_cast<size_t>(tensor)];
    const double value = (0.5 + (*random)() / 0x1p33) * (i % 3 == 0 ? -1.0 : 1.0);
    const RowKind kind = kind_of(static_cast<size_t>(tensor), i / own.row);
    if (of_weights) return kind == kNoWeights ? 0.0 : value;
    switch (kind) {
      case kWithin:
        return value * 0x1p-6;
      case kNotFinite:
        return i % own.row == own.row - 1 ? (tensor % 2 == 0 ? kNaN : -kInfinity) : value;
      case kTinyCoefficient:
        return value * (own.gradient == DType::kFloat16 ? 0x1p14 : 0x1p115);
      default:
        return value;
    }
  };
}

List list_of(const std::vector<Units>& units, bool of_weights) {
  List list;
  for (const Units& own : units) {
    // Weights have another alignment than their gradient.
    list.push_back({own.rows * own.row, of_weights ? own.weights : own.gradient,
                    of_weights ? 1 - own.offset : own.offset});
  }
  return list;
}

// In float64.
double coefficient_of_row(const Gradients& gradients, const Gradients& weights, const Units& units,
                          size_t tensor, int64_t row) {
  double sums[2] = {0.0, 0.0};
  for (int64_t i = row * units.row; i < (row + 1) * units.row; ++i) {
    sums[0] += weights.get(tensor, i) * weights.get(tensor, i);
    sums[1] += gradients.get(tensor, i) * gradients.get(tensor, i);
  }
  return kUnitLimit.coefficient(std::sqrt(sums[0]), std::sqrt(sums[1]));
}

bool is_near(double actual, double expected, const Units& units) {
  constexpr double kUnitsInTheLastPlace[] = {0x1p-23, 0x1p-52, 0x1p-10, 0x1p-7};
  // Two norms in float32, unless both are in float64, then the product in the gradient's dtype.
  const bool wide = units.gradient == DType::kFloat64 && units.weights == DType::kFloat64;
  const double relative =
      (wide ? 0x1p-50 : 0x1p-21) + kUnitsInTheLastPlace[static_cast<int>(units.gradient)];
  const double smallest = units.gradient == DType::kFloat16 ? 0x1p-24 : 0.0;
  return std::fabs(actual - expected) <= relative * std::fabs(expected) + smallest;
}

std::vector<SmallRowsTable> tables_of(const std::vector<Rows>& rows, int64_t workers) {
  std::vector<SmallRowsTable> tables;
  RowsPlan(rows, kCapacity, workers).for_tables<kCapacity>([&](const SmallRowsTable& table) {
    tables.push_back(table);
    return 0;
  });
  return tables;
}

void check_clipped_rows(const std::vector<Units>& all, int64_t most_workers) {
  Gradients weights(list_of(all, true), magnitudes(all, true));
  const Gradients before(list_of(all, false), magnitudes(all, false));
  weights.forbid_writing();
  std::vector<std::vector<double>> coefficients;
  for (size_t t = 0; t < all.size(); ++t) {
    coefficients.emplace_back();
    for (int64_t row = 0; row < all[t].rows; ++row) {
      coefficients[t].push_back(coefficient_of_row(before, weights, all[t], t, row));
      CHECK((coefficients[t].back() == 1.0) ==
            (kind_of(t, row) == kWithin || kind_of(t, row) == kNotFinite));
    }
  }
  std::vector<char> first;
  for (const Schedule& schedule : kSchedules) {
    const Gradients gradients(list_of(all, false), magnitudes(all, false));
    std::vector<Rows> rows;
    for (size_t t = 0; t < all.size(); ++t) {
      rows.push_back({gradients.index().spans()[t], weights.index().spans()[t], all[t].rows});
    }
    const std::vector<SmallRowsTable> tables = tables_of(rows, most_workers);
    const int64_t workers = tables.back().first_worker + tables.back().workers;
    Results smallest(workers);
    for (const SmallRowsTable& table : tables) {
      Grid({table.workers, kThreads}, schedule, [&] {
        clip_rows_thread(table, kUnitLimit, smallest.to_write());
      }).run();
    }
    smallest.publish();
    CHECK(smallest.is_complete());
    std::vector<double> expected_smallest(static_cast<size_t>(workers), 1.0);
    for (size_t t = 0; t < all.size(); ++t) {
      const SmallRowsTable& table = tables[t / kCapacity];
      for (int64_t row = 0; row < all[t].rows; ++row) {
        const double coefficient = coefficients[t][static_cast<size_t>(row)];
        const int64_t worker =
            table.first_worker + (table.first_row[t % kCapacity] + row) % table.workers;
        double& own_smallest = expected_smallest[static_cast<size_t>(worker)];
        own_smallest = std::min(own_smallest, coefficient);
        for (int64_t i = row * all[t].row; i < (row + 1) * all[t].row; ++i) {
          const double value = before.get(t, i);
          CHECK(coefficient == 1.0 ? is_same(gradients.get(t, i), value)
                                   : is_near(gradients.get(t, i), value * coefficient, all[t]));
        }
      }
    }
    for (int64_t worker = 0; worker < workers; ++worker) {
      const double expected = expected_smallest[static_cast<size_t>(worker)];
      CHECK(std::fabs(smallest.to_read()[worker] - expected) <= 0x1p-21 * expected);
    }
    CHECK(gradients.guards_are_intact());
    CHECK(first.empty() || gradients.bytes() == first);
    first = gradients.bytes();
  }
  weights.allow_writing();
}

}  // namespace

// Each row by its own limit, in lists of one launch and of two, for any number of workers.
void test_clip_rows() {
  for (const DType dtype : kDTypes) {
    const int64_t group = 4 * kThreads * 16 / element_size(dtype);
    for (const DType weights : {dtype, DType::kFloat32, DType::kFloat64}) {
      const std::vector<Units> units = {
          {11, 37, dtype, weights, 1}, {5, group + 9, dtype, weights, 0},
          {6, 1, dtype, weights, 1},   {1, 64, dtype, weights, 0},
          {7, 32, weights, dtype, 1},  {9, 70, dtype, weights, 1},
          {1, 3, weights, dtype, 0}};
      for (const int64_t workers : {1, 3, 8, 100}) {
        if (quick && workers != 3) continue;
        subject = "rows of dtype " + std::to_string(static_cast<int>(dtype)) + ", weights of " +
                  std::to_string(static_cast<int>(weights)) + ", " + std::to_string(workers) +
                  " workers";
        check_clipped_rows(units, workers);
      }
    }
  }
}

// The end of a call that only measures, for any number of workers and each dtype of the result.
void test_finish() {
  for (const int count : {1, 2, 31, 32, 33, kThreads - 1, kThreads, kThreads + 1, 3 * kThreads + 5,
                          4 * kThreads, 4 * kThreads + 1, 9 * kThreads + 5}) {
    for (const Norm kind : kNorms) {
      Results partials(count);
      long double sum = 0.0L;
      for (int i = 0; i < count; ++i) {
        const double value = 1.0 / (count - i);
        partials.to_write()[i] = value;
        sum = kind == Norm::kInf ? std::max<long double>(sum, value) : sum + value;
      }
      partials.publish();
      subject = "finish " + std::to_string(count);
      for (const DType dtype : kDTypes) {
        NormResult norm_result(dtype);
        const double power_sum =
            run_finish(kind, partials, count, dtype, norm_result.place(), kSchedules[count % 4]);
        CHECK(is_close(power_sum, static_cast<double>(sum)));
        CHECK(norm_result.get() == rounded(finish(kind, power_sum), dtype));
        CHECK(norm_result.has_only_norm());
      }
      CHECK(!is_poison(run_finish(kind, partials, count, DType::kFloat32, nullptr, kSchedules[0])));
    }
  }
  for (const double norm : {1e6, 1e39, 1e-30, kInfinity, kNaN}) {
    Results partial(1);
    partial.to_write()[0] = norm;
    partial.publish();
    for (const DType dtype : kDTypes) {
      NormResult result(dtype);
      run_finish(Norm::kL1, partial, 1, dtype, result.place(), kSchedules[2]);
      CHECK(is_same(result.get(), rounded(norm, dtype)));
    }
  }
}

}  // namespace gradclip::cuda
