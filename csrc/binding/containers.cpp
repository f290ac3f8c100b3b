#include "binding/containers.h"

#include <cstddef>
#include <cstdint>
#include <vector>

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
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  PyObject* const* items = PySequence_Fast_ITEMS(sequence);
  // A hash table with room for twice as many, open addressing; sorting takes several times as long.
  size_t mask = 1;
  while (mask < 2 * static_cast<size_t>(count)) mask = 2 * mask + 1;
  std::vector<PyObject*> table(mask + 1, nullptr);
  for (Py_ssize_t i = 0; i < count; ++i) {
    // Objects lie at multiples of 16, so the lowest bits tell nothing.
    size_t place = (reinterpret_cast<uintptr_t>(items[i]) / 16 * 0x9E3779B97F4A7C15u) >> 20 & mask;
    while (table[place] != nullptr) {
      if (table[place] == items[i]) return true;
      place = (place + 1) & mask;
    }
    table[place] = items[i];
  }
  return false;
}

}  // namespace gradclip::binding
