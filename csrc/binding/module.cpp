// The table of _C.
#include "binding/dtensors.h"
#include "binding/python_operations.h"
#include "binding/torch_operators.h"
#include "cpu/kernels.h"

namespace gradclip::binding::python {

PYBIND11_MODULE(_C, m) {
  using py::arg;
  // Fail on an invalid GRADCLIP_CPU here, as an ImportError, rather than in the middle of a call.
  cpu::kernels();
  register_torch_operators();
  m.doc() = "Native engine of gradclip_ext; see gradclip_ext.functional for the public functions.";
  m.def("clip_grad_norm_", &clip_grad_norm_, arg("parameters"), arg("max_norm"), arg("norm_type"),
        arg("error_if_nonfinite"), arg("dtype"));
  m.def("get_total_norm", &get_total_norm, arg("tensors"), arg("norm_type"),
        arg("error_if_nonfinite"), arg("dtype"));
  m.def("clip_grads_with_norm_", &clip_grads_with_norm_, arg("parameters"), arg("max_norm"),
        arg("total_norm"));
  m.def("clip_grad_value_", &clip_grad_value_, arg("parameters"), arg("clip_value"));
  m.def("grad_norms", &grad_norms, arg("parameters"), arg("norm_type"), arg("dtype"),
        arg("weight_decay"));
  m.def("tensor_norms", &tensor_norms, arg("tensors"), arg("norm_type"), arg("dtype"));
  m.def("scale_", &scale_, arg("parameters"), arg("coefficient"));
  m.def("scale_each_", &scale_each_, arg("parameters"), arg("coefficients"));
  m.def("add_weight_decay_", &add_weight_decay_, arg("parameters"), arg("weight_decay"));
  m.def("clip_units_", &clip_units_, arg("parameters"), arg("clip_factor"), arg("eps"));
  m.def("have_clippable_units", &have_clippable_units, arg("parameters"));
  m.def("fit_fused_step", &fit_fused_step, arg("parameters"));
  m.def("power_sum", &power_sum, arg("tensors"), arg("norm_type"));
  m.def("scale_tensors_", &scale_tensors_, arg("tensors"), arg("coefficient"));
  m.def("clamp_tensors_", &clamp_tensors_, arg("tensors"), arg("clip_value"));
  m.def("hold_exactly", &hold_exactly, arg("containers"), arg("expected"));
  m.def("holds_twice", &holds_twice, arg("sequence"));
  m.def("read_dtensors", &read_dtensors, arg("items"), arg("reads_grads"), arg("dtensor_type"));
  m.def("is_native", &is_native, arg("tensor"));
  m.def("is_flat", &is_flat, arg("tensor"));
  m.def("known_number", &known_number, arg("tensor"));
  m.def("observed", &observed);
  m.def("instruction_set", &instruction_set);
  m.def("set_device_mode_type", &set_device_mode_type, arg("type"));
#if GRADCLIP_WITH_CUDA && defined(GRADCLIP_TUNING)
  m.def("set_tuning", &set_tuning, arg("name"), arg("value"));
#endif
}

}  // namespace gradclip::binding::python
