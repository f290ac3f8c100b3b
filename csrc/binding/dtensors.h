// Sorts gradients that are DTensors by how they are distributed, faster than Python can.
#pragma once

#include <pybind11/pybind11.h>

namespace gradclip::binding {

// Finds the DTensors of a list or tuple, or with `reads_grads` those gradients of its DTensors that
// are DTensors themselves. Returns two lists. The first has a tuple for each combination of the
// mesh object of the gradient, that of the parameter, and the types of the placements: three lists
// of the indices, the gradients and their local parts. The second has the indices of all other
// items.
pybind11::tuple read_dtensors(pybind11::handle items, bool reads_grads,
                              pybind11::handle dtensor_type);

}  // namespace gradclip::binding
