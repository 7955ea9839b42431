// AVX2. Two products of bytes are summed in 16 bits with saturation: query codes are kept to 63,
// so that 2 * 255 * 63 fits.
#include "isa/cosine_knn_avx2.hpp"

namespace robustft::knn {
namespace {

struct Isa : Avx2 {
    static constexpr std::size_t kTile = 4;

    static Ints dot(Ints sum, Ints rows, Ints query) {
        const Ints pairs = _mm256_maddubs_epi16(rows, query);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace

const Kernels kAvx2 = make_kernels<Isa>("avx2", 63, true);

}  // namespace robustft::knn
