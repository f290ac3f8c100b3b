#include "binding/cpu_engine.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/passes.h"

namespace gradclip::binding {
namespace {

// Below this, waking a second thread costs more than it saves.
constexpr int64_t kSerialBytes = 512 * 1024;

// Calls work(range of tiles) on torch's own threads, as many as torch.set_num_threads allows. Each
// thread gets one contiguous share, and the same share for the same index every time.
template <class Work>
void for_all_tiles(const FlatIndex& index, bool serial, const Work& work) {
  const int64_t tiles = index.tiles();
  if (tiles == 0) return;
  if (serial || index.bytes() < kSerialBytes) {
    work(Range{0, tiles});
    return;
  }
  at::parallel_for(0, tiles, /*grain_size=*/1,
                   [&](int64_t begin, int64_t end) { work(Range{begin, end}); });
}

// Runs a writing pass. Threads must not race on memory that two tensors share, so such a list is
// written serially, one tensor after another.
template <class Work>
void write(const TensorList& tensors, const Work& work) {
  const FlatIndex& index = tensors.index_for_writing();
  const bool serial = index.bytes() >= kSerialBytes && tensors.share_memory();
  for_all_tiles(index, serial, [&](Range tiles) { work(index, tiles); });
}

// The power sum of each tile; `decay` may be null.
std::vector<double> measured_tiles(const FlatIndex& index, Norm kind, Precision precision,
                                   const Decay* decay) {
  std::vector<double> sums(static_cast<size_t>(index.tiles()));
  for_all_tiles(index, /*serial=*/false, [&](Range tiles) {
    cpu::power_sums(index, kind, precision, decay, tiles, sums.data());
  });
  return sums;
}

double measured(const TensorList& tensors, Norm kind, Precision precision) {
  return cpu::total_power_sum(
      kind, measured_tiles(tensors.index_for_reading(), kind, precision, nullptr));
}

void scale_by(const TensorList& tensors, double coefficient) {
  // Not >= 1: NaN has to propagate to the gradients.
  if (coefficient == 1.0) return;
  write(tensors,
        [&](const FlatIndex& index, Range tiles) { cpu::scale(index, coefficient, tiles); });
}

// A 0-dim tensor, allocated without the dispatcher.
at::Tensor scalar_tensor(double value, at::ScalarType dtype) {
  at::Tensor tensor(at::detail::empty_cpu({}, dtype));
  void* data = tensor.mutable_data_ptr();
  switch (dtype) {
    case at::kDouble:
      *static_cast<double*>(data) = value;
      break;
    case at::kFloat:
      *static_cast<float*>(data) = static_cast<float>(value);
      break;
    case at::kHalf:
      *static_cast<at::Half*>(data) = static_cast<float>(value);
      break;
    case at::kBFloat16:
      *static_cast<at::BFloat16*>(data) = static_cast<float>(value);
      break;
    default:
      TORCH_INTERNAL_ASSERT(false, "no norm has dtype ", dtype);
  }
  return tensor;
}

Norms norms_of(const TensorList& tensors, const FlatIndex& index, Norm kind, Precision precision,
               const Decay* decay) {
  const std::vector<double> sums = measured_tiles(index, kind, precision, decay);
  const std::vector<double> norms = cpu::tensor_norms(index, kind, sums);
  const at::Tensor each(at::detail::empty_cpu({tensors.listed()}, at::kDouble));
  double* values = each.mutable_data_ptr<double>();
  std::fill_n(values, tensors.listed(), 0.0);
  const std::vector<int64_t> positions = tensors.positions();
  for (size_t i = 0; i < positions.size(); ++i) values[positions[i]] = norms[i];
  return {scalar_tensor(finish(kind, cpu::total_power_sum(kind, sums)), at::kDouble), each};
}

// A longer row leaves the cache of a core before it is scaled, and is shared out among threads.
constexpr int64_t kLongRowBytes = 256 * 1024;

bool is_long(const Rows& rows) { return rows.bytes_of_row() > kLongRowBytes; }

void append_rows(const Span& span, int64_t count, std::vector<Span>* rows) {
  const int64_t length = span.numel / count;
  const int64_t bytes = length * element_size(span.dtype);
  for (int64_t row = 0; row < count; ++row) {
    rows->push_back({static_cast<char*>(span.data) + row * bytes, length, span.dtype});
  }
}

// In one pass: each thread measures and scales rows of its own. Returns the smallest coefficient.
double clip_short_rows(const std::vector<Rows>& rows, const UnitLimit& limit) {
  std::vector<Span> gradients;
  for (const Rows& own : rows) gradients.push_back(own.gradient);
  const FlatIndex index(std::move(gradients));
  std::vector<double> smallest(static_cast<size_t>(index.tiles()), 1.0);
  for_all_tiles(index, /*serial=*/false, [&](Range tiles) {
    smallest[static_cast<size_t>(tiles.begin)] = cpu::clip_rows(index, rows.data(), limit, tiles);
  });
  return smallest.empty() ? 1.0 : *std::min_element(smallest.begin(), smallest.end());
}

// In three passes, each row as if it were a tensor. Returns the smallest coefficient.
double clip_long_rows(const std::vector<Rows>& rows, const UnitLimit& limit) {
  std::vector<Span> gradients;
  std::vector<Span> weights;
  for (const Rows& own : rows) {
    append_rows(own.gradient, own.count, &gradients);
    append_rows(own.weights, own.count, &weights);
  }
  const auto norms_of_rows = [](const FlatIndex& index) {
    return cpu::tensor_norms(index, Norm::kL2,
                             measured_tiles(index, Norm::kL2, Precision::kFloat32, nullptr));
  };
  const FlatIndex index(std::move(gradients));
  const std::vector<double> norms = norms_of_rows(index);
  std::vector<double> coefficients = norms_of_rows(FlatIndex(std::move(weights)));
  double smallest = 1.0;
  for (size_t row = 0; row < norms.size(); ++row) {
    coefficients[row] = limit.coefficient(coefficients[row], norms[row]);
    smallest = std::min(smallest, coefficients[row]);
  }
  if (smallest < 1.0) {
    for_all_tiles(index, /*serial=*/false,
                  [&](Range tiles) { cpu::scale_each(index, coefficients.data(), tiles); });
  }
  return smallest;
}

class CpuEngine final : public Engine {
 public:
  at::Tensor power_sum(const TensorList& tensors, Norm kind) const override {
    return scalar_tensor(measured(tensors, kind, Precision::kFloat64), at::kDouble);
  }

  std::optional<at::Tensor> total_norm(const TensorList& tensors,
                                       const NormRequest& request) const override {
    const std::optional<double> norm = checked_norm(tensors, request);
    if (!norm) return std::nullopt;
    return scalar_tensor(*norm, request.result_dtype);
  }

  std::optional<at::Tensor> clip_norm(const TensorList& tensors, const NormRequest& request,
                                      const Scalar& max_norm) const override {
    const std::optional<double> norm = checked_norm(tensors, request);
    if (!norm) return std::nullopt;
    scale_by(tensors, clip_coefficient(max_norm.value, *norm));
    return scalar_tensor(*norm, request.result_dtype);
  }

  std::optional<Norms> norms(const TensorList& tensors, Norm kind, Precision precision,
                             const WeightDecay* decay) const override {
    if (decay == nullptr) {
      return norms_of(tensors, tensors.index_for_reading(), kind, precision, nullptr);
    }
    const std::vector<FlatIndex> indices = tensors.disjoint_indices_for_writing();
    if (indices.size() != 1) return std::nullopt;
    const std::vector<const void*> parameters = decay->parameters.pointers();
    const Decay added = {decay->factor, parameters.data()};
    return norms_of(tensors, indices.front(), kind, precision, &added);
  }

  void scale(const TensorList& tensors, const Scalar& coefficient) const override {
    scale_by(tensors, coefficient.value);
  }

  void scale_to_norm(const TensorList& tensors, const Scalar& max_norm,
                     const Scalar& total_norm) const override {
    scale_by(tensors, clip_coefficient(max_norm.value, total_norm.value));
  }

  bool scale_each(const TensorList& tensors, const at::Tensor& coefficients) const override {
    std::vector<double> values;
    for (const int64_t position : tensors.positions()) {
      values.push_back(coefficients.const_data_ptr<double>()[position]);
    }
    write(tensors, [&](const FlatIndex& index, Range tiles) {
      cpu::scale_each(index, values.data(), tiles);
    });
    return true;
  }

  void clamp(const TensorList& tensors, double bound) const override {
    write(tensors, [&](const FlatIndex& index, Range tiles) { cpu::clamp(index, bound, tiles); });
  }

  // Not in 16 bits, where torch rounds the factor as well, and at the end of a tensor the product.
  bool add_weight_decay(const TensorList& tensors, const WeightDecay& decay) const override {
    const FlatIndex& read = tensors.index_for_reading();
    const bool has_16_bits =
        std::any_of(read.spans().begin(), read.spans().end(),
                    [](const Span& span) { return element_size(span.dtype) == 2; });
    if (has_16_bits) return false;
    const FlatIndex& index = tensors.index_for_writing();
    const std::vector<const void*> parameters = decay.parameters.pointers();
    for_all_tiles(index, /*serial=*/false, [&](Range tiles) {
      cpu::add_decay(index, {decay.factor, parameters.data()}, tiles);
    });
    return true;
  }

  std::optional<at::Tensor> clip_units(const TensorList& tensors, const TensorList& parameters,
                                       const UnitLimit& limit) const override {
    const std::vector<Rows> all_rows = rows_of(tensors, parameters);
    if (all_rows.empty()) return std::nullopt;
    std::vector<Rows> short_rows;
    std::vector<Rows> long_rows;
    for (const Rows& rows : all_rows) {
      (is_long(rows) ? long_rows : short_rows).push_back(rows);
    }
    const double smallest =
        std::min(clip_short_rows(short_rows, limit), clip_long_rows(long_rows, limit));
    return scalar_tensor(smallest, at::kDouble);
  }

 private:
  // nullopt if the norm is not finite and that is an error.
  static std::optional<double> checked_norm(const TensorList& tensors, const NormRequest& request) {
    const double norm = finish(request.kind, measured(tensors, request.kind, request.precision));
    if (request.error_if_nonfinite && !std::isfinite(norm)) return std::nullopt;
    return norm;
  }
};

}  // namespace

const Engine& cpu_engine() {
  static const CpuEngine engine;
  return engine;
}

}  // namespace gradclip::binding
