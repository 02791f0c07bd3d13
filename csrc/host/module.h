// The parts of sorted_kernels._host, one a topic.
#pragma once

#include <pybind11/pybind11.h>

namespace sorted_kernels {

void bind_gemm(pybind11::module_& module);
void bind_optimizer(pybind11::module_& module);

}  // namespace sorted_kernels
