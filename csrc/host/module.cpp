// sorted_kernels._host: the planning code, and kernels on host memory, for Python.
#include "host/module.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "Planning code of the kernels, and kernels run on host memory, for tests.";
  sorted_kernels::bind_gemm(module);
  sorted_kernels::bind_optimizer(module);
}
