// Between Python objects and tensors. The implementation is the only file that includes torch's
// Python headers, which take longer to compile than everything else together.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/tensor_list.h"

namespace gradclip::binding {

enum class Read { kTensors, kGrads, kParametersWithGrads };

// Collects the tensors of an exact list or tuple, or their .grad where there is one, or those that
// have a .grad, of which the last refuses subclasses. False means
// that this list is for the fallback, which also words every error; nothing was changed.
// Throws only what reading a subclass's own `grad` attribute throws.
bool gather(PyObject* sequence, Read read, TensorList* tensors);

// The tensor inside a torch.Tensor of any type, undefined for other objects.
at::Tensor unpack(PyObject* object);

// A new reference.
PyObject* wrap(const at::Tensor& tensor);

// None gives nullopt. The caller has checked that it is otherwise a torch.dtype.
std::optional<at::ScalarType> unpack_dtype(PyObject* object);

// Whether no torch function mode is active, other than those of the one type that only fills in a
// default device (what torch.set_default_device pushes).
bool function_modes_allow_native();
void set_device_mode_type(PyObject* type);

}  // namespace gradclip::binding
