#include "binding/dtensors.h"

#include <deque>

namespace gradclip::binding {
namespace {

namespace py = pybind11;

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Gradients on the same mesh object with placements of the same types, whose parameters are on the
// same mesh object, too.
struct Kind {
  py::object mesh, own_mesh;
  py::object placements;
  py::list indices, gradients, local;

  bool has(py::handle other_mesh, py::handle other_own, py::handle other_placements) const {
    if (!other_mesh.is(mesh) || !other_own.is(own_mesh)) return false;
    const Py_ssize_t count = PyTuple_GET_SIZE(placements.ptr());
    if (PyTuple_GET_SIZE(other_placements.ptr()) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (Py_TYPE(PyTuple_GET_ITEM(placements.ptr(), i)) !=
          Py_TYPE(PyTuple_GET_ITEM(other_placements.ptr(), i))) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace

py::tuple read_dtensors(py::handle items, bool reads_grads, py::handle dtensor_type) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const spec_name = PyUnicode_InternFromString("_spec");
  static PyObject* const mesh_name = PyUnicode_InternFromString("mesh");
  static PyObject* const placements_name = PyUnicode_InternFromString("placements");
  static PyObject* const local_name = PyUnicode_InternFromString("_local_tensor");
  if (!PyList_Check(items.ptr()) && !PyTuple_Check(items.ptr())) {
    throw py::type_error("expected a list or a tuple");
  }
  std::deque<Kind> kinds;
  // Neighbors in a list are mostly alike.
  Kind* kind = nullptr;
  py::list others;
  const auto is_dtensor = [&](py::handle object) {
    return object && reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == dtensor_type.ptr();
  };
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
    const py::int_ index(i);
    py::object gradient;
    // Other classes may compute the attribute, which is read only once, where it may raise.
    if (is_dtensor(item)) gradient = reads_grads ? attribute(item, grad_name) : item;
    if (!is_dtensor(gradient)) {
      others.append(index);
      continue;
    }
    const py::object spec = attribute(gradient, spec_name);
    const py::object mesh = attribute(spec, mesh_name);
    const py::object placements = attribute(spec, placements_name);
    const py::object own = reads_grads ? attribute(attribute(item, spec_name), mesh_name) : mesh;
    if (!PyTuple_CheckExact(placements.ptr())) {
      others.append(index);
      continue;
    }
    if (kind == nullptr || !kind->has(mesh, own, placements)) {
      kind = nullptr;
      for (Kind& other : kinds) {
        if (other.has(mesh, own, placements)) kind = &other;
      }
      if (kind == nullptr) {
        kind = &kinds.emplace_back();
        kind->mesh = mesh;
        kind->own_mesh = own;
        kind->placements = placements;
      }
    }
    kind->indices.append(index);
    kind->gradients.append(gradient);
    kind->local.append(attribute(gradient, local_name));
  }
  py::list sorted;
  for (const Kind& each : kinds) {
    sorted.append(py::make_tuple(each.indices, each.gradients, each.local));
  }
  return py::make_tuple(sorted, others);
}

}  // namespace gradclip::binding
