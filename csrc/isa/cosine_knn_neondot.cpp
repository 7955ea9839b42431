// NEON with the dot product of bytes (Armv8.2 and later): 16 products an instruction.
#include "isa/cosine_knn_neon.hpp"

namespace robustft::knn {
namespace {

struct Isa : Neon {
    static Ints dot(Ints sum, Ints rows, Ints query) {
        return vdotq_s32(sum, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(query));
    }
};

}  // namespace

const Kernels kNeonDot = make_kernels<Isa>("neondot", true);

}  // namespace robustft::knn
