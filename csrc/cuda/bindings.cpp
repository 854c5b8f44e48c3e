// What s1kernels/backends/cuda/ calls. The names and types are in s1kernels/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "kernel_table.h"
#include "launcher.h"

namespace py = pybind11;

namespace s1 {

void bind_cuda(py::module_& m) {
  py::class_<Launch>(m, "Launch")
      .def(py::init([](std::string name, std::uintptr_t function, std::uintptr_t context, Dim3 grid, Dim3 block,
                       unsigned shared, bool pdl, bool cooperative, const py::bytes& args) {
             return Launch(std::move(name), function, context, grid, block, shared, pdl, cooperative, args);
           }),
           py::arg("name"), py::arg("function"), py::arg("context"), py::arg("grid"), py::arg("block"),
           py::arg("shared"), py::arg("pdl"), py::arg("cooperative"), py::arg("args"))
      .def("enqueue", &Launch::enqueue, py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("driver_error", &driver_error);
  m.def("cuda_kernels", &cuda_kernels);
  m.def("cuda_function", &cuda_function, py::arg("name"), py::arg("device"));
}

}  // namespace s1
