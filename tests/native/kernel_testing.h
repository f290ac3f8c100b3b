// What the tests of the kernels have in common: lists of gradients in guarded memory, launches of
// the emulation, and references in long double.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "cuda/clip.h"
#include "cuda/plan.h"
#include "grid.h"
#include "kernels.h"

namespace gradclip::cuda {

using emulation::Grid;
using emulation::Order;
using emulation::Schedule;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
constexpr Norm kNorms[] = {Norm::kL1, Norm::kL2, Norm::kInf};
const Schedule kSchedules[] = {
    {Order::kForward, 0}, {Order::kReverse, 0}, {Order::kRandom, 1}, {Order::kRandom, 2}};

// A small part of the cases, for mutants: one case that fails is enough to catch one.
extern bool quick;
extern int64_t checks;
// What is being tested, for the message of a check that fails.
extern std::string subject;

void check(bool condition, const char* what, int line);
#define CHECK(condition) check(condition, #condition, __LINE__)

uint64_t bits(double number);

// What a place holds that no kernel has written: a NaN that no arithmetic makes.
inline const double kPoison = emulation::same_bits<double>(uint64_t{0x7ff8dead'beef0000});
bool is_poison(double number);

// Memory that one kernel writes and later ones read: what is written can be seen only when the
// kernel has ended.
class Results {
 public:
  explicit Results(int64_t count)
      : written_(static_cast<size_t>(count) + 1, kPoison), visible_(written_) {}

  double* to_write() { return written_.data(); }
  const double* to_read() const { return visible_.data(); }
  void publish() { visible_ = written_; }

  // All of it and nothing beyond.
  bool is_complete() const {
    for (size_t i = 0; i + 1 < visible_.size(); ++i) {
      if (is_poison(visible_[i])) return false;
    }
    return is_poison(visible_.back());
  }

  // By bits: NaN is NaN.
  bool operator==(const Results& other) const {
    return visible_.size() == other.visible_.size() &&
           std::memcmp(visible_.data(), other.visible_.data(), visible_.size() * sizeof(double)) ==
               0;
  }

 private:
  std::vector<double> written_;
  std::vector<double> visible_;
};

struct Tensor {
  int64_t numel;
  DType dtype;
  // Elements between the last 16-byte border and the first element.
  int64_t offset = 0;
};
using List = std::vector<Tensor>;

double read(const void* data, DType dtype, int64_t i);

void write(void* data, DType dtype, int64_t i, double value);

// As the dtype holds it.
double rounded(double value, DType dtype);

// The value of an element; the first argument is its tensor.
using Values = std::function<double(int64_t, int64_t)>;

Values random_values(double magnitude);

class Gradients {
 public:
  Gradients(const List& list, const Values& values) : list_(list) {
    std::vector<Span> spans;
    for (size_t t = 0; t < list.size(); ++t) {
      const Tensor& tensor = list[t];
      const int64_t size = element_size(tensor.dtype);
      const int64_t bytes = (tensor.numel + tensor.offset) * size + 2 * kGuardBytes;
      const auto pages = static_cast<size_t>((bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
      memory_.push_back({static_cast<char*>(std::aligned_alloc(kPageBytes, pages)), pages});
      std::memset(memory_.back().begin, kGuard, pages);
      char* data = memory_.back().begin + kGuardBytes + tensor.offset * size;
      for (int64_t i = 0; i < tensor.numel; ++i) {
        write(data, tensor.dtype, i, values(static_cast<int64_t>(t), i));
      }
      spans.push_back({data, tensor.numel, tensor.dtype});
    }
    index_ = std::make_unique<FlatIndex>(spans);
  }
  Gradients(const Gradients&) = delete;
  Gradients& operator=(const Gradients&) = delete;
  ~Gradients() {
    for (const Memory& memory : memory_) std::free(memory.begin);
  }

  const List& list() const { return list_; }
  const FlatIndex& index() const { return *index_; }

  double get(size_t tensor, int64_t i) const {
    const Span& span = index_->spans()[tensor];
    return read(span.data, span.dtype, i);
  }

  // All memory, including the guards around the tensors.
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const Memory& memory : memory_) {
      all.insert(all.end(), memory.begin, memory.begin + memory.size);
    }
    return all;
  }

  bool guards_are_intact() const {
    for (size_t t = 0; t < memory_.size(); ++t) {
      const Span& span = index_->spans()[t];
      const char* begin = static_cast<const char*>(span.data);
      const char* end = begin + span.numel * element_size(span.dtype);
      for (const char* byte = memory_[t].begin; byte < begin; ++byte) {
        if (*byte != kGuard) return false;
      }
      for (const char* byte = end; byte < memory_[t].begin + memory_[t].size; ++byte) {
        if (*byte != kGuard) return false;
      }
    }
    return true;
  }

  // From now on a write crashes the program.
  void forbid_writing() { protect(PROT_READ); }
  void allow_writing() { protect(PROT_READ | PROT_WRITE); }

 private:
  struct Memory {
    char* begin;
    size_t size;
  };

  static constexpr int64_t kPageBytes = 4096;
  static constexpr int64_t kGuardBytes = 64;
  // Some 1.4e13 in float32, 1e306 in float64, 15 in float16 : a norm would show it.
  static constexpr char kGuard = 0x55;

  void protect(int protection) {
    for (const Memory& memory : memory_)
      CHECK(mprotect(memory.begin, memory.size, protection) == 0);
  }

  List list_;
  std::vector<Memory> memory_;
  std::unique_ptr<FlatIndex> index_;
};

// The tables of a list, for this many workers in each launch.
template <class AnyTable = SmallTable>
std::vector<AnyTable> tables_of(const FlatIndex& index, int64_t workers,
                                const std::vector<int64_t>& positions = {}) {
  const Plan plan(index, {nullptr, positions.data()}, kCapacity, workers);
  std::vector<AnyTable> tables;
  for (const Part& part : plan.parts()) {
    AnyTable table;
    std::memset(&table, 0x77, sizeof table);
    plan.fill(part, &table);
    tables.push_back(table);
  }
  return tables;
}

int32_t workers_of(const std::vector<SmallTable>& tables);

// `slots` may be null.
void run_power_sums(const std::vector<SmallTable>& tables, Norm kind, Precision precision,
                    Schedule schedule, Results* partials, Results* slots);

// A kernel that reads results has to tolerate an early start, whether or not it gets one.
void run_after_wait(int blocks, Schedule schedule, std::function<void()> body);

double run_finish(Norm kind, const Results& partials, int count, DType dtype, void* norm_result,
                  Schedule schedule);

Results run_tensor_norms(const std::vector<SmallBorderTable>& tables, int64_t tensors, Norm kind,
                         const Results& slots, Schedule schedule);

void run_scale(const std::vector<SmallTable>& tables, const Clip& clip, Schedule schedule);

Scalar known(double value);
Scalar on_gpu(const void* pointer, DType dtype);

// A norm in the dtype of the result, in memory that shows what is written beyond it.
class NormResult {
 public:
  explicit NormResult(DType dtype) : dtype_(dtype) { std::memset(memory_, 0x55, sizeof memory_); }
  void* place() { return memory_; }
  DType dtype() const { return dtype_; }
  double get() const { return read(memory_, dtype_, 0); }

  bool is_untouched_from(int64_t begin) const {
    for (int64_t i = begin; i < static_cast<int64_t>(sizeof memory_); ++i) {
      if (memory_[i] != 0x55) return false;
    }
    return true;
  }
  bool has_only_norm() const { return is_untouched_from(element_size(dtype_)); }

 private:
  DType dtype_;
  alignas(16) char memory_[16];
};

// From measured gradients; `partials` may be null where one block measures for itself.
Clip clip_of(Norm kind, const double* partials, int count, double max_norm, NormResult* result);

// With a norm that the caller gives.
Clip clip_of(Scalar norm, Scalar max_norm, NormResult* result);

// References, in long double.

long double power_sum_of(const Gradients& gradients, size_t tensor, Norm kind);

double root(Norm kind, long double power_sum);

double norm_of(const Gradients& gradients, Norm kind);

// Within two units of the last place. A norm in float32 may be further off, but only on lists that
// are built for it; see test_bad_lists.
template <class Number>
bool is_close(Number actual, Number expected) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected) || actual == expected) return actual == expected;
  const Number unit = std::nextafter(expected, static_cast<Number>(kInfinity)) - expected;
  return std::fabs(actual - expected) <= 2 * unit;
}

bool is_close_norm(double actual, double expected, Precision precision);

// One rounding to the compute type for the coefficient and one for the product, then one to what is
// stored. The product of two float32 is exact in float64.
double scaled(double value, double coefficient, DType dtype);

// Bitwise, except that any NaN equals any other.
bool is_same(double first, double second);

bool is_scaled(const Gradients& gradients, const Gradients& before, double coefficient);

std::string name_of(const List& list);

Precision precision_of(bool wide);

List small_mixed_list();

}  // namespace gradclip::cuda
