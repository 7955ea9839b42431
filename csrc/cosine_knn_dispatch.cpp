// Which instruction sets this machine runs.
#include <stdexcept>
#include <string>

#include "cosine_knn.hpp"

namespace robustft::knn {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;  // best first
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        found.push_back(&kAvx512Vnni);
    }
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&kAvxVnni);
    if (avx2) found.push_back(&kAvx2);
#elif defined(__aarch64__)
    found.push_back(&kNeon);
#endif
    found.push_back(&kPortable);
    return found;
}

const Kernels& choose_kernels(const std::string& name) {
    static const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    std::string known;
    for (const Kernels* kernels : available) {
        if (name == kernels->name) return *kernels;
        known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
    }
    throw std::invalid_argument("isa must be one that runs here (" + known + "), got " + name);
}

}  // namespace robustft::knn
