#include "binding/python_tensors.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>

namespace gradclip::binding {
namespace {

// Held for the life of the process.
PyObject* device_mode_type = nullptr;

// One reference, released with its scope.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Whether its class has operations of its own, as DTensor has. Nothing of a list with such a tensor
// is native, so the first one ends the search.
bool dispatches_itself(PyObject* tensor) {
  return THPVariable_Unpack(tensor).key_set().has(c10::DispatchKey::Python);
}

// Through Python: a subclass may define its own `grad`, and torch warns about that of a non-leaf
// tensor. That may drop the gradients read so far, or the parameter.
bool add_grad_attribute(PyObject* parameter, TensorList* tensors) {
  tensors->hold();
  Py_INCREF(parameter);
  const Reference held(parameter);
  const Reference grad(PyObject_GetAttrString(parameter, "grad"));
  if (grad.get() == nullptr) throw pybind11::error_already_set();
  if (grad.get() == Py_None) {
    tensors->skip();
    // A parameter that is distributed over ranks takes part in what they exchange even so.
    return !dispatches_itself(parameter);
  }
  if (!THPVariable_Check(grad.get()) || dispatches_itself(grad.get())) return false;
  tensors->add(THPVariable_Unpack(grad.get()));
  tensors->hold();
  return true;
}

bool add(PyObject* item, Read read, TensorList* tensors) {
  if (!THPVariable_CheckExact(item)) {
    if (!THPVariable_Check(item)) return false;
    if (read == Read::kParametersWithGrads) return false;
    if (read == Read::kGrads) return add_grad_attribute(item, tensors);
    if (dispatches_itself(item)) return false;
  }
  const at::Tensor& tensor = THPVariable_Unpack(item);
  if (read == Read::kParametersWithGrads) {
    if (tensor.unsafeGetTensorImpl()->grad().defined()) {
      tensors->add(tensor);
    } else {
      tensors->skip();
    }
    return tensor.is_leaf();
  }
  const at::Tensor& read_tensor =
      read == Read::kGrads ? tensor.unsafeGetTensorImpl()->grad() : tensor;
  if (!read_tensor.defined()) {
    if (!tensor.is_leaf()) return add_grad_attribute(item, tensors);
    tensors->skip();
    return true;
  }
  tensors->add(read_tensor);
  return true;
}

}  // namespace

bool gather(PyObject* sequence, Read read, TensorList* tensors) {
  const bool is_list = PyList_CheckExact(sequence);
  if (!is_list && !PyTuple_CheckExact(sequence)) return false;
  tensors->reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence)));
  // A `grad` property may change the list, so read its size each time.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence); ++i) {
    if (!add(PySequence_Fast_GET_ITEM(sequence, i), read, tensors)) return false;
  }
  if (!tensors->accept()) return false;
  if (read == Read::kGrads) {
    tensors->hold();
    return true;
  }
  // References on the objects are cheaper, and the first reference beside that of the object itself
  // is costly: torch then makes the tensor an owner of its object.
  PyObject* owner = PySequence_Tuple(sequence);
  if (owner == nullptr) throw pybind11::error_already_set();
  tensors->set_owner(std::shared_ptr<PyObject>(owner, [](PyObject* tuple) { Py_DECREF(tuple); }));
  return true;
}

at::Tensor unpack(PyObject* object) {
  return THPVariable_Check(object) ? THPVariable_Unpack(object) : at::Tensor();
}

PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

std::optional<at::ScalarType> unpack_dtype(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  TORCH_CHECK(THPDtype_Check(object), "expected a torch.dtype or None");
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

bool function_modes_allow_native() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i) {
    PyObject* mode = Modes::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_mode_type) return false;
  }
  return true;
}

void set_device_mode_type(PyObject* type) {
  Py_INCREF(type);
  device_mode_type = type;
}

}  // namespace gradclip::binding
