#include "lists.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "cpu/float16.h"

namespace gradclip::cuda::sweep {
namespace {

constexpr int64_t kBorder = 16;
constexpr int64_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0x55;
// Elements that one thread takes at once.
constexpr int64_t kPart = 1 << 20;

double read(const char* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, data + 4 * i, sizeof value);
      return static_cast<double>(value);
    }
    case DType::kFloat64: {
      double value;
      std::memcpy(&value, data + 8 * i, sizeof value);
      return value;
    }
    case DType::kFloat16: {
      cpu::Float16 value;
      std::memcpy(&value, data + 2 * i, sizeof value);
      return static_cast<double>(cpu::widen(value));
    }
    case DType::kBFloat16: {
      cpu::BFloat16 value;
      std::memcpy(&value, data + 2 * i, sizeof value);
      return static_cast<double>(cpu::widen(value));
    }
  }
  return 0.0;
}

template <class Value>
void put(char* data, int64_t i, Value value) {
  std::memcpy(data + static_cast<int64_t>(sizeof value) * i, &value, sizeof value);
}

void write(char* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat32:
      return put(data, i, static_cast<float>(value));
    case DType::kFloat64:
      return put(data, i, value);
    case DType::kFloat16: {
      cpu::Float16 half;
      cpu::narrow(static_cast<float>(value), &half);
      return put(data, i, half);
    }
    case DType::kBFloat16: {
      cpu::BFloat16 half;
      cpu::narrow(static_cast<float>(value), &half);
      return put(data, i, half);
    }
  }
}

// splitmix64: a number for each place, whatever thread asks.
uint64_t hash(uint64_t number) {
  number += 0x9e3779b97f4a7c15u;
  number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9u;
  number = (number ^ (number >> 27)) * 0x94d049bb133111ebu;
  return number ^ (number >> 31);
}

double uniform(uint64_t bits) { return static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63; }

// How far a product may be off: by its size, what the norm may be off and half a unit in the last
// place of the dtype; and half of the smallest number that the dtype holds.
struct Tolerance {
  double relative;
  double absolute;
};

constexpr double kNormTolerance = 0x1p-22;

Tolerance tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {kNormTolerance + 0x1.01p-11, 0x1p-25};
    case DType::kBFloat16:
      return {kNormTolerance + 0x1.01p-8, 0x1p-134};
    default:
      // Float32 also rounds the coefficient.
      return {kNormTolerance + 0x1p-23, 0x1p-149};
  }
}

}  // namespace

List::List(std::string name, std::vector<Shape> shapes)
    : name_(std::move(name)), shapes_(std::move(shapes)) {
  for (const Shape& shape : shapes_) {
    const int64_t size = element_size(shape.dtype);
    begin_.push_back(size_ + kGuardBytes + shape.offset * size);
    bytes_ += shape.numel * size;
    const int64_t end = begin_.back() + shape.numel * size;
    size_ = (end + kBorder - 1) / kBorder * kBorder;
  }
  size_ += kGuardBytes;
}

FlatIndex List::index(void* memory) const {
  std::vector<Span> spans;
  for (size_t i = 0; i < shapes_.size(); ++i) {
    spans.push_back({static_cast<char*>(memory) + begin_[i], shapes_[i].numel, shapes_[i].dtype});
  }
  return FlatIndex(spans);
}

void List::for_parts(const std::function<void(int64_t, int64_t, int64_t, int64_t)>& work) const {
  struct Part {
    int64_t tensor;
    int64_t begin;
    int64_t end;
  };
  std::vector<Part> parts;
  for (int64_t tensor = 0; tensor < tensors(); ++tensor) {
    const int64_t numel = shapes_[static_cast<size_t>(tensor)].numel;
    for (int64_t begin = 0; begin < numel; begin += kPart) {
      parts.push_back({tensor, begin, std::min(begin + kPart, numel)});
    }
  }
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i = next++; i < parts.size(); i = next++) {
      work(static_cast<int64_t>(i), parts[i].tensor, parts[i].begin, parts[i].end);
    }
  };
  // A thread costs more than a small list.
  const int64_t useful = bytes_ / (1 << 20);
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min(useful, cores); ++i) threads.emplace_back(take);
  take();
  for (std::thread& thread : threads) thread.join();
}

void List::fill(uint64_t seed, void* memory) const {
  char* bytes = static_cast<char*>(memory);
  int64_t end = 0;
  for (size_t i = 0; i < shapes_.size(); ++i) {
    std::memset(bytes + end, kGuard, static_cast<size_t>(begin_[i] - end));
    end = begin_[i] + shapes_[i].numel * element_size(shapes_[i].dtype);
  }
  std::memset(bytes + end, kGuard, static_cast<size_t>(size_ - end));
  for_parts([&](int64_t, int64_t tensor, int64_t begin, int64_t part_end) {
    const size_t t = static_cast<size_t>(tensor);
    const uint64_t stream = hash(seed + static_cast<uint64_t>(tensor));
    for (int64_t i = begin; i < part_end; ++i) {
      write(bytes + begin_[t], shapes_[t].dtype, i,
            uniform(hash(stream + static_cast<uint64_t>(i))));
    }
  });
}

double List::norm(const void* memory) const {
  const char* bytes = static_cast<const char*>(memory);
  // Each part by itself, then in their order, so that the number of threads plays no role.
  int64_t parts = 0;
  for (const Shape& shape : shapes_) parts += (shape.numel + kPart - 1) / kPart;
  std::vector<double> sums(static_cast<size_t>(parts), 0.0);
  for_parts([&](int64_t part, int64_t tensor, int64_t begin, int64_t end) {
    const size_t t = static_cast<size_t>(tensor);
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const double value = read(bytes + begin_[t], shapes_[t].dtype, i);
      sum += value * value;
    }
    sums[static_cast<size_t>(part)] = sum;
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return std::sqrt(sum);
}

std::string List::difference(const void* before, const void* after, double coefficient) const {
  const char* old_bytes = static_cast<const char*>(before);
  const char* new_bytes = static_cast<const char*>(after);
  if (coefficient == 1.0) {
    if (std::memcmp(before, after, static_cast<size_t>(size_)) == 0) return "";
    return "a coefficient of 1, and yet something was written";
  }
  int64_t end = 0;
  for (size_t i = 0; i <= shapes_.size(); ++i) {
    const int64_t begin = i < shapes_.size() ? begin_[i] : size_;
    if (std::memcmp(old_bytes + end, new_bytes + end, static_cast<size_t>(begin - end)) != 0) {
      return "written outside of the tensors, before tensor " + std::to_string(i);
    }
    if (i < shapes_.size()) end = begin + shapes_[i].numel * element_size(shapes_[i].dtype);
  }
  std::mutex mutex;
  std::string found;
  for_parts([&](int64_t, int64_t tensor, int64_t begin, int64_t part_end) {
    const size_t t = static_cast<size_t>(tensor);
    const DType dtype = shapes_[t].dtype;
    const Tolerance tolerance = tolerance_of(dtype);
    for (int64_t i = begin; i < part_end; ++i) {
      const double expected = read(old_bytes + begin_[t], dtype, i) * coefficient;
      const double actual = read(new_bytes + begin_[t], dtype, i);
      const double allowed = tolerance.relative * std::fabs(expected) + tolerance.absolute;
      // NaN is never within it.
      if (std::fabs(actual - expected) <= allowed) continue;
      char text[160];
      std::snprintf(text, sizeof text, "tensor %lld, element %lld is %.9g and not %.9g",
                    static_cast<long long>(tensor), static_cast<long long>(i), actual, expected);
      const std::lock_guard<std::mutex> lock(mutex);
      if (found.empty()) found = text;
      return;
    }
  });
  return found;
}

bool is_right_norm(double actual, double expected) {
  return std::fabs(actual - expected) <= kNormTolerance * expected;
}

List equal_tensors(int64_t bytes, int64_t tensors) {
  const int64_t numel = std::max<int64_t>(1, bytes / 4 / tensors);
  const std::string size =
      bytes >= 1 << 20 ? std::to_string(bytes >> 20) + " MB" : std::to_string(bytes >> 10) + " KB";
  return List(size + " in " + std::to_string(tensors),
              std::vector<Shape>(static_cast<size_t>(tensors), {numel, DType::kFloat32}));
}

List mixed() {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  std::vector<Shape> shapes;
  for (int64_t i = 0; i < 39; ++i) {
    const int64_t numel = i % 5 == 0 ? 1 + i % 3 : 1 + 401 * i * (i % 7);
    const DType dtype = kDTypes[i % 4];
    shapes.push_back({numel, dtype, i % 3 == 0 ? 0 : i % (16 / element_size(dtype))});
  }
  shapes.push_back({300'003, DType::kFloat32, 1});
  return List("mixed", shapes);
}

List resnet50() {
  std::vector<Shape> shapes;
  const auto add = [&](int64_t numel) { shapes.push_back({numel, DType::kFloat32}); };
  const auto add_normalized = [&](int64_t outputs, int64_t inputs, int64_t side) {
    add(outputs * inputs * side * side);
    add(outputs);
    add(outputs);
  };
  add_normalized(64, 3, 7);
  int64_t inputs = 64;
  int64_t width = 64;
  for (const int blocks : {3, 4, 6, 3}) {
    for (int block = 0; block < blocks; ++block) {
      add_normalized(width, inputs, 1);
      add_normalized(width, width, 3);
      add_normalized(4 * width, width, 1);
      if (block == 0) add_normalized(4 * width, inputs, 1);
      inputs = 4 * width;
    }
    width *= 2;
  }
  add(1000 * 2048);
  add(1000);
  return List("ResNet-50", shapes);
}

List gpt2() {
  constexpr int64_t kWidth = 768;
  std::vector<Shape> shapes;
  const auto add = [&](int64_t rows, int64_t columns) {
    shapes.push_back({rows * columns, DType::kFloat32});
  };
  add(50257, kWidth);
  add(1024, kWidth);
  for (int block = 0; block < 12; ++block) {
    for (const int64_t rows : {1, 1}) add(rows, kWidth);
    for (const int64_t rows : {kWidth, int64_t{1}}) add(rows, 3 * kWidth);
    for (const int64_t rows : {kWidth, int64_t{1}}) add(rows, kWidth);
    for (const int64_t rows : {1, 1}) add(rows, kWidth);
    for (const int64_t rows : {kWidth, int64_t{1}}) add(rows, 4 * kWidth);
    for (const int64_t rows : {4 * kWidth, int64_t{1}}) add(rows, kWidth);
  }
  for (const int64_t rows : {1, 1}) add(rows, kWidth);
  return List("GPT-2", shapes);
}

List llama3_blocks(int blocks) {
  constexpr int64_t kWidth = 4096;
  constexpr int64_t kKeys = 1024;
  constexpr int64_t kHidden = 14336;
  std::vector<Shape> shapes;
  for (int block = 0; block < blocks; ++block) {
    for (const int64_t rows : {kWidth, kKeys, kKeys, kWidth, kHidden, kHidden, kHidden}) {
      shapes.push_back({rows * kWidth, DType::kBFloat16});
    }
    for (int i = 0; i < 2; ++i) shapes.push_back({kWidth, DType::kBFloat16});
  }
  return List(std::to_string(blocks) + " blocks of Llama-3-8B", shapes);
}

}  // namespace gradclip::cuda::sweep
