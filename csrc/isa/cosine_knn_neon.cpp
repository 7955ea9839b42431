// NEON as every 64-bit Arm core has it.
#include "isa/cosine_knn_neon.hpp"

namespace robustft::knn {
namespace {

struct Isa : Neon {
    static Ints dot(Ints sum, Ints rows, Ints query) {
        const int8x16_t x = vreinterpretq_s8_s32(rows), y = vreinterpretq_s8_s32(query);
        const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y));
        const int16x8_t high = vmull_high_s8(x, y);
        return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
};

}  // namespace

const Kernels kNeon = make_kernels<Isa>("neon", true);

}  // namespace robustft::knn
