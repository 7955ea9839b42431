// Which instruction sets this machine runs.
#include <stdexcept>
#include <string>

#include "cosine_knn.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace robustft::knn {
namespace {

#if defined(__x86_64__)
// The tiles' registers are the process's only once it has asked Linux for them.
bool enable_amx() {
#if defined(__linux__)
    constexpr unsigned kTile = 1U << 24, kInt8 = 1U << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kInt8) != 0 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#elif defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // Apple's cores all have them
#endif
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;  // best first
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        if (enable_amx()) found.push_back(&kAmx);
        found.push_back(&kAvx512Vnni);
    }
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&kAvxVnni);
    if (avx2) found.push_back(&kAvx2);
#elif defined(__aarch64__)
    if (has_dot_products()) found.push_back(&kNeonDot);
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
