#define ROBUSTFT_VECTOR_BYTES 64
#include "isa/answer_consistency_impl.inc"

namespace robustft::consistency {
const Kernels kAvx512{"avx512", lcs, edit, common};
}  // namespace robustft::consistency
