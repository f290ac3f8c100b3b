#include "binding/containers.h"

#include <vector>

#include "core/duplicates.h"

namespace gradclip::binding {

// Runs no Python code, so no container can change in the meantime.
bool hold_exactly(PyObject* containers, PyObject* expected) {
  const Py_ssize_t expected_count = PyTuple_GET_SIZE(expected);
  Py_ssize_t seen = 0;
  const auto is_next = [&](PyObject* item) {
    return seen < expected_count && PyTuple_GET_ITEM(expected, seen++) == item;
  };
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(containers); ++i) {
    PyObject* container = PyList_GET_ITEM(containers, i);
    if (PyDict_Check(container)) {
      Py_ssize_t position = 0;
      PyObject* value = nullptr;
      while (PyDict_Next(container, &position, nullptr, &value)) {
        if (!is_next(value)) return false;
      }
    } else if (PyList_Check(container)) {
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(container); ++k) {
        if (!is_next(PyList_GET_ITEM(container, k))) return false;
      }
    } else {
      return false;
    }
  }
  return seen == expected_count;
}

bool holds_twice(PyObject* sequence) {
  const std::vector<const void*> items(
      PySequence_Fast_ITEMS(sequence),
      PySequence_Fast_ITEMS(sequence) + PySequence_Fast_GET_SIZE(sequence));
  return any_twice(items.data(), items.size());
}

}  // namespace gradclip::binding
