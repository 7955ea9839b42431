#define ROBUSTFT_VECTOR_BYTES 32
#include "isa/answer_consistency_impl.inc"

namespace robustft::consistency {
const Kernels kAvx2{"avx2", lcs, edit, common};
}  // namespace robustft::consistency
