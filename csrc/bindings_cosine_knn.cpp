#include <pybind11/pybind11.h>

namespace robustft {
void bind_cosine_knn(pybind11::module_&) {}
}  // namespace robustft
