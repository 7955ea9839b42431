// AMX: 16384 products of bytes an instruction, of 16 queries by 16 rows by 64 columns.
//
// A block's codes, [steps][64][4], already have the layout of the second operand; queries are the
// first, [groups][width][64]. What is not a dot product of bytes is done with AVX-512.
#include "isa/cosine_knn_avx512vnni.hpp"

namespace robustft::knn {
namespace {

constexpr std::size_t kSide = 16;                  // queries, rows, and groups of 4 columns
constexpr std::size_t kGroup = 4 * kSide;          // columns an instruction takes
constexpr std::size_t kRowBytes = 4 * kBlockRows;  // from one step of a block to the next

struct TileConfig {  // as LDTILECFG reads it
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 queries, 6 and 7 rows.
void configure(std::size_t queries) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = kGroup;
        config.rows[tile] = tile < 6 ? static_cast<std::uint8_t>(queries) : kSide;
    }
    _tile_loadconfig(&config);
}

// A block's codes; the steps past the last whole group are copied and padded.
struct Codes {
    const std::uint8_t* whole;
    std::size_t groups;
    bool ragged;
    alignas(64) std::uint8_t tail[kSide * kRowBytes];

    Codes(const void* codes, std::size_t steps)
        : whole(static_cast<const std::uint8_t*>(codes)),
          groups((steps + kSide - 1) / kSide),
          ragged(steps % kSide != 0) {
        if (!ragged) return;
        const std::size_t used = steps % kSide * kRowBytes;
        __builtin_memcpy(tail, whole + (groups - 1) * kSide * kRowBytes, used);
        __builtin_memset(tail + used, 0, sizeof(tail) - used);
    }
    const std::uint8_t* group(std::size_t i) const {
        return ragged && i + 1 == groups ? tail : whole + i * kSide * kRowBytes;
    }
};

template <std::size_t panels>
bool sift_sums(const Block& block, std::size_t first, const std::int32_t (*sums)[panels * kSide],
               Sieve* sieves, std::size_t count, std::uint32_t limit) {
    bool full = false;
    for (std::size_t q = 0; q < count; ++q) {
        const __m512i offset = _mm512_set1_epi32(sieves[q].offset);
        __m512 dots[panels];
#pragma GCC unroll 4
        for (std::size_t p = 0; p < panels; ++p) {
            dots[p] = _mm512_cvtepi32_ps(
                _mm512_add_epi32(_mm512_load_si512(sums[q] + p * kSide), offset));
        }
        full |= sift<Avx512Vnni>(block, first, dots, sieves[q], limit);
    }
    return full;
}

// 32 queries: two tiles of them by two of rows, so that each load serves two products.
bool filter_pair(const Block& block, const Codes& codes, const char* queries, Sieve* sieves,
                 std::uint32_t limit) {
    constexpr std::size_t panels = 2;
    const std::size_t tile = codes.groups * kSide * kGroup;
    bool full = false;
    for (std::size_t first = 0; first < kBlockRows; first += panels * kSide) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::size_t i = 0; i < codes.groups; ++i) {
            const std::uint8_t* rows = codes.group(i) + first * 4;
            const char* query = queries + i * kSide * kGroup;
            _tile_loadd(4, query, kGroup);
            _tile_loadd(6, rows, kRowBytes);
            _tile_loadd(7, rows + kGroup, kRowBytes);
            _tile_loadd(5, query + tile, kGroup);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        alignas(64) std::int32_t sums[2 * kSide][panels * kSide];
        _tile_stored(0, sums[0], sizeof(sums[0]));
        _tile_stored(1, sums[0] + kSide, sizeof(sums[0]));
        _tile_stored(2, sums[kSide], sizeof(sums[0]));
        _tile_stored(3, sums[kSide] + kSide, sizeof(sums[0]));
        full |= sift_sums<panels>(block, first, sums, sieves, 2 * kSide, limit);
    }
    return full;
}

// Up to 16 queries, as many as the tiles are configured for, by all rows of the block.
bool filter_some(const Block& block, const Codes& codes, const char* queries, Sieve* sieves,
                 std::size_t count, std::uint32_t limit) {
    constexpr std::size_t panels = 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t i = 0; i < codes.groups; ++i) {
        const std::uint8_t* rows = codes.group(i);
        _tile_loadd(4, queries + i * count * kGroup, kGroup);
        _tile_loadd(6, rows, kRowBytes);
        _tile_loadd(7, rows + kGroup, kRowBytes);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(6, rows + 2 * kGroup, kRowBytes);
        _tile_loadd(7, rows + 3 * kGroup, kRowBytes);
        _tile_dpbsud(2, 4, 6);
        _tile_dpbsud(3, 4, 7);
    }
    alignas(64) std::int32_t sums[kSide][panels * kSide];
    _tile_stored(0, sums[0], sizeof(sums[0]));
    _tile_stored(1, sums[0] + kSide, sizeof(sums[0]));
    _tile_stored(2, sums[0] + 2 * kSide, sizeof(sums[0]));
    _tile_stored(3, sums[0] + 3 * kSide, sizeof(sums[0]));
    return sift_sums<panels>(block, 0, sums, sieves, count, limit);
}

bool filter_amx(const Block& block, const void* queries, std::size_t steps, Sieve* sieves,
                std::size_t count, std::uint32_t limit) {
    const Codes codes(block.codes, steps);
    const std::size_t tile = codes.groups * kSide * kGroup;  // bytes
    const char* query = static_cast<const char*>(queries);
    bool full = false;
    if (count >= kSide) configure(kSide);
    for (; count >= 2 * kSide; count -= 2 * kSide) {
        full |= filter_pair(block, codes, query, sieves, limit);
        query += 2 * tile;
        sieves += 2 * kSide;
    }
    if (count >= kSide) {
        full |= filter_some(block, codes, query, sieves, kSide, limit);
        query += tile;
        sieves += kSide;
        count -= kSide;
    }
    if (count != 0) {
        configure(count);
        full |= filter_some(block, codes, query, sieves, count, limit);
    }
    _tile_release();
    return full;
}

constexpr Kernels with_amx(Kernels kernels) {
    kernels.name = "amx";
    kernels.int8_tile = kSide;
    kernels.int8_group = kGroup;
    kernels.filter_int8 = filter_amx;
    return kernels;
}

}  // namespace

const Kernels kAmx = with_amx(make_kernels<Avx512Vnni>("", 127, true));

}  // namespace robustft::knn
