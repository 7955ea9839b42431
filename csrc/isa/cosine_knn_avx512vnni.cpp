#include "isa/cosine_knn_avx512vnni.hpp"

namespace robustft::knn {

const Kernels kAvx512Vnni = make_kernels<Avx512Vnni>("avx512vnni", true);

}  // namespace robustft::knn
