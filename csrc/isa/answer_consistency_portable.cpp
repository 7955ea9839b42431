#define ROBUSTFT_VECTOR_BYTES 16
#include "isa/answer_consistency_impl.inc"

namespace robustft::consistency {
const Kernels kPortable{"portable", lcs, edit, common};
}  // namespace robustft::consistency
