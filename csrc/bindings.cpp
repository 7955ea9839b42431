// The Python module `robustft._core`. Each algorithm binds itself in its own bindings_*.cpp;
// no file of this group contains an algorithm.
#include <pybind11/pybind11.h>

namespace robustft {
void bind_cosine_knn(pybind11::module_& module);
void bind_token_stats(pybind11::module_& module);
void bind_answer_consistency(pybind11::module_& module);
}  // namespace robustft

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native cores of robustft: cosine kNN, token statistics, answer consistency.";
    robustft::bind_cosine_knn(module);
    robustft::bind_token_stats(module);
    robustft::bind_answer_consistency(module);
}
