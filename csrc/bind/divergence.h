// Adds the kernels of two tensors of logits to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace egrsd {
void bind_divergence(pybind11::module_& module);
}
