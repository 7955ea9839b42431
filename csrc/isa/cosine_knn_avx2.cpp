// AVX2. Products of bytes are summed in 16 bits over some steps, which takes fewer instructions
// than widening each; query codes are kept so small that they fit (Kernels::narrow_steps).
#include "isa/cosine_knn_avx2.hpp"

namespace robustft::knn {
namespace {

struct Isa : Avx2 {
    static constexpr std::size_t kTile = 4;

    static Ints multiply(Ints rows, Ints query) { return _mm256_maddubs_epi16(rows, query); }
    static Ints add_narrow(Ints a, Ints b) {
        Ints sum = _mm256_add_epi16(a, b);
        // GCC would add products to each other first, and run out of registers for them.
        asm("" : "+x"(sum));
        return sum;
    }
    static Ints add_wide(Ints sum, Ints pairs) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints dot(Ints sum, Ints rows, Ints query) {
        return add_wide(sum, multiply(rows, query));
    }
};

template <>
constexpr std::size_t narrow_steps<Isa> = 4;

}  // namespace

const Kernels kAvx2 = make_kernels<Isa>("avx2", true);

}  // namespace robustft::knn
