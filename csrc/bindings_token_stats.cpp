#include <pybind11/pybind11.h>

namespace robustft {
void bind_token_stats(pybind11::module_&) {}
}  // namespace robustft
