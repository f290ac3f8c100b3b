// What the sweep (bench/cuda) does on the host: its lists, what it says of wrong norms and wrong
// gradients, its CSV and its table. Plain C++; built and run by test_sweep.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/float16.h"
#include "lists.h"
#include "report.h"

namespace gradclip::cuda::sweep {
namespace {

int checks = 0;

void check(bool condition, const char* what, int line) {
  ++checks;
  if (condition) return;
  std::printf("line %d: not true: %s\n", line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

double get(const Span& span, int64_t i) {
  const char* data = static_cast<const char*>(span.data);
  if (span.dtype == DType::kFloat32) return static_cast<double>(static_cast<float*>(span.data)[i]);
  if (span.dtype == DType::kFloat64) return static_cast<double*>(span.data)[i];
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, sizeof bits);
  return static_cast<double>(span.dtype == DType::kFloat16 ? cpu::widen(cpu::Float16{bits})
                                                           : cpu::widen(cpu::BFloat16{bits}));
}

// As a right kernel would.
void scale(const FlatIndex& index, double coefficient) {
  for (const Span& span : index.spans()) {
    for (int64_t i = 0; i < span.numel; ++i) {
      const auto product = static_cast<float>(get(span, i) * static_cast<float>(coefficient));
      uint16_t* halves = static_cast<uint16_t*>(span.data);
      cpu::Float16 half;
      cpu::BFloat16 brain;
      switch (span.dtype) {
        case DType::kFloat32:
          static_cast<float*>(span.data)[i] = product;
          break;
        case DType::kFloat64:
          static_cast<double*>(span.data)[i] *= coefficient;
          break;
        case DType::kFloat16:
          cpu::narrow(product, &half);
          halves[i] = half.bits;
          break;
        case DType::kBFloat16:
          cpu::narrow(product, &brain);
          halves[i] = brain.bits;
          break;
      }
    }
  }
}

struct Copy {
  explicit Copy(const List& list, uint64_t seed = 7)
      : memory(static_cast<size_t>(list.size()) / 16 + 1), index(list.index(memory.data())) {
    list.fill(seed, memory.data());
  }

  struct alignas(16) Vector {
    char bytes[16];
  };
  std::vector<Vector> memory;
  FlatIndex index;
};

void test_lists() {
  const List list = mixed();
  Copy copy(list);
  CHECK(copy.index.tensors() == list.tensors() && copy.index.bytes() == list.bytes());
  long double sum = 0.0L;
  int64_t unaligned = 0;
  for (const Span& span : copy.index.spans()) {
    unaligned += reinterpret_cast<uintptr_t>(span.data) % 16 != 0;
    for (int64_t i = 0; i < span.numel; ++i) {
      const double value = get(span, i);
      CHECK(value >= -1.0 && value <= 1.0);
      sum += static_cast<long double>(value) * value;
    }
  }
  CHECK(unaligned > 10);
  const double norm = static_cast<double>(std::sqrt(sum));
  CHECK(std::fabs(list.norm(copy.memory.data()) - norm) <= 1e-12 * norm);
  // Numbers of uniform distribution, and others for another seed.
  CHECK(std::fabs(norm / std::sqrt(static_cast<double>(list.bytes())) - 0.3) < 0.05);
  CHECK(list.norm(Copy(list, 8).memory.data()) != list.norm(copy.memory.data()));
  CHECK(list.norm(Copy(list).memory.data()) == list.norm(copy.memory.data()));

  for (const int64_t bytes : {4096, 1 << 20}) {
    for (const int64_t tensors : {1, 8, 1000}) {
      const List equal = equal_tensors(bytes, tensors);
      CHECK(equal.tensors() == tensors);
      CHECK(equal.bytes() <= bytes && equal.bytes() > bytes - 4 * tensors);
    }
  }
}

void test_norms() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(is_right_norm(3.0, 3.0) && is_right_norm(3.0 * (1 + 0x1p-23), 3.0));
  CHECK(!is_right_norm(3.0 * (1 + 0x1p-21), 3.0) && !is_right_norm(3.0 * (1 - 0x1p-21), 3.0));
  CHECK(!is_right_norm(nan, 3.0) && !is_right_norm(0.0, 3.0) && !is_right_norm(3.0, nan));
}

// With `places` in each tensor at which something is wrong in turn.
void test_differences(const List& list, int64_t places) {
  const Copy before(list);
  for (const double coefficient : {1.0, 0.3, 1.0 / 3.0, 1e-3}) {
    Copy after(list);
    const auto difference = [&] {
      return list.difference(before.memory.data(), after.memory.data(), coefficient);
    };
    if (coefficient != 1.0) {
      CHECK(difference() != "");
      scale(after.index, coefficient);
    }
    CHECK(difference() == "");
    // A wrong element anywhere, by a little or by NaN.
    for (int64_t t = 0; t < list.tensors(); ++t) {
      const Span& span = after.index.spans()[static_cast<size_t>(t)];
      for (int64_t place_number = 0; place_number < places; ++place_number) {
        const int64_t i = (span.numel - 1) * place_number / (places - 1);
        const int64_t size = element_size(span.dtype);
        char* place = static_cast<char*>(span.data) + i * size;
        char kept[8];
        std::memcpy(kept, place, static_cast<size_t>(size));
        // The second highest byte holds the last bits of a bfloat16 that are not rounding.
        place[size == 2 ? 0 : size - 2] ^= size == 2 ? 2 : 1;
        CHECK(difference() != "");
        std::memset(place, 0xff, static_cast<size_t>(size));
        CHECK(difference() != "");
        std::memcpy(place, kept, static_cast<size_t>(size));
      }
    }
    CHECK(difference() == "");
    // A byte beside a tensor.
    char* beside = static_cast<char*>(after.index.spans()[3].data) - 1;
    ++*beside;
    CHECK(difference() != "");
    --*beside;
    char* last = reinterpret_cast<char*>(after.memory.data()) + list.size() - 1;
    ++*last;
    CHECK(difference() != "");
    --*last;
    CHECK(difference() == "");
  }
}

void test_differences() {
  test_differences(List("small", {{1000, DType::kFloat32, 1},
                                  {1, DType::kFloat64},
                                  {1001, DType::kFloat16, 3},
                                  {77, DType::kBFloat16, 5},
                                  {900, DType::kFloat64, 1}}),
                   12);
  // Shared out among threads.
  test_differences(List("large", {{1, DType::kFloat32},
                                  {3, DType::kFloat16, 1},
                                  {2, DType::kFloat64},
                                  {(1 << 20) + 5, DType::kBFloat16, 1}}),
                   3);
}

Row row_of(const std::string& list, const std::string& variant, double median) {
  Row row;
  row.family = "order";
  row.list = list;
  row.work = "measure";
  row.variant = variant;
  row.threads = 256;
  row.blocks = variant == "today" ? 0 : 6;
  row.loads = 4;
  row.median = median;
  return row;
}

void test_report(const std::string& folder) {
  CHECK(median({}) == -1.0 && median({3.0}) == 3.0 && median({4.0, 1.0, 2.0}) == 2.0);
  CHECK(median({4.0, 1.0, 2.0, 3.0}) == 2.5);

  const std::string path = folder + "/sweep.csv";
  std::remove(path.c_str());
  std::vector<Row> rows = {
      row_of("one, and \"two\"", "today", 10.0),    row_of("one, and \"two\"", "slow", 12.5),
      row_of("one, and \"two\"", "third", 9.9),     row_of("one, and \"two\"", "first", 5.0),
      row_of("one, and \"two\"", "second", 7.0),    row_of("one, and \"two\"", "broken", -1.0),
      row_of("one, and \"two\"", "too large", -1.0)};
  rows[0].percent_of_read = 93.21;
  rows[5].status = "wrong";
  rows[5].note = "the norm is 1\nand not 2";
  rows[6].status = "unsupported";
  for (const Row& row : rows) {
    // Each by itself: a file is complete at any time.
    Csv(path).write(row);
    CHECK(read_rows(path).problem.empty());
  }
  const Rows read = read_rows(path);
  CHECK(read.rows.size() == rows.size());
  CHECK(read.rows[0].list == "one, and 'two'" && read.rows[0].percent_of_read == 93.21);
  CHECK(read.rows[0].stream == -1.0 && read.rows[3].median == 5.0 && read.rows[3].blocks == 6);
  CHECK(read.rows[5].status == "wrong" && read.rows[5].note == "the norm is 1 and not 2");
  const std::string expected =
      "wrong: order measure, one, and 'two': broken 6x256: the norm is 1 and not 2\n"
      "order measure, one, and 'two': today 10 us (93.21% of read); first 6x256 5 (x0.500); "
      "second 6x256 7 (x0.700); third 6x256 9.9 (x0.990)\n";
  CHECK(table(read.rows, 8000) == expected);

  // A program that was killed in the middle of a line.
  std::FILE* file = std::fopen(path.c_str(), "a");
  std::fputs("\"order\",\"cut", file);
  std::fclose(file);
  CHECK(read_rows(path).rows.size() == rows.size() && !read_rows(path).problem.empty());
  CHECK(!read_rows(folder + "/none.csv").problem.empty());

  for (int i = 0; i < 2000; ++i) {
    rows.push_back(row_of("list " + std::to_string(i / 4), i % 4 == 0 ? "today" : "variant", 2.0));
    rows.back().status = i % 3 == 0 ? "failed" : "ok";
  }
  CHECK(table(rows, 8000).size() <= 8000 && table(rows, 8000).size() > 7500);
  // A family of one list is not lost behind one of many.
  rows.push_back(row_of("last", "today", 3.0));
  rows.back().family = "other";
  CHECK(table(rows, 8000).find("other measure, last: today 3 us\n") != std::string::npos);
}

void print_shapes(const List& list) {
  for (const Shape& shape : list.shapes()) {
    std::printf("%lld ", static_cast<long long>(shape.numel));
  }
  std::printf("\n");
}

}  // namespace
}  // namespace gradclip::cuda::sweep

int main(int argc, char** argv) {
  using namespace gradclip::cuda::sweep;
  if (argc == 2 && std::string(argv[1]) == "--shapes") {
    for (const List& list : {resnet50(), gpt2(), llama3_blocks(32)}) print_shapes(list);
    return 0;
  }
  test_lists();
  test_norms();
  test_differences();
  test_report(argv[1]);
  std::printf("%d checks\n", checks);
  return 0;
}
