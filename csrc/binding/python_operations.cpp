#include "binding/python_operations.h"

#include <cmath>
#include <optional>

#include "binding/containers.h"
#include "binding/operations.h"
#include "binding/python_tensors.h"
#include "binding/tensor_list.h"
#include "cpu/kernels.h"
#if GRADCLIP_WITH_CUDA && defined(GRADCLIP_TUNING)
#include "cuda/tuning.h"
#endif

namespace gradclip::binding::python {
namespace {

std::optional<Norm> native_norm(double norm_type) {
  if (norm_type == 2.0) return Norm::kL2;
  if (norm_type == 1.0) return Norm::kL1;
  if (norm_type == INFINITY) return Norm::kInf;
  return std::nullopt;
}

bool gather_native(py::handle sequence, Read read, TensorList* tensors) {
  return !observed() && gather(sequence.ptr(), read, tensors) && !tensors->tensors().empty();
}

// The gradients, and the parameters that have one.
bool gather_pairs(py::handle parameters, TensorList* gradients, TensorList* with_gradients) {
  return gather_native(parameters, Read::kGrads, gradients) &&
         gather_native(parameters, Read::kParametersWithGrads, with_gradients);
}

// A Python number, or a one-element tensor on the tensors' GPU; nullopt for what only the fallback
// can read.
std::optional<Scalar> read_scalar(py::handle number, const TensorList& tensors) {
  Scalar result;
  // The common case first: a cast through pybind11 takes longer.
  if (PyFloat_CheckExact(number.ptr())) {
    result.value = PyFloat_AS_DOUBLE(number.ptr());
    return result;
  }
  const at::Tensor tensor = unpack(number.ptr());
  if (!tensor.defined()) {
    result.value = number.cast<double>();
    return result;
  }
  const bool is_readable_as_it_is = binding::is_native(tensor) && binding::is_flat(tensor) &&
                                    tensor.numel() == 1 && !tensor.is_complex() && !tensor.is_neg();
  const bool is_on_same_gpu = tensors.are_on_gpu() && tensor.device() == tensors.device();
  if (!is_readable_as_it_is || !is_on_same_gpu) return std::nullopt;
  result.tensor = tensor;
  return result;
}

// Runs an operation without the GIL.
template <class Operation>
auto without_gil(const Operation& operation) {
  py::gil_scoped_release release;
  return operation();
}

py::object wrapped(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(wrap(tensor));
}

py::object wrapped(int64_t count) { return py::int_(count); }

py::object wrapped(const Norms& norms) {
  return py::make_tuple(wrapped(norms.total), wrapped(norms.each));
}

template <class Answer>
py::object wrapped_or_none(const std::optional<Answer>& answer) {
  return answer ? wrapped(*answer) : py::none();
}

// For the primitives.
TensorList require_native(py::handle sequence) {
  TensorList tensors(/*accept_complex=*/true);
  if (!gather(sequence.ptr(), Read::kTensors, &tensors) || tensors.tensors().empty()) {
    throw py::value_error("expected a list of native, flat tensors of one device, not empty");
  }
  return tensors;
}

}  // namespace

py::object clip_grad_norm_(py::handle parameters, py::handle max_norm, double norm_type,
                           bool error_if_nonfinite, py::handle dtype) {
  const std::optional<Norm> kind = native_norm(norm_type);
  TensorList gradients(/*accept_complex=*/kind == Norm::kL2);
  if (!kind || !gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Scalar> largest = read_scalar(max_norm, gradients);
  if (!largest) return py::none();
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  return wrapped_or_none(without_gil([&] {
    return binding::clip_grad_norm_(gradients, *largest, *kind, error_if_nonfinite, result_dtype);
  }));
}

py::object get_total_norm(py::handle tensors, double norm_type, bool error_if_nonfinite,
                          py::handle dtype) {
  const std::optional<Norm> kind = native_norm(norm_type);
  TensorList measured(/*accept_complex=*/kind == Norm::kL2);
  if (!kind || !gather_native(tensors, Read::kTensors, &measured)) return py::none();
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  return wrapped_or_none(without_gil(
      [&] { return binding::get_total_norm(measured, *kind, error_if_nonfinite, result_dtype); }));
}

py::object clip_grads_with_norm_(py::handle parameters, py::handle max_norm,
                                 py::handle total_norm) {
  TensorList gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Scalar> largest = read_scalar(max_norm, gradients);
  const std::optional<Scalar> given = read_scalar(total_norm, gradients);
  if (!largest || !given) return py::none();
  return wrapped_or_none(
      without_gil([&] { return binding::clip_grads_with_norm_(gradients, *largest, *given); }));
}

py::object clip_grad_value_(py::handle parameters, double clip_value) {
  TensorList gradients(/*accept_complex=*/false);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  return wrapped_or_none(
      without_gil([&] { return binding::clip_grad_value_(gradients, clip_value); }));
}

py::object grad_norms(py::handle parameters, double norm_type, py::handle dtype,
                      double weight_decay) {
  const std::optional<Norm> kind = native_norm(norm_type);
  TensorList gradients(/*accept_complex=*/kind == Norm::kL2);
  if (!kind || !gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  TensorList decayed(/*accept_complex=*/kind == Norm::kL2);
  const bool decays = weight_decay != 0.0;
  if (decays && !gather_native(parameters, Read::kParametersWithGrads, &decayed)) {
    return py::none();
  }
  const WeightDecay decay = {weight_decay, decayed};
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  return wrapped_or_none(without_gil([&] {
    return binding::grad_norms(gradients, *kind, result_dtype, decays ? &decay : nullptr);
  }));
}

py::object tensor_norms(py::handle tensors, double norm_type, py::handle dtype) {
  const std::optional<Norm> kind = native_norm(norm_type);
  TensorList measured(/*accept_complex=*/kind == Norm::kL2);
  if (!kind || !gather_native(tensors, Read::kTensors, &measured)) return py::none();
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  return wrapped_or_none(without_gil(
      [&] { return binding::grad_norms(measured, *kind, result_dtype, /*decay=*/nullptr); }));
}

py::object scale_(py::handle parameters, py::handle coefficient) {
  TensorList gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Scalar> scalar = read_scalar(coefficient, gradients);
  if (!scalar) return py::none();
  return wrapped_or_none(without_gil([&] { return binding::scale_(gradients, *scalar); }));
}

py::object scale_each_(py::handle parameters, py::handle coefficients) {
  TensorList gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const at::Tensor values = unpack(coefficients.ptr());
  const bool fits = values.defined() && binding::is_native(values) && values.is_contiguous() &&
                    values.scalar_type() == at::kDouble && values.dim() == 1 &&
                    values.numel() == gradients.listed() && values.device() == gradients.device();
  if (!fits) return py::none();
  return wrapped_or_none(without_gil([&] { return binding::scale_each_(gradients, values); }));
}

py::object add_weight_decay_(py::handle parameters, double weight_decay) {
  // Torch adds complex numbers with other roundings than pairs of reals.
  TensorList gradients(/*accept_complex=*/false);
  TensorList decayed(/*accept_complex=*/false);
  if (!gather_pairs(parameters, &gradients, &decayed)) return py::none();
  const WeightDecay decay = {weight_decay, decayed};
  return wrapped_or_none(without_gil([&] { return binding::add_weight_decay_(gradients, decay); }));
}

py::object clip_units_(py::handle parameters, double clip_factor, double eps) {
  TensorList gradients(/*accept_complex=*/true);
  TensorList weights(/*accept_complex=*/true);
  if (!gather_pairs(parameters, &gradients, &weights)) return py::none();
  return wrapped_or_none(
      without_gil([&] { return binding::clip_units_(gradients, weights, {clip_factor, eps}); }));
}

bool have_clippable_units(py::handle parameters) {
  TensorList gradients(/*accept_complex=*/true);
  TensorList weights(/*accept_complex=*/true);
  return gather_pairs(parameters, &gradients, &weights) &&
         binding::have_clippable_units(gradients, weights);
}

bool fit_fused_step(py::handle parameters) {
  TensorList gradients(/*accept_complex=*/false);
  TensorList weights(/*accept_complex=*/false);
  return gather_pairs(parameters, &gradients, &weights) &&
         binding::fit_fused_step(gradients, weights);
}

py::object power_sum(py::handle tensors, double norm_type) {
  const std::optional<Norm> kind = native_norm(norm_type);
  if (!kind) throw py::value_error("norm_type has to be 1, 2 or inf");
  const TensorList measured = require_native(tensors);
  return wrapped(without_gil([&] { return binding::power_sum(measured, *kind); }));
}

void scale_tensors_(py::handle tensors, py::handle coefficient) {
  const TensorList scaled = require_native(tensors);
  const std::optional<Scalar> scalar = read_scalar(coefficient, scaled);
  if (!scalar) throw py::value_error("expected a number, or a tensor on the same GPU");
  without_gil([&] { return binding::scale_(scaled, *scalar); });
}

void clamp_tensors_(py::handle tensors, double clip_value) {
  const TensorList clamped = require_native(tensors);
  without_gil([&] { return binding::clamp_(clamped, clip_value); });
}

bool hold_exactly(const py::list& containers, const py::tuple& expected) {
  return binding::hold_exactly(containers.ptr(), expected.ptr());
}

bool holds_twice(py::handle sequence) {
  if (!PyList_CheckExact(sequence.ptr()) && !PyTuple_CheckExact(sequence.ptr())) {
    throw py::type_error("expected a list or a tuple");
  }
  return binding::holds_twice(sequence.ptr());
}

bool is_native(py::handle tensor) { return binding::is_native(unpack(tensor.ptr())); }

bool is_flat(py::handle tensor) { return binding::is_flat(unpack(tensor.ptr())); }

bool observed() { return !operations_are_unobserved() || !function_modes_allow_native(); }

py::object known_number(py::handle tensor) {
  const at::Tensor number = unpack(tensor.ptr());
  const bool is_on_host = kGpuDevice != c10::DeviceType::CPU && number.is_cpu();
  if (!is_on_host || number.numel() != 1 || observed()) return py::none();
  // Read directly, because item() takes as long as all of the rest.
  const bool is_direct =
      number.scalar_type() == at::kDouble && !number.is_neg() && binding::is_native(number);
  return py::float_(is_direct ? *number.const_data_ptr<double>() : number.item<double>());
}

std::string instruction_set() { return cpu::kernels().instruction_set; }

void set_device_mode_type(py::handle type) { binding::set_device_mode_type(type.ptr()); }

#if GRADCLIP_WITH_CUDA && defined(GRADCLIP_TUNING)
void set_tuning(const std::string& name, int64_t value) {
  struct Knob {
    const char* name;
    int64_t* place;
    int64_t least;
    int64_t most;
  };
  cuda::Tuning& tuning = cuda::tuning();
  const Knob knobs[] = {
      {"one_block_bytes", &tuning.one_block_bytes, 0, int64_t{1} << 40},
      {"one_block_tensors", &tuning.one_block_tensors, 0, cuda::kSmallTable},
      {"workers_per_multiprocessor", &tuning.workers_per_multiprocessor, 1, 64},
      {"early_start", &tuning.early_start, 0, 1},
  };
  for (const Knob& knob : knobs) {
    if (name != knob.name) continue;
    if (value < knob.least || value > knob.most) {
      throw py::value_error("set_tuning: " + name + " has to be between " +
                            std::to_string(knob.least) + " and " + std::to_string(knob.most) +
                            ", found " + std::to_string(value));
    }
    *knob.place = value;
    return;
  }
  throw py::value_error("set_tuning: there is no " + name);
}
#endif

}  // namespace gradclip::binding::python
