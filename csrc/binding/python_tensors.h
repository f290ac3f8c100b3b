// Conversions between Python objects and tensors. The implementation is the only file that includes
// torch's Python headers, which take longer to compile than everything else together.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/ScalarType.h>

#include <optional>

#include "binding/tensor_list.h"

namespace gradclip::binding {

enum class Read { kTensors, kGrads, kParametersWithGrads };

// Collects from an exact list or tuple the tensors themselves, their gradients, or those that have
// a gradient; the last rejects subclasses. False means that the list is for the fallback, which
// also raises every error; nothing was changed. Throws only what a subclass's own `grad` attribute
// throws.
bool gather(PyObject* sequence, Read read, TensorList* tensors);

// The tensor inside a torch.Tensor of any type, undefined for other objects.
at::Tensor unpack(PyObject* object);

// A new reference.
PyObject* wrap(const at::Tensor& tensor);

// nullopt for None. The caller has checked that anything else is a torch.dtype.
std::optional<at::ScalarType> unpack_dtype(PyObject* object);

// Whether no torch function mode is active except the one that only fills in a default device, as
// pushed by torch.set_default_device.
bool function_modes_allow_native();
void set_device_mode_type(PyObject* type);

}  // namespace gradclip::binding
