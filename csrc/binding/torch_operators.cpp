// The only file that includes torch/library.h, which takes seconds to compile.
#include "binding/torch_operators.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "binding/operations.h"
#include "binding/tensor_list.h"

namespace gradclip::binding {
namespace {

Norm norm_of_type(double norm_type) {
  if (norm_type == 2.0) return Norm::kL2;
  if (norm_type == 1.0) return Norm::kL1;
  TORCH_CHECK(norm_type == INFINITY, "norm_type has to be 1, 2 or inf, found ", norm_type);
  return Norm::kInf;
}

// The tensors belong to the caller, who keeps them for the length of the call.
bool accept_all(at::TensorList tensors, TensorList* accepted) {
  accepted->reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) accepted->add(tensor);
  return accepted->accept();
}

bool is_acceptable(const at::Tensor& tensor, bool accept_complex) {
  TensorList alone(accept_complex);
  return accept_all(tensor, &alone);
}

// A graph was traced with other tensors, whose layout and alignment may have been others.
at::Tensor flat_copy(const at::Tensor& tensor) {
  return tensor.clone(at::MemoryFormat::Contiguous);
}

void require_one_device(at::TensorList tensors, bool accept_complex) {
  TORCH_CHECK(!tensors.empty(), "expected a list of tensors, found none");
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors.front().device(),
                "expected tensors of one device, found ", tensors.front().device(), " and ",
                tensor.device());
    TORCH_CHECK(native_dtype(tensor.scalar_type()) && (accept_complex || !tensor.is_complex()),
                "no tensor can have dtype ", tensor.scalar_type(), " here");
  }
}

// nullopt if the norm is not finite and that is an error.
std::optional<at::Tensor> measured(at::TensorList tensors, double norm_type,
                                   bool error_if_nonfinite, std::optional<at::ScalarType> dtype) {
  const Norm kind = norm_of_type(norm_type);
  const bool accept_complex = kind == Norm::kL2;
  require_one_device(tensors, accept_complex);
  const at::AutoDispatchBelowAutograd guard;
  TensorList given(accept_complex);
  if (accept_all(tensors, &given)) return total_norm(given, kind, error_if_nonfinite, dtype);
  std::vector<at::Tensor> flat;
  for (const at::Tensor& tensor : tensors) {
    flat.push_back(is_acceptable(tensor, accept_complex) ? tensor : flat_copy(tensor));
  }
  TensorList copied(accept_complex);
  TORCH_INTERNAL_ASSERT(accept_all(flat, &copied));
  return total_norm(copied, kind, error_if_nonfinite, dtype);
}

std::string shape_of(const at::Tensor& tensor) {
  std::string text = "(";
  for (int64_t dimension = 0; dimension < tensor.dim(); ++dimension) {
    if (dimension > 0) text += ", ";
    text += std::to_string(tensor.size(dimension));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// The text of nonfinite_error in gradclip_ext/_ops/gradients.py.
std::string nonfinite_text(at::TensorList tensors, double norm_type,
                           at::ArrayRef<std::string> names) {
  const std::string order = norm_type == INFINITY ? "inf" : norm_type == 1.0 ? "1.0" : "2.0";
  std::string text =
      "The total norm of order " + order +
      " for gradients from `parameters` is non-finite, so it cannot be clipped. To "
      "disable this error and scale the gradients by the non-finite norm anyway, set "
      "`error_if_nonfinite=False`";
  std::string first;
  int64_t count = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (at::isfinite(tensors[i]).all().item<bool>()) continue;
    if (count++ == 0) first = names[i] + " of shape " + shape_of(tensors[i]);
  }
  const std::string all = std::to_string(tensors.size());
  if (count == 0) return text + ". All " + all + " gradients are finite, but their norm is not.";
  return text + ". The first of " + std::to_string(count) + " non-finite gradients (out of " + all +
         ") is that of " + first + ".";
}

at::Tensor measure(at::TensorList tensors, double norm_type, std::optional<at::ScalarType> dtype) {
  return *measured(tensors, norm_type, /*error_if_nonfinite=*/false, dtype);
}

at::Tensor measure_finite(const at::Tensor& /*written*/, at::TensorList tensors, double norm_type,
                          std::optional<at::ScalarType> dtype, at::ArrayRef<std::string> names) {
  TORCH_CHECK(names.size() == tensors.size(), "expected ", tensors.size(), " names, found ",
              names.size());
  const std::optional<at::Tensor> norm =
      measured(tensors, norm_type, /*error_if_nonfinite=*/true, dtype);
  TORCH_CHECK(norm, nonfinite_text(tensors, norm_type, names));
  return *norm;
}

void require_number(const at::Tensor& tensor, c10::Device device) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.numel() == 1 &&
                  (tensor.is_cpu() || tensor.device() == device),
              "expected a float64 number on ", device, " or the CPU, found ", tensor.scalar_type(),
              " of shape ", tensor.sizes(), " on ", tensor.device());
}

double value_of(const at::Tensor& on_cpu) { return *on_cpu.resolve_neg().const_data_ptr<double>(); }

// For the engine of the device, which reads it without a device sync.
Scalar scalar_from(const at::Tensor& number, c10::Device device) {
  require_number(number, device);
  Scalar result;
  if (device.type() == kGpuDevice && number.device() == device) {
    result.tensor = number.resolve_neg();
  } else {
    result.value = value_of(number);
  }
  return result;
}

// Calls write(list) on all tensors, through copies of those that the engines do not take.
template <class Write>
void write_all(at::TensorList tensors, bool accept_complex, const Write& write) {
  TensorList given(accept_complex);
  if (accept_all(tensors, &given)) {
    write(given);
    return;
  }
  std::vector<at::Tensor> accepted;
  std::vector<at::Tensor> others;
  for (const at::Tensor& tensor : tensors) {
    (is_acceptable(tensor, accept_complex) ? accepted : others).push_back(tensor);
  }
  // Before anything is written.
  for (const at::Tensor& tensor : others) at::assert_no_internal_overlap(tensor);
  // One after the other, since one may be listed twice.
  for (const at::Tensor& tensor : others) {
    const at::Tensor copy = flat_copy(tensor);
    TensorList alone(accept_complex);
    TORCH_INTERNAL_ASSERT(accept_all(copy, &alone));
    write(alone);
    tensor.copy_(copy);
  }
  TensorList rest(accept_complex);
  if (accepted.empty()) return;
  TORCH_INTERNAL_ASSERT(accept_all(accepted, &rest));
  write(rest);
}

void scale_all(at::TensorList tensors, const at::Tensor& coefficient) {
  require_one_device(tensors, /*accept_complex=*/true);
  const at::AutoDispatchBelowAutograd guard;
  const Scalar scalar = scalar_from(coefficient, tensors.front().device());
  write_all(tensors, /*accept_complex=*/true,
            [&](const TensorList& list) { scale_(list, scalar); });
}

void clamp_all(at::TensorList tensors, const at::Tensor& bound) {
  require_one_device(tensors, /*accept_complex=*/false);
  require_number(bound, c10::kCPU);
  const at::AutoDispatchBelowAutograd guard;
  const double value = value_of(bound);
  write_all(tensors, /*accept_complex=*/false,
            [&](const TensorList& list) { clamp_(list, value); });
}

// What a compiler calls to learn of the result, with tensors that have no memory.
at::Tensor measure_nothing(at::TensorList tensors, double /*norm_type*/,
                           std::optional<at::ScalarType> /*dtype*/) {
  return at::empty({}, tensors.front().options().dtype(at::kDouble));
}

at::Tensor measure_nothing_finite(const at::Tensor& /*written*/, at::TensorList tensors,
                                  double norm_type, std::optional<at::ScalarType> dtype,
                                  at::ArrayRef<std::string> /*names*/) {
  return measure_nothing(tensors, norm_type, dtype);
}

void write_nothing(at::TensorList /*tensors*/, const at::Tensor& /*number*/) {}

void implement(torch::Library* library) {
  library->impl("total_norm", &measure);
  library->impl("finite_total_norm_", &measure_finite);
  library->impl("scale_", &scale_all);
  library->impl("clamp_", &clamp_all);
}

// The engines see through these keys, so that nothing has to be copied first.
void pass_on(torch::Library* library) {
  for (const char* name : {"total_norm", "finite_total_norm_", "scale_", "clamp_"}) {
    library->impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

void register_torch_operators() {
  // Not by torch's macros, whose static initializers would end the process with an error. Held for
  // the life of the process, since graphs keep what they have found.
  static torch::Library definitions = [] {
    torch::Library library = MAKE_TORCH_LIBRARY(gradclip_ext);
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    library.def("total_norm(Tensor[] tensors, float norm_type, ScalarType? dtype=None) -> Tensor",
                tags);
    // Writes nothing, but a compiler may drop an operator that says so, and with it the error.
    library.def(
        "finite_total_norm_(Tensor(a!) written, Tensor[] tensors, float norm_type, "
        "ScalarType? dtype, str[] names) -> Tensor",
        tags);
    library.def("scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()", tags);
    library.def("clamp_(Tensor(a!)[] tensors, Tensor bound) -> ()", tags);
    return library;
  }();
  static torch::Library on_cpu = MAKE_TORCH_LIBRARY_IMPL(gradclip_ext, CPU);
  static torch::Library on_meta = MAKE_TORCH_LIBRARY_IMPL(gradclip_ext, Meta);
  static torch::Library on_conjugate = MAKE_TORCH_LIBRARY_IMPL(gradclip_ext, Conjugate);
  static torch::Library on_negative = MAKE_TORCH_LIBRARY_IMPL(gradclip_ext, Negative);
  static const bool is_implemented = [] {
    implement(&on_cpu);
#if GRADCLIP_WITH_CUDA && !defined(GRADCLIP_EMULATION)
    static torch::Library on_cuda = MAKE_TORCH_LIBRARY_IMPL(gradclip_ext, CUDA);
    implement(&on_cuda);
#endif
    on_meta.impl("total_norm", &measure_nothing);
    on_meta.impl("finite_total_norm_", &measure_nothing_finite);
    on_meta.impl("scale_", &write_nothing);
    on_meta.impl("clamp_", &write_nothing);
    pass_on(&on_conjugate);
    pass_on(&on_negative);
    return true;
  }();
  (void)definitions;
  (void)is_implemented;
}

}  // namespace gradclip::binding
