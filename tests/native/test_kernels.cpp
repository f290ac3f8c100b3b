// The bodies of the CUDA kernels, run on the CPU by emulation.h: an emulation and never a test on a
// GPU. Any schedule gives the same bits, norms and elements are right, every slot is written, no
// byte outside of a tensor changes, and nothing is read before it is complete. Built and run by
// tests/native/test_cuda_kernels.py.
#include <sched.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "cpu/float16.h"
#include "cuda/clip.h"
#include "cuda/table.h"
#include "grid.h"
#include "kernels.h"

namespace gradclip::cuda {
namespace {

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
bool quick = false;
int64_t checks = 0;
// What is being tested, for the message of a check that fails.
std::string subject;

void check(bool condition, const char* what, int line) {
  ++checks;
  if (!condition) emulation::fail("line %d: not true: %s (%s)", line, what, subject.c_str());
}
#define CHECK(condition) check(condition, #condition, __LINE__)

uint64_t bits(double number) { return emulation::same_bits<uint64_t>(number); }

// What a place holds that no kernel has written: a NaN that no arithmetic makes.
const double kPoison = emulation::same_bits<double>(uint64_t{0x7ff8dead'beef0000});
bool is_poison(double number) { return bits(number) == bits(kPoison); }

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

double read(const void* data, DType dtype, int64_t i) {
  const char* place = static_cast<const char*>(data) + i * element_size(dtype);
  float single;
  double number;
  cpu::Float16 half;
  cpu::BFloat16 brain;
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(&single, place, sizeof single);
      return single;
    case DType::kFloat64:
      std::memcpy(&number, place, sizeof number);
      return number;
    case DType::kFloat16:
      std::memcpy(&half, place, sizeof half);
      return cpu::widen(half);
    case DType::kBFloat16:
      std::memcpy(&brain, place, sizeof brain);
      return cpu::widen(brain);
  }
  return kNaN;
}

void write(void* data, DType dtype, int64_t i, double value) {
  char* place = static_cast<char*>(data) + i * element_size(dtype);
  const float single = static_cast<float>(value);
  cpu::Float16 half;
  cpu::BFloat16 brain;
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(place, &single, sizeof single);
      break;
    case DType::kFloat64:
      std::memcpy(place, &value, sizeof value);
      break;
    case DType::kFloat16:
      cpu::narrow(single, &half);
      std::memcpy(place, &half, sizeof half);
      break;
    case DType::kBFloat16:
      cpu::narrow(single, &brain);
      std::memcpy(place, &brain, sizeof brain);
      break;
  }
}

// As the dtype holds it.
double rounded(double value, DType dtype) {
  double place;
  write(&place, dtype, 0, value);
  return read(&place, dtype, 0);
}

// The value of an element; the first argument is its tensor.
using Values = std::function<double(int64_t, int64_t)>;

Values random_values(double magnitude) {
  auto random = std::make_shared<std::mt19937>(1);
  return [random, magnitude](int64_t, int64_t) {
    return magnitude * (static_cast<double>((*random)()) / 0x1p31 - 1.0);
  };
}

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

  // All memory, with what lies around the tensors.
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

  // From now on whoever writes ends the program.
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

// The tables of a list, as kernels.cu makes them for this many workers in each launch.
std::vector<SmallTable> tables_of(const FlatIndex& index, int64_t workers) {
  std::vector<SmallTable> tables;
  int32_t first_worker = 0;
  for (int64_t begin = 0; begin < index.tensors(); begin += kCapacity) {
    const int64_t end = std::min<int64_t>(begin + kCapacity, index.tensors());
    const int64_t first_tile = index.first_tile(begin);
    const int64_t behind = end < index.tensors() ? index.first_tile(end) : index.tiles();
    SmallTable table;
    std::memset(&table, 0x77, sizeof table);
    table.tensors = static_cast<int32_t>(end - begin);
    table.tiles = static_cast<uint32_t>(behind - first_tile);
    table.workers = static_cast<int32_t>(std::min(workers, behind - first_tile));
    table.first_worker = first_worker;
    table.first_tensor = static_cast<int32_t>(begin);
    for (int64_t i = 0; i < end - begin; ++i) {
      const Span& span = index.spans()[static_cast<size_t>(begin + i)];
      table.data[i] = span.data;
      table.numel_and_dtype[i] = pack(span.numel, span.dtype);
      table.first_tile[i] = static_cast<uint32_t>(index.first_tile(begin + i) - first_tile);
    }
    first_worker += table.workers;
    tables.push_back(table);
  }
  return tables;
}

int32_t workers_of(const std::vector<SmallTable>& tables) {
  return tables.back().first_worker + tables.back().workers;
}

// `slots` may be null.
void run_power_sums(const std::vector<SmallTable>& tables, Norm norm, bool exact, Schedule schedule,
                    Results* partials, Results* slots) {
  double* of_tensors = slots == nullptr ? nullptr : slots->to_write();
  for (const SmallTable& table : tables) {
    Grid({table.workers, kThreads}, schedule, [&] {
      power_sums_thread(table, norm, exact, partials->to_write(), of_tensors);
    }).run();
  }
  partials->publish();
  CHECK(partials->is_complete());
  if (slots == nullptr) return;
  slots->publish();
  CHECK(slots->is_complete());
}

// A kernel that reads results has to bear an early start, whether or not it is given one.
void run_after_wait(int blocks, Schedule schedule, std::function<void()> body) {
  Grid grid({blocks, kThreads, /*early=*/true}, schedule, std::move(body));
  grid.run_to_wait();
  grid.run();
}

double run_finish(Norm norm, const Results& partials, int count, DType dtype, void* norm_result,
                  Schedule schedule) {
  double power_sum = kPoison;
  run_after_wait(1, schedule, [&] {
    finish_thread(norm, partials.to_read(), count, &power_sum, dtype, norm_result);
  });
  return power_sum;
}

Results run_tensor_norms(const std::vector<SmallTable>& tables, int64_t tensors, Norm norm,
                         const Results& slots, Schedule schedule) {
  Results norms(tensors);
  for (const SmallTable& table : tables) {
    constexpr int kTensorsPerBlock = kThreads / emulation::kWarpThreads;
    const int blocks = (table.tensors + kTensorsPerBlock - 1) / kTensorsPerBlock;
    run_after_wait(blocks, schedule,
                   [&] { tensor_norms_thread(table, norm, slots.to_read(), norms.to_write()); });
  }
  norms.publish();
  CHECK(norms.is_complete());
  return norms;
}

void run_scale(const std::vector<SmallTable>& tables, const Clip& clip, Schedule schedule) {
  for (const SmallTable& table : tables) {
    run_after_wait(table.workers, schedule, [&] { scale_thread(table, clip); });
  }
}

Scalar known(double value) { return {value, nullptr, DType::kFloat64}; }
Scalar on_gpu(const void* pointer, DType dtype) { return {kPoison, pointer, dtype}; }

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
Clip clip_of(Norm norm, const double* partials, int count, double max_norm, NormResult* result) {
  Clip clip = {};
  clip.partials = partials;
  clip.count = count;
  clip.norm = norm;
  clip.given_norm = known(kPoison);
  clip.max_norm = known(max_norm);
  clip.norm_result = result == nullptr ? nullptr : result->place();
  clip.norm_dtype = result == nullptr ? DType::kFloat32 : result->dtype();
  return clip;
}

// With a norm that the caller gives.
Clip clip_of(Scalar norm, Scalar max_norm, NormResult* result) {
  Clip clip = clip_of(Norm::kL2, nullptr, 0, kPoison, result);
  clip.given_norm = norm;
  clip.max_norm = max_norm;
  return clip;
}

// References, in long double.

long double power_sum_of(const Gradients& gradients, size_t tensor, Norm norm) {
  long double sum = 0.0L;
  for (int64_t i = 0; i < gradients.list()[tensor].numel; ++i) {
    const long double value = std::fabs(static_cast<long double>(gradients.get(tensor, i)));
    if (norm == Norm::kInf) {
      if (value > sum || std::isnan(value)) sum = value;
    } else {
      sum += norm == Norm::kL2 ? value * value : value;
    }
  }
  return sum;
}

double root(Norm norm, long double power_sum) {
  return static_cast<double>(norm == Norm::kL2 ? std::sqrt(power_sum) : power_sum);
}

double norm_of(const Gradients& gradients, Norm norm) {
  long double sum = 0.0L;
  for (size_t t = 0; t < gradients.list().size(); ++t) {
    const long double own = power_sum_of(gradients, t, norm);
    if (norm != Norm::kInf) {
      sum += own;
    } else if (own > sum || std::isnan(own)) {
      sum = own;
    }
  }
  return root(norm, sum);
}

// Within two units of the last place.
template <class Number>
bool is_close(Number actual, Number expected) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected) || actual == expected) return actual == expected;
  const Number unit = std::nextafter(expected, static_cast<Number>(kInfinity)) - expected;
  return std::fabs(actual - expected) <= 2 * unit;
}

// A norm that is to be good for float64 or, where `exact` is false, float32.
bool is_close_norm(double actual, double expected, bool exact) {
  return exact ? is_close(actual, expected)
               : is_close(static_cast<float>(actual), static_cast<float>(expected));
}

// One rounding to the compute type for the coefficient and one for the product, then one to what is
// stored. The product of two float32 is exact in float64.
double scaled(double value, double coefficient, DType dtype) {
  if (dtype == DType::kFloat64) return value * coefficient;
  const bool is_tiny = std::fabs(coefficient) < 0x1p-100;
  const double factor = is_tiny ? coefficient : static_cast<float>(coefficient);
  return rounded(static_cast<float>(value * factor), dtype);
}

// By bits, but for those of NaN.
bool is_same(double first, double second) {
  return bits(first) == bits(second) || (std::isnan(first) && std::isnan(second));
}

bool is_scaled(const Gradients& gradients, const Gradients& before, double coefficient) {
  for (size_t t = 0; t < before.list().size(); ++t) {
    const DType dtype = before.list()[t].dtype;
    for (int64_t i = 0; i < before.list()[t].numel; ++i) {
      const double expected = scaled(before.get(t, i), coefficient, dtype);
      if (!is_same(gradients.get(t, i), expected)) return false;
    }
  }
  return gradients.guards_are_intact();
}

struct Case {
  List list;
  std::function<Values()> values;
  Norm norm = Norm::kL2;
  bool exact = false;
  int64_t workers = 3;
  // Of the norm.
  double limit = 0.37;
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

// Measures and scales. The scaling kernel starts early: it has come to its wait before the
// measuring one begins.
Outcome clipped(const Case& one, Schedule schedule) {
  const Gradients before(one.list, one.values());
  Gradients gradients(one.list, one.values());
  const double expected = norm_of(before, one.norm);
  const double max_norm = std::isfinite(expected) ? one.limit * expected : 1.0;

  const std::vector<SmallTable> tables = tables_of(gradients.index(), one.workers);
  const int32_t workers = workers_of(tables);
  const int64_t tensors = gradients.index().tensors();
  Outcome outcome = {
      Results(workers), Results(slot_count(tensors, workers)), Results(tensors), kPoison, {}};
  const DType dtype = one.exact ? DType::kFloat64 : DType::kFloat32;
  NormResult norm_result(dtype);
  const Clip clip = clip_of(one.norm, outcome.partials.to_read(), workers, max_norm, &norm_result);
  // A launch that starts early is the first of several.
  const SmallTable& first = tables.front();
  const emulation::Launch launch = {first.workers, kThreads, /*early=*/true};
  Grid scale(launch, schedule, [&] { scale_thread(first, clip); });
  const std::vector<char> bytes = gradients.bytes();
  scale.run_to_wait();
  CHECK(gradients.bytes() == bytes);
  CHECK(norm_result.is_untouched_from(0));

  run_power_sums(tables, one.norm, one.exact, schedule, &outcome.partials, &outcome.slots);
  CHECK(gradients.bytes() == bytes);
  Results partials(workers);
  run_power_sums(tables, one.norm, one.exact, schedule, &partials, nullptr);
  CHECK(partials == outcome.partials);

  // Not in order on a GPU, where nothing stands between the two; here it lets both be compared.
  NormResult finished(dtype);
  outcome.power_sum =
      run_finish(one.norm, outcome.partials, workers, dtype, finished.place(), schedule);
  const double norm = finish(one.norm, outcome.power_sum);
  CHECK(is_close_norm(norm, expected, one.exact));
  CHECK(is_same(finished.get(), rounded(norm, dtype)));
  CHECK(finished.has_only_norm());

  outcome.norms = run_tensor_norms(tables, tensors, one.norm, outcome.slots, schedule);
  for (size_t t = 0; t < one.list.size(); ++t) {
    const double of_tensor = root(one.norm, power_sum_of(before, t, one.norm));
    CHECK(is_close_norm(outcome.norms.to_read()[t], of_tensor, one.exact));
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

std::string name_of(const List& list) {
  std::string name;
  for (const Tensor& tensor : list) {
    name += std::to_string(tensor.numel) + " of dtype " +
            std::to_string(static_cast<int>(tensor.dtype)) + " at " +
            std::to_string(tensor.offset) + ", ";
  }
  return name;
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
        for (const Norm norm : kNorms) {
          // Each norm meets each schedule, precision and number of workers, but not all at once.
          ++turn;
          Case one = {list, signed_values, norm};
          one.exact = turn % 2 == 0;
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
      test_on_every_schedule({list, signed_values, kNorms[turn % 3], turn % 2 == 0, workers});
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
      for (const Norm norm : kNorms) {
        for (const bool exact : {false, true}) {
          if (quick && exact) continue;
          clipped({list, all[v], norm, exact, 3}, kSchedules[v % std::size(kSchedules)]);
        }
      }
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
        for (const Norm norm : kNorms) {
          if (quick && static_cast<size_t>(norm) != turn % 3) continue;
          subject = name_of(list) + std::to_string(bad);
          const Case one = {list, [&values] { return values; }, norm, place.second == 0, 4};
          const Schedule schedule = kSchedules[(static_cast<size_t>(norm) + 1) % 4];
          const Outcome outcome = clipped(one, schedule);
          CHECK(std::isnan(bad) ? std::isnan(outcome.power_sum) : outcome.power_sum == kInfinity);
          // As torch: NaN spreads to all elements, infinity makes itself NaN and all others 0.
          const Gradients gradients(list, values);
          const std::vector<SmallTable> tables = tables_of(gradients.index(), one.workers);
          run_scale(tables,
                    clip_of(norm, outcome.partials.to_read(), workers_of(tables), 1.0, nullptr),
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

List small_mixed_list() {
  return {{3 * tile_elements(DType::kFloat32) + 5, DType::kFloat32, 1},
          {77, DType::kFloat64},
          {tile_elements(DType::kFloat16), DType::kFloat16, 3},
          {1001, DType::kBFloat16, 1}};
}

// Nothing is written where the coefficient is 1, not even what is there already.
void test_quiet() {
  for (const double limit : {1.001, kInfinity}) {
    for (const double bad : {0.25, kInfinity, kNaN}) {
      // Only without a limit does such a norm leave the gradients alone.
      if (!std::isfinite(bad) && std::isfinite(limit)) continue;
      subject = "quiet " + std::to_string(limit) + " " + std::to_string(bad);
      const Values values = [bad](int64_t, int64_t i) { return i == 5 ? bad : 0.5; };
      Gradients gradients(small_mixed_list(), values);
      const double norm = norm_of(gradients, Norm::kL2);
      const std::vector<SmallTable> tables = tables_of(gradients.index(), 3);
      NormResult norm_result(DType::kFloat64);
      const double max_norm = std::isinf(limit) ? limit : limit * norm;
      gradients.forbid_writing();
      for (const Schedule& schedule : kSchedules) {
        Results partials(workers_of(tables));
        run_power_sums(tables, Norm::kL2, true, schedule, &partials, nullptr);
        const Clip clip =
            clip_of(Norm::kL2, partials.to_read(), workers_of(tables), max_norm, &norm_result);
        run_scale(tables, clip, schedule);
        CHECK(is_close(norm_result.get(), norm));
        SmallTable table = tables.front();
        table.workers = 1;
        Grid({1, kThreads}, schedule, [&] { clip_in_one_block_thread(table, true, clip); }).run();
      }
      gradients.allow_writing();
    }
  }
}

// A norm that the caller gives, and limits; each as a number or on the GPU, where it is complete
// only when the kernel before has ended.
void test_given_numbers() {
  for (const double norm : {0.5, 8.0, 1e300, kInfinity, kNaN}) {
    for (const double limit : {0.0, 3.0, -1.0, kNaN, kInfinity}) {
      for (const int where : {0, 1, 2, 3}) {
        const bool norm_on_gpu = (where & 1) != 0;
        const bool limit_on_gpu = (where & 2) != 0;
        // The binding refuses these before it launches anything.
        if (!limit_on_gpu && !(limit >= 0.0)) continue;
        subject = "norm " + std::to_string(norm) + ", limit " + std::to_string(limit);
        const Gradients before(small_mixed_list(), random_values(1.0));
        const Gradients gradients(small_mixed_list(), random_values(1.0));
        const std::vector<SmallTable> tables = tables_of(gradients.index(), 4);
        Results numbers(2);
        NormResult norm_result(DType::kFloat64);
        const Clip clip =
            clip_of(norm_on_gpu ? on_gpu(numbers.to_read(), DType::kFloat64) : known(norm),
                    limit_on_gpu ? on_gpu(numbers.to_read() + 1, DType::kFloat64) : known(limit),
                    &norm_result);
        const SmallTable& table = tables.front();
        const emulation::Launch launch = {table.workers, kThreads, /*early=*/true};
        Grid scale(launch, kSchedules[where], [&] { scale_thread(table, clip); });
        scale.run_to_wait();
        numbers.to_write()[0] = norm;
        numbers.to_write()[1] = limit;
        numbers.publish();
        scale.run();
        const double coefficient = limit >= 0.0 ? clip_coefficient(limit, norm) : kNaN;
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
    for (const Norm norm : kNorms) {
      for (const double limit : {0.3, 2.0}) {
        subject = "one block " + name_of(list);
        const bool exact = limit > 1.0;
        const Gradients before(list, random_values(1.0));
        const double expected = norm_of(before, norm);
        const double max_norm = limit * expected;
        double first = kPoison;
        for (const Schedule& schedule : kSchedules) {
          const Gradients gradients(list, random_values(1.0));
          SmallTable table = tables_of(gradients.index(), 1).front();
          NormResult norm_result(DType::kFloat64);
          const Clip clip = clip_of(norm, nullptr, 0, max_norm, &norm_result);
          Grid({1, kThreads}, schedule, [&] {
            clip_in_one_block_thread(table, exact, clip);
          }).run();
          const double actual = norm_result.get();
          CHECK(is_close_norm(actual, expected, exact));
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
    for (const SmallTable& table : tables_of(gradients.index(), workers)) {
      const Schedule schedule = kSchedules[workers % 4];
      Grid({table.workers, kThreads}, schedule, [&] {
        scale_each_thread(table, coefficients);
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

// The end of a call that only measures, for any number of workers and each dtype of the result.
void test_finish() {
  for (const int count :
       {1, 2, 31, 32, 33, kThreads - 1, kThreads, kThreads + 1, 3 * kThreads + 5}) {
    for (const Norm norm : kNorms) {
      Results partials(count);
      long double sum = 0.0L;
      for (int i = 0; i < count; ++i) {
        const double value = 1.0 / (i + 1);
        partials.to_write()[i] = value;
        sum = norm == Norm::kInf ? std::max<long double>(sum, value) : sum + value;
      }
      partials.publish();
      subject = "finish " + std::to_string(count);
      for (const DType dtype : kDTypes) {
        NormResult norm_result(dtype);
        const double power_sum =
            run_finish(norm, partials, count, dtype, norm_result.place(), kSchedules[count % 4]);
        CHECK(is_close(power_sum, static_cast<double>(sum)));
        CHECK(norm_result.get() == rounded(finish(norm, power_sum), dtype));
        CHECK(norm_result.has_only_norm());
      }
      CHECK(!is_poison(run_finish(norm, partials, count, DType::kFloat32, nullptr, kSchedules[0])));
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
  test_not_finite();
  test_quiet();
  test_given_numbers();
  test_given_dtypes();
  test_tiny_coefficients();
  test_one_block();
  test_scale_each();
  test_clamp();
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
