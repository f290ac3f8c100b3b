#include "kernel_testing.h"

#include <algorithm>
#include <random>
#include <utility>

#include "cpu/float16.h"
#include "cuda/plan.h"

namespace gradclip::cuda {

bool quick = false;
int64_t checks = 0;
std::string subject;

void check(bool condition, const char* what, int line) {
  ++checks;
  if (!condition) emulation::fail("line %d: not true: %s (%s)", line, what, subject.c_str());
}

uint64_t bits(double number) { return emulation::same_bits<uint64_t>(number); }

bool is_poison(double number) { return bits(number) == bits(kPoison); }

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

double rounded(double value, DType dtype) {
  double place;
  write(&place, dtype, 0, value);
  return read(&place, dtype, 0);
}

Values random_values(double magnitude) {
  auto random = std::make_shared<std::mt19937>(1);
  return [random, magnitude](int64_t, int64_t) {
    return magnitude * (static_cast<double>((*random)()) / 0x1p31 - 1.0);
  };
}

int32_t workers_of(const std::vector<SmallTable>& tables) {
  return tables.back().first_worker + tables.back().workers;
}

void run_power_sums(const std::vector<SmallTable>& tables, Norm kind, Precision precision,
                    Schedule schedule, Results* partials, Results* slots) {
  double* of_tensors = slots == nullptr ? nullptr : slots->to_write();
  for (const SmallTable& table : tables) {
    Grid({table.workers, kThreads}, schedule, [&] {
      power_sums_thread(table, kind, precision, partials->to_write(), of_tensors);
    }).run();
  }
  partials->publish();
  CHECK(partials->is_complete());
  if (slots == nullptr) return;
  slots->publish();
  CHECK(slots->is_complete());
}

void run_after_wait(int blocks, Schedule schedule, std::function<void()> body) {
  Grid grid({blocks, kThreads, /*early=*/true}, schedule, std::move(body));
  grid.run_to_wait();
  grid.run();
}

double run_finish(Norm kind, const Results& partials, int count, DType dtype, void* norm_result,
                  Schedule schedule) {
  double power_sum = kPoison;
  run_after_wait(1, schedule, [&] {
    finish_thread(kind, partials.to_read(), count, &power_sum, dtype, norm_result);
  });
  return power_sum;
}

Results run_tensor_norms(const std::vector<SmallBorderTable>& tables, int64_t tensors, Norm kind,
                         const Results& slots, Schedule schedule) {
  Results norms(tensors);
  for (const SmallBorderTable& table : tables) {
    constexpr int kTensorsPerBlock = kThreads / emulation::kWarpThreads;
    const int blocks = (table.tensors + kTensorsPerBlock - 1) / kTensorsPerBlock;
    run_after_wait(blocks, schedule,
                   [&] { tensor_norms_thread(table, kind, slots.to_read(), norms.to_write()); });
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

Clip clip_of(Norm kind, const double* partials, int count, double max_norm, NormResult* result) {
  Clip clip = {};
  clip.partials = partials;
  clip.count = count;
  clip.kind = kind;
  clip.given_norm = known(kPoison);
  clip.max_norm = known(max_norm);
  clip.norm_result = result == nullptr ? nullptr : result->place();
  clip.norm_dtype = result == nullptr ? DType::kFloat32 : result->dtype();
  return clip;
}

Clip clip_of(Scalar norm, Scalar max_norm, NormResult* result) {
  Clip clip = clip_of(Norm::kL2, nullptr, 0, kPoison, result);
  clip.given_norm = norm;
  clip.max_norm = max_norm;
  return clip;
}

long double power_sum_of(const Gradients& gradients, size_t tensor, Norm kind) {
  long double sum = 0.0L;
  for (int64_t i = 0; i < gradients.list()[tensor].numel; ++i) {
    const long double value = std::fabs(static_cast<long double>(gradients.get(tensor, i)));
    if (kind == Norm::kInf) {
      if (value > sum || std::isnan(value)) sum = value;
    } else {
      sum += kind == Norm::kL2 ? value * value : value;
    }
  }
  return sum;
}

double root(Norm kind, long double power_sum) {
  return static_cast<double>(kind == Norm::kL2 ? std::sqrt(power_sum) : power_sum);
}

double norm_of(const Gradients& gradients, Norm kind) {
  long double sum = 0.0L;
  for (size_t t = 0; t < gradients.list().size(); ++t) {
    const long double own = power_sum_of(gradients, t, kind);
    if (kind != Norm::kInf) {
      sum += own;
    } else if (own > sum || std::isnan(own)) {
      sum = own;
    }
  }
  return root(kind, sum);
}

bool is_close_norm(double actual, double expected, Precision precision) {
  return precision == Precision::kFloat64
             ? is_close(actual, expected)
             : is_close(static_cast<float>(actual), static_cast<float>(expected));
}

double scaled(double value, double coefficient, DType dtype) {
  if (dtype == DType::kFloat64) return value * coefficient;
  const bool is_tiny = std::fabs(coefficient) < 0x1p-100;
  const double factor = is_tiny ? coefficient : static_cast<float>(coefficient);
  return rounded(static_cast<float>(value * factor), dtype);
}

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

std::string name_of(const List& list) {
  std::string name;
  for (const Tensor& tensor : list) {
    name += std::to_string(tensor.numel) + " of dtype " +
            std::to_string(static_cast<int>(tensor.dtype)) + " at " +
            std::to_string(tensor.offset) + ", ";
  }
  return name;
}

Precision precision_of(bool wide) { return wide ? Precision::kFloat64 : Precision::kFloat32; }

List small_mixed_list() {
  return {{3 * tile_elements(DType::kFloat32) + 5, DType::kFloat32, 1},
          {77, DType::kFloat64},
          {tile_elements(DType::kFloat16), DType::kFloat16, 3},
          {1001, DType::kBFloat16, 1}};
}

}  // namespace gradclip::cuda
