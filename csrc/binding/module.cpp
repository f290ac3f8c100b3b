// The functions that Python calls, and their table. Every operation answers None when it declines
// a list, with nothing changed, and a value when it took it; gradclip_ext/_ops/fallback.py is the
// fallback.
#include <pybind11/pybind11.h>

#include <cmath>
#include <optional>
#include <string>

#include "binding/containers.h"
#include "binding/gradients.h"
#include "binding/operations.h"
#include "binding/python_tensors.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace gradclip::binding {
namespace {

std::optional<Norm> native_norm(double norm_type) {
  if (norm_type == 2.0) return Norm::kL2;
  if (norm_type == 1.0) return Norm::kL1;
  if (norm_type == INFINITY) return Norm::kInf;
  return std::nullopt;
}

bool observed() { return !operations_are_unobserved() || !function_modes_allow_native(); }

bool gather_native(py::handle sequence, Read read, Gradients* gradients) {
  return !observed() && gather(sequence.ptr(), read, gradients) && !gradients->tensors().empty();
}

// A Python number, or a tensor of one element that the GPU reads; nullopt for one that only torch's
// operations can read.
std::optional<Number> read_number(py::handle number, const Gradients& gradients) {
  Number result;
  // First, because it is what nearly every call brings, and Python's answer takes long.
  if (PyFloat_CheckExact(number.ptr())) {
    result.value = PyFloat_AS_DOUBLE(number.ptr());
    return result;
  }
  const at::Tensor tensor = unpack(number.ptr());
  if (!tensor.defined()) {
    result.value = number.cast<double>();
    return result;
  }
  const bool is_readable_as_it_is = is_native(tensor) && is_flat(tensor) && tensor.numel() == 1 &&
                                    !tensor.is_complex() && !tensor.is_neg();
  result.tensor = tensor;
  if (!is_readable_as_it_is || !is_readable(result, gradients)) return std::nullopt;
  return result;
}

py::object wrap_or_none(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return py::none();
  return py::reinterpret_steal<py::object>(wrap(*tensor));
}

// What an operation without a result of its own answers.
py::object count_of(const Gradients& gradients) { return py::int_(gradients.tensors().size()); }

py::object py_clip_grad_norm_(py::handle parameters, py::handle max_norm, double norm_type,
                              bool error_if_nonfinite, py::handle dtype) {
  const std::optional<Norm> norm = native_norm(norm_type);
  Gradients gradients(/*accept_complex=*/norm == Norm::kL2);
  if (!norm || !gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Number> limit = read_number(max_norm, gradients);
  if (!limit) return py::none();
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  std::optional<at::Tensor> total_norm;
  {
    py::gil_scoped_release release;
    total_norm = clip_grad_norm_(gradients, *limit, *norm, error_if_nonfinite, result_dtype);
  }
  return wrap_or_none(total_norm);
}

py::object py_get_total_norm(py::handle tensors, double norm_type, bool error_if_nonfinite,
                             py::handle dtype) {
  const std::optional<Norm> norm = native_norm(norm_type);
  Gradients gradients(/*accept_complex=*/norm == Norm::kL2);
  if (!norm || !gather_native(tensors, Read::kTensors, &gradients)) return py::none();
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  std::optional<at::Tensor> total_norm;
  {
    py::gil_scoped_release release;
    total_norm = get_total_norm(gradients, *norm, error_if_nonfinite, result_dtype);
  }
  return wrap_or_none(total_norm);
}

py::object py_clip_grads_with_norm_(py::handle parameters, py::handle max_norm,
                                    py::handle total_norm) {
  Gradients gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Number> limit = read_number(max_norm, gradients);
  const std::optional<Number> norm = read_number(total_norm, gradients);
  if (!limit || !norm) return py::none();
  {
    py::gil_scoped_release release;
    clip_grads_with_norm_(gradients, *limit, *norm);
  }
  return count_of(gradients);
}

py::object py_clip_grad_value_(py::handle parameters, double clip_value) {
  Gradients gradients(/*accept_complex=*/false);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  {
    py::gil_scoped_release release;
    clip_grad_value_(gradients, clip_value);
  }
  return count_of(gradients);
}

py::object wrap_norms(const Norms& norms) {
  return py::make_tuple(py::reinterpret_steal<py::object>(wrap(norms.total)),
                        py::reinterpret_steal<py::object>(wrap(norms.each)));
}

py::object py_grad_norms(py::handle parameters, double norm_type, py::handle dtype,
                         double weight_decay) {
  const std::optional<Norm> norm = native_norm(norm_type);
  Gradients gradients(/*accept_complex=*/norm == Norm::kL2);
  if (!norm || !gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  Gradients decayed(/*accept_complex=*/norm == Norm::kL2);
  const bool decays = weight_decay != 0.0;
  if (decays && !gather_native(parameters, Read::kParametersWithGrads, &decayed)) {
    return py::none();
  }
  const std::optional<at::ScalarType> result_dtype = unpack_dtype(dtype.ptr());
  std::optional<Norms> norms;
  {
    py::gil_scoped_release release;
    norms = decays ? decay_and_grad_norms(gradients, decayed, weight_decay, *norm, result_dtype)
                   : grad_norms(gradients, *norm, result_dtype);
  }
  return norms ? wrap_norms(*norms) : py::none();
}

py::object py_scale_(py::handle parameters, py::handle coefficient) {
  Gradients gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const std::optional<Number> number = read_number(coefficient, gradients);
  if (!number) return py::none();
  {
    py::gil_scoped_release release;
    scale_(gradients, *number);
  }
  return count_of(gradients);
}

py::object py_scale_each_(py::handle parameters, py::handle coefficients) {
  Gradients gradients(/*accept_complex=*/true);
  if (!gather_native(parameters, Read::kGrads, &gradients)) return py::none();
  const at::Tensor values = unpack(coefficients.ptr());
  const bool fits = values.defined() && is_native(values) && values.is_contiguous() &&
                    values.scalar_type() == at::kDouble && values.dim() == 1 &&
                    values.numel() == gradients.listed() && values.device() == gradients.device();
  if (!fits) return py::none();
  bool taken = false;
  {
    py::gil_scoped_release release;
    taken = scale_each_(gradients, values);
  }
  return taken ? count_of(gradients) : py::none();
}

// The primitives ask for native, flat tensors of one device, which the fallback has sorted out.
Gradients require_native(py::handle tensors) {
  Gradients gradients(/*accept_complex=*/true);
  if (!gather(tensors.ptr(), Read::kTensors, &gradients) || gradients.tensors().empty()) {
    throw py::value_error("expected a list of native, flat tensors of one device, not empty");
  }
  return gradients;
}

py::object py_power_sum(py::handle tensors, double norm_type) {
  const std::optional<Norm> norm = native_norm(norm_type);
  if (!norm) throw py::value_error("norm_type has to be 1, 2 or inf");
  const Gradients gradients = require_native(tensors);
  at::Tensor sum;
  {
    py::gil_scoped_release release;
    sum = power_sum(gradients, *norm);
  }
  return wrap_or_none(sum);
}

void py_scale_tensors_(py::handle tensors, py::handle coefficient) {
  const Gradients gradients = require_native(tensors);
  const std::optional<Number> number = read_number(coefficient, gradients);
  if (!number) throw py::value_error("expected a number, or a tensor on the same GPU");
  py::gil_scoped_release release;
  scale_(gradients, *number);
}

void py_clamp_tensors_(py::handle tensors, double clip_value) {
  const Gradients gradients = require_native(tensors);
  py::gil_scoped_release release;
  clamp_(gradients, clip_value);
}

bool py_hold_exactly(const py::list& containers, const py::tuple& expected) {
  return hold_exactly(containers.ptr(), expected.ptr());
}

bool py_is_native(py::handle tensor) { return is_native(unpack(tensor.ptr())); }

bool py_is_flat(py::handle tensor) { return is_flat(unpack(tensor.ptr())); }

// The number in a tensor of one element, where the host may read it without a device sync and
// nobody watches; else None.
py::object py_known_number(py::handle tensor) {
  const at::Tensor number = unpack(tensor.ptr());
  const bool is_on_host = kGpuDevice != c10::DeviceType::CPU && number.is_cpu();
  if (!is_on_host || number.numel() != 1 || observed()) return py::none();
  return py::float_(number.item<double>());
}

std::string py_instruction_set() { return cpu::kernels().instruction_set; }

void py_set_device_mode_type(py::handle type) { set_device_mode_type(type.ptr()); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  // Here, where a wrong GRADCLIP_CPU becomes an ImportError, and not in the midst of a call.
  cpu::kernels();
  m.doc() = "Native engine of gradclip_ext; see gradclip_ext.functional for the public functions.";
  m.def("clip_grad_norm_", &py_clip_grad_norm_, arg("parameters"), arg("max_norm"),
        arg("norm_type"), arg("error_if_nonfinite"), arg("dtype"));
  m.def("get_total_norm", &py_get_total_norm, arg("tensors"), arg("norm_type"),
        arg("error_if_nonfinite"), arg("dtype"));
  m.def("clip_grads_with_norm_", &py_clip_grads_with_norm_, arg("parameters"), arg("max_norm"),
        arg("total_norm"));
  m.def("clip_grad_value_", &py_clip_grad_value_, arg("parameters"), arg("clip_value"));
  m.def("grad_norms", &py_grad_norms, arg("parameters"), arg("norm_type"), arg("dtype"),
        arg("weight_decay"));
  m.def("scale_", &py_scale_, arg("parameters"), arg("coefficient"));
  m.def("scale_each_", &py_scale_each_, arg("parameters"), arg("coefficients"));
  m.def("power_sum", &py_power_sum, arg("tensors"), arg("norm_type"));
  m.def("scale_tensors_", &py_scale_tensors_, arg("tensors"), arg("coefficient"));
  m.def("clamp_tensors_", &py_clamp_tensors_, arg("tensors"), arg("clip_value"));
  m.def("hold_exactly", &py_hold_exactly, arg("containers"), arg("expected"));
  m.def("is_native", &py_is_native, arg("tensor"));
  m.def("is_flat", &py_is_flat, arg("tensor"));
  m.def("known_number", &py_known_number, arg("tensor"));
  m.def("observed", &observed);
  m.def("instruction_set", &py_instruction_set);
  m.def("set_device_mode_type", &py_set_device_mode_type, arg("type"));
}

}  // namespace gradclip::binding
