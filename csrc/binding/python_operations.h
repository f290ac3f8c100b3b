// The functions of _C as Python calls them: they read the arguments, release the GIL, run the
// operation and wrap its answer. Every operation on parameters answers None when it declines a
// list, with nothing changed, and a value when it took it. What is declined is for the package's
// fallback, in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace gradclip::binding::python {

namespace py = pybind11;

py::object clip_grad_norm_(py::handle parameters, py::handle max_norm, double norm_type,
                           bool error_if_nonfinite, py::handle dtype);
py::object get_total_norm(py::handle tensors, double norm_type, bool error_if_nonfinite,
                          py::handle dtype);
py::object clip_grads_with_norm_(py::handle parameters, py::handle max_norm, py::handle total_norm);
py::object clip_grad_value_(py::handle parameters, double clip_value);
py::object tensor_norms(py::handle tensors, double norm_type, py::handle dtype);
py::object grad_norms(py::handle parameters, double norm_type, py::handle dtype,
                      double weight_decay);
py::object scale_(py::handle parameters, py::handle coefficient);
py::object scale_each_(py::handle parameters, py::handle coefficients);
py::object add_weight_decay_(py::handle parameters, double weight_decay);
py::object clip_units_(py::handle parameters, double clip_factor, double eps);
// Whether clip_units_ would look no further for a reason to decline.
bool have_clippable_units(py::handle parameters);
bool fit_fused_step(py::handle parameters);

// The primitives take native, flat tensors of one device, as sorted by the fallback, and raise
// instead of declining.
py::object power_sum(py::handle tensors, double norm_type);
void scale_tensors_(py::handle tensors, py::handle coefficient);
void clamp_tensors_(py::handle tensors, double clip_value);

// Of an exact list or tuple.
bool holds_twice(py::handle sequence);
bool hold_exactly(const py::list& containers, const py::tuple& expected);
bool is_native(py::handle tensor);
bool is_flat(py::handle tensor);
// The number in a tensor of one element, where the host may read it without a device sync and
// nothing is watching; else None.
py::object known_number(py::handle tensor);
// Whether a mode, a transform or a trace expects to see every torch operation.
bool observed();
std::string instruction_set();
void set_device_mode_type(py::handle type);

#if GRADCLIP_WITH_CUDA && defined(GRADCLIP_TUNING)
// Changes one of cuda::Tuning.
void set_tuning(const std::string& name, int64_t value);
#endif

}  // namespace gradclip::binding::python
