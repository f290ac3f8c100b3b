// How csrc/cuda/plan.h cuts lists into launches and packs their tables, on the host: every tensor
// is in one launch, launches have as many tensors, tiles and workers as they should, tables say
// what the index says, and the smallest one that fits is taken. Built and run by
// tests/test_native_engine.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/clip.h"
#include "cuda/plan.h"

namespace gradclip::cuda {
namespace {

int checks = 0;

void check(bool condition, const char* what, int line) {
  ++checks;
  if (condition) return;
  std::printf("line %d: not true: %s\n", line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// Of sizes from one element to several tiles; nothing reads the memory, so there is none.
FlatIndex index_of(int64_t tensors) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < tensors; ++i) {
    char* data = reinterpret_cast<char*>(uintptr_t{1} << 40) + (i << 20);
    spans.push_back({data, 1 + 977 * (i % 13), kDTypes[i % 4]});
  }
  return FlatIndex(spans);
}

std::vector<const void*> parameters_of(const FlatIndex& index) {
  std::vector<const void*> parameters;
  for (const Span& span : index.spans()) {
    parameters.push_back(static_cast<const char*>(span.data) + (int64_t{1} << 44));
  }
  return parameters;
}

template <class AnyTable>
void check_borders(const AnyTable& table, const FlatIndex& index, const Part& part) {
  CHECK(table.tensors == part.count());
  CHECK(table.tiles == part.tiles);
  CHECK(table.workers == part.workers);
  CHECK(table.first_worker == part.first_worker);
  CHECK(table.first_tensor == part.tensors.begin);
  const int64_t first_tile = index.first_tile(part.tensors.begin);
  for (int64_t i = 0; i < part.count(); ++i) {
    const int64_t tensor = part.tensors.begin + i;
    CHECK(table.first_tile[i] == index.first_tile(tensor) - first_tile);
    // What the kernels take for the last tile of a tensor.
    CHECK(end_tile(table.first_tile, table.tensors, table.tiles, static_cast<int32_t>(i)) ==
          index.end_tile(tensor) - first_tile);
  }
}

template <class AnyTable>
void check_table(const AnyTable& table, const FlatIndex& index, const Part& part) {
  check_borders(table, index, part);
  for (int64_t i = 0; i < part.count(); ++i) {
    const Span& span = index.spans()[static_cast<size_t>(part.tensors.begin + i)];
    CHECK(table.data[i] == span.data);
    CHECK(numel_of(table.numel_and_dtype[i]) == span.numel);
    CHECK(dtype_of(table.numel_and_dtype[i]) == span.dtype);
  }
}

template <int kCapacity>
constexpr int capacity_of(const Table<kCapacity>&) {
  return kCapacity;
}

template <int kCapacity>
constexpr int capacity_of(const BorderTable<kCapacity>&) {
  return kCapacity;
}

void check_parts(const Plan& plan, const FlatIndex& index, int64_t capacity, int64_t most_workers) {
  int64_t tensors = 0;
  int64_t tiles = 0;
  int64_t workers = 0;
  for (const Part& part : plan.parts()) {
    CHECK(part.tensors.begin == tensors);
    CHECK(part.count() == std::min(capacity, index.tensors() - tensors));
    CHECK(part.first_worker == workers);
    CHECK(part.workers == std::min(part.tiles, most_workers));
    tensors = part.tensors.end;
    tiles += part.tiles;
    workers += part.workers;
  }
  CHECK(tensors == index.tensors());
  CHECK(tiles == index.tiles());
  CHECK(plan.partials() == workers);
  CHECK(plan.slots() == slot_count(tensors, workers));
}

const int64_t kCounts[] = {1,    2,    39,   40,   41,   189,  190,  191, 1099,
                           1100, 1101, 1599, 1600, 1601, 2200, 3201, 4000};

void test_tables() {
  for (const int64_t tensors : kCounts) {
    const FlatIndex index = index_of(tensors);
    for (const int64_t capacity : {kMediumTable, kLargeTable}) {
      for (const int64_t most_workers : {1, 7, 792}) {
        const Plan plan(index, {}, capacity, most_workers);
        CHECK(!plan.decays());
        check_parts(plan, index, capacity, most_workers);
        size_t seen = 0;
        const auto check_one = [&](const auto& table) {
          const Part& part = plan.parts()[seen++];
          check_table(table, index, part);
          const int64_t count = part.count();
          CHECK(capacity_of(table) == (count <= kSmallTable    ? kSmallTable
                                       : count <= kMediumTable ? kMediumTable
                                       : count <= kWideTable   ? kWideTable
                                                               : kLargeTable));
          return 0;
        };
        const int error =
            capacity == kMediumTable
                ? for_tables<Table, kSmallTable, kMediumTable>(plan, check_one)
                : for_tables<Table, kSmallTable, kMediumTable, kWideTable, kLargeTable>(plan,
                                                                                        check_one);
        CHECK(error == 0);
        CHECK(seen == plan.parts().size());
      }
    }
  }
}

void test_decay_tables() {
  for (const int64_t tensors : kCounts) {
    const FlatIndex index = index_of(tensors);
    const std::vector<const void*> parameters = parameters_of(index);
    const Decay decay = {0.25, parameters.data()};
    const Plan plan(index, {&decay, nullptr}, kLargeDecayTable, 792);
    CHECK(plan.decays());
    check_parts(plan, index, kLargeDecayTable, 792);
    size_t seen = 0;
    for_tables<DecayTable, kSmallTable, kLargeDecayTable>(plan, [&](const auto& table) {
      const Part& part = plan.parts()[seen++];
      check_table(table, index, part);
      CHECK(table.factor == 0.25);
      for (int64_t i = 0; i < part.count(); ++i) {
        CHECK(table.parameters[i] == parameters[static_cast<size_t>(part.tensors.begin + i)]);
      }
      CHECK(capacity_of(table) == (part.count() <= kSmallTable ? kSmallTable : kLargeDecayTable));
      return 0;
    });
    CHECK(seen == plan.parts().size());
  }
}

// The places of tensors in a list that also counts what has no gradient.
void test_tables_with_positions() {
  for (const int64_t tensors : kCounts) {
    const FlatIndex index = index_of(tensors);
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < tensors; ++i) positions.push_back(i + i / 3 + 2);
    const Plan plan(index, {nullptr, positions.data()}, kLargePositionTable, 792);
    check_parts(plan, index, kLargePositionTable, 792);
    size_t seen = 0;
    const auto check_positions = [&](const auto& table, const Part& part) {
      for (int64_t i = 0; i < part.count(); ++i) {
        CHECK(table.positions[i] == positions[static_cast<size_t>(part.tensors.begin + i)]);
      }
    };
    for_tables<PositionTable, kSmallTable, kLargePositionTable>(plan, [&](const auto& table) {
      const Part& part = plan.parts()[seen++];
      check_table(table, index, part);
      check_positions(table, part);
      return 0;
    });
    CHECK(seen == plan.parts().size());
    seen = 0;
    for_tables<BorderTable, kMediumTable, kLargeTable>(plan, [&](const auto& table) {
      const Part& part = plan.parts()[seen++];
      check_borders(table, index, part);
      check_positions(table, part);
      CHECK(capacity_of(table) == (part.count() <= kMediumTable ? kMediumTable : kLargeTable));
      return 0;
    });
    CHECK(seen == plan.parts().size());
  }
}

// A kernel's parameters may take so many bytes from CUDA 12.1 on, and 4 KB before.
void test_sizes_of_tables() {
  constexpr size_t kOtherParameters = 256;
  CHECK(sizeof(Table<kMediumTable>) + sizeof(Clip) + 2 * sizeof(double*) <= 4096);
  CHECK(sizeof(PositionTable<kMediumPositionTable>) + sizeof(double*) <= 4096);
  CHECK(sizeof(BorderTable<kMediumTable>) + 2 * sizeof(double*) <= 4096);
  CHECK(sizeof(RowsTable<kRowsTable>) + sizeof(UnitLimit) + sizeof(double*) <= 4096);
  CHECK(sizeof(Table<kLargeTable>) + kOtherParameters <= 32764);
  CHECK(sizeof(DecayTable<kLargeDecayTable>) + kOtherParameters <= 32764);
  CHECK(sizeof(PositionTable<kLargePositionTable>) + kOtherParameters <= 32764);
  CHECK(sizeof(BorderTable<kLargeTable>) + kOtherParameters <= 32764);
}

void test_first_error_ends_the_launches() {
  const FlatIndex index = index_of(50);
  const Plan plan(index, {}, 10, 100);
  int launches = 0;
  const int error =
      for_tables<Table, 10>(plan, [&](const auto&) { return ++launches == 3 ? 700 : 0; });
  CHECK(error == 700);
  CHECK(launches == 3);
}

void test_empty_list() {
  const FlatIndex index(std::vector<Span>{});
  const Plan plan(index, {}, kLargeTable, 100);
  CHECK(plan.parts().empty());
  CHECK(plan.partials() == 0);
  int launches = 0;
  const int error = for_tables<Table, kLargeTable>(plan, [&](const auto&) { return ++launches; });
  CHECK(error == 0);
  CHECK(launches == 0);
}

// Of one to a few rows each; the dtypes and the sizes of rows differ between and within pairs.
std::vector<Rows> rows_of(int64_t tensors) {
  std::vector<Rows> all;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t count = 1 + 3 * (i % 7);
    const int64_t numel = count * (1 + 977 * (i % 13));
    char* gradient = reinterpret_cast<char*>(uintptr_t{1} << 40) + (i << 20);
    char* weights = gradient + (int64_t{1} << 44);
    all.push_back({{gradient, numel, kDTypes[i % 4]}, {weights, numel, kDTypes[i / 4 % 4]}, count});
  }
  return all;
}

// Launches one after another hold each tensor and each row once, and never more workers than rows.
void test_rows_tables() {
  for (const int64_t tensors : {1, 2, 99, 100, 101, 200, 201, 450}) {
    const std::vector<Rows> all = rows_of(tensors);
    for (const int64_t most_workers : {1, 7, 1056}) {
      const RowsPlan plan(all, kRowsTable, most_workers);
      size_t tensor = 0;
      int64_t workers = 0;
      const int error = plan.for_tables<kRowsTable>([&](const RowsTable<kRowsTable>& table) {
        CHECK(table.tensors ==
              std::min<int64_t>(kRowsTable, tensors - static_cast<int64_t>(tensor)));
        CHECK(table.first_worker == workers);
        int64_t rows = 0;
        for (int i = 0; i < table.tensors; ++i, ++tensor) {
          const Rows& own = all[tensor];
          CHECK(table.gradients[i] == own.gradient.data);
          CHECK(table.weights[i] == own.weights.data);
          CHECK(numel_of(table.gradient_row[i]) * own.count == own.gradient.numel);
          CHECK(dtype_of(table.gradient_row[i]) == own.gradient.dtype);
          CHECK(numel_of(table.weights_row[i]) * own.count == own.weights.numel);
          CHECK(dtype_of(table.weights_row[i]) == own.weights.dtype);
          CHECK(table.first_row[i] == rows);
          // What the kernel takes for the tensor of a row.
          CHECK(find_tensor(table.first_row, table.tensors, rows) == i);
          rows += own.count;
          CHECK(find_tensor(table.first_row, table.tensors, rows - 1) == i);
        }
        CHECK(table.rows == rows);
        CHECK(table.workers == std::min(rows, most_workers));
        workers += table.workers;
        return 0;
      });
      CHECK(error == 0);
      CHECK(static_cast<int64_t>(tensor) == tensors);
      CHECK(plan.workers() == workers);
    }
  }
}

void test_first_error_ends_the_launches_of_rows() {
  const std::vector<Rows> all = rows_of(50);
  const RowsPlan plan(all, 10, 100);
  int launches = 0;
  CHECK(plan.for_tables<10>([&](const auto&) { return ++launches == 3 ? 700 : 0; }) == 700);
  CHECK(launches == 3);
}

void test_no_rows() {
  const std::vector<Rows> none;
  for (const RowsPlan& plan : {RowsPlan(), RowsPlan(none, kRowsTable, 100)}) {
    CHECK(plan.workers() == 0);
    int launches = 0;
    CHECK(plan.for_tables<kRowsTable>([&](const auto&) { return ++launches; }) == 0);
    CHECK(launches == 0);
  }
}

// More than 32 bits hold.
void test_many_rows() {
  constexpr int64_t kRows = int64_t{3} << 31;
  const Span span = {nullptr, 2 * kRows, DType::kFloat16};
  const std::vector<Rows> all = {{span, span, kRows}, {span, span, kRows}};
  const RowsPlan plan(all, kRowsTable, 1056);
  plan.for_tables<kRowsTable>([&](const RowsTable<kRowsTable>& table) {
    CHECK(table.rows == 2 * kRows);
    CHECK(table.first_row[1] == kRows);
    CHECK(numel_of(table.gradient_row[1]) == 2);
    return 0;
  });
  CHECK(plan.workers() == 1056);
}

// What blocks of a GPU compute in 32 bits is what the host computes in 64.
void test_shares_in_32_bits() {
  const uint32_t all_tiles[] = {1,         2,          7,           792,         793,
                                1'000'003, 0x7fffffff, 0x80000001u, 0xfffffffeu, 0xffffffffu};
  for (const uint32_t workers : {1u, 2u, 6u, 7u, 792u, 3168u, 4099u, 65535u}) {
    for (const uint32_t tiles : all_tiles) {
      if (tiles < workers) continue;
      const uint32_t step = workers > 5000 ? 97 : 1;
      for (uint32_t worker = 0; worker < workers; worker += step) {
        const Range share = tiles_of_worker(worker, workers, tiles);
        const Range expected = tiles_of_worker(int64_t{worker}, int64_t{workers}, int64_t{tiles});
        CHECK(share.begin == expected.begin && share.end == expected.end);
      }
    }
  }
}

void test_one_block() {
  const auto list = [](int64_t tensors, int64_t numel) {
    return FlatIndex(
        std::vector<Span>(static_cast<size_t>(tensors), {nullptr, numel, DType::kFloat32}));
  };
  CHECK(fits_one_block(list(1, 64 * 1024)));
  CHECK(!fits_one_block(list(1, 64 * 1024 + 1)));
  CHECK(fits_one_block(list(8, 1)));
  CHECK(!fits_one_block(list(9, 1)));
}

}  // namespace
}  // namespace gradclip::cuda

int main() {
  using namespace gradclip::cuda;
  test_tables();
  test_decay_tables();
  test_tables_with_positions();
  test_sizes_of_tables();
  test_first_error_ends_the_launches();
  test_empty_list();
  test_rows_tables();
  test_first_error_ends_the_launches_of_rows();
  test_no_rows();
  test_many_rows();
  test_shares_in_32_bits();
  test_one_block();
  std::printf("%d checks\n", checks);
}
