// Compares the contents of Python containers faster than Python can.
#pragma once

#include <Python.h>

namespace gradclip::binding {

// Whether the values of these dicts and the items of these lists, one container after the other,
// are the very objects in `expected`, in that order, and no others.
bool hold_exactly(PyObject* containers, PyObject* expected);

// Whether an object stands more than once in a list or tuple.
bool holds_twice(PyObject* sequence);

}  // namespace gradclip::binding
