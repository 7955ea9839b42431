#include <pybind11/pybind11.h>

namespace robustft {
void bind_answer_consistency(pybind11::module_&) {}
}  // namespace robustft
