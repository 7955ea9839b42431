// AVX2 with VNNI in 256 bits (client cores without AVX-512).
#include "isa/cosine_knn_avx2.hpp"

namespace robustft::knn {
namespace {

struct Isa : Avx2 {
    static constexpr std::size_t kTile = 6;

    // Not the intrinsic, around which GCC 12 spills.
    static Ints dot(Ints sum, Ints rows, Ints query) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(rows), "x"(query));
        return sum;
    }
};

}  // namespace

const Kernels kAvxVnni = make_kernels<Isa>("avxvnni", true);

}  // namespace robustft::knn
