// AMX: 16384 products of bytes an instruction, of 16 queries by 16 rows by 64 columns.
//
// A block's codes, [steps][64][4], already have the layout of the second operand; queries are the
// first, [groups][width][64]. What is not a dot product of bytes is done with AVX-512.
#include "isa/cosine_knn_avx512vnni.hpp"

namespace robustft::knn {
namespace {

constexpr std::size_t kSide = 16;          // queries, rows, and groups of 4 columns
constexpr std::size_t kGroup = 4 * kSide;  // columns an instruction takes
constexpr std::size_t kHalf = kBlockRows / 2;
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
    // Not the intrinsic: GCC 12 takes it to read eight bytes and may leave the others unset.
    asm volatile("ldtilecfg %0" : : "m"(config));
}

// A block's codes; the steps past the last whole group are copied and padded.
class Codes {
  public:
    Codes(const void* codes, std::size_t steps)
        : whole_(static_cast<const std::uint8_t*>(codes)),
          groups_((steps + kSide - 1) / kSide),
          ragged_(steps % kSide != 0) {
        if (!ragged_) return;
        const std::size_t used = steps % kSide * kRowBytes;
        __builtin_memcpy(tail_, whole_ + (groups_ - 1) * kSide * kRowBytes, used);
        __builtin_memset(tail_ + used, 0, sizeof(tail_) - used);
    }
    std::size_t groups() const { return groups_; }
    const std::uint8_t* group(std::size_t i) const {
        return ragged_ && i + 1 == groups_ ? tail_ : whole_ + i * kSide * kRowBytes;
    }

  private:
    const std::uint8_t* whole_;
    std::size_t groups_;
    bool ragged_;
    alignas(64) std::uint8_t tail_[kSide * kRowBytes];
};

// Sums of 32 queries by 32 rows or 16 by 64. They are sifted between the instructions of the next
// product but one: those of the last are still on their way, and to wait for them would leave the
// tiles idle.
class Sifting {
  public:
    Sifting(const Block& block, std::size_t groups, std::uint32_t limit)
        : block_(block), limit_(limit), groups_(groups) {}

    // Where the next sums go, [queries][rows].
    std::int32_t* room() { return sums_[newest_]; }

    // The sums are there, of `count` queries with `rows` rows from `first` on.
    void take(Sieve* sieves, std::size_t count, std::size_t first, std::size_t rows) {
        sift_to(oldest_.count);
        oldest_ = newer_;
        next_ = 0;
        newer_ = {sums_[newest_], sieves, count, first, rows, (count + groups_ - 1) / groups_};
        newest_ = newest_ == 2 ? 0 : newest_ + 1;
    }
    void step() {
        const std::size_t left = oldest_.count - next_;
        sift_to(left < oldest_.share ? oldest_.count : next_ + oldest_.share);
    }
    bool finish() {
        sift_to(oldest_.count);
        oldest_ = newer_;
        next_ = 0;
        sift_to(oldest_.count);
        return full_;
    }

  private:
    struct Sums {
        const std::int32_t* sums = nullptr;
        Sieve* sieves = nullptr;
        std::size_t count = 0, first = 0, rows = 0;
        std::size_t share = 0;  // queries a step
    };

    void sift_to(std::size_t stop) {
        if (oldest_.rows == kBlockRows) {
            sift_rows<kBlockRows>(stop);
        } else {
            sift_rows<kHalf>(stop);
        }
    }
    template <std::size_t rows>
    [[gnu::always_inline]] void sift_rows(std::size_t stop) {
        constexpr std::size_t panels = rows / kSide;
        const Stretch<Avx512Vnni, panels> stretch(block_, oldest_.first);
        const std::int32_t* sums = oldest_.sums + next_ * rows;
        const std::uint32_t limit = limit_;
        Sieve* const end = oldest_.sieves + stop;
        bool full = false;
        for (Sieve* sieve = oldest_.sieves + next_; sieve < end; ++sieve, sums += rows) {
            const __m512i offset = _mm512_set1_epi32(sieve->offset);
            __m512 dots[panels];
#pragma GCC unroll 4
            for (std::size_t p = 0; p < panels; ++p) {
                dots[p] = _mm512_cvtepi32_ps(
                    _mm512_add_epi32(_mm512_load_si512(sums + p * kSide), offset));
            }
            full |= sift(stretch, dots, *sieve, limit);
        }
        next_ = stop;
        full_ |= full;
    }

    const Block& block_;
    std::uint32_t limit_;
    std::size_t groups_;
    bool full_ = false;
    Sums oldest_, newer_;
    std::size_t next_ = 0;    // query of the oldest
    std::size_t newest_ = 0;  // where the next sums go
    alignas(64) std::int32_t sums_[3][4 * kSide * kSide];
};

// 32 queries by half a block: two tiles by two, so that each load serves two products.
void multiply_pair(const Codes& codes, std::size_t first, const char* queries, Sieve* sieves,
                   Sifting& sifting, Ahead& ahead) {
    const std::size_t tile = codes.groups() * kSide * kGroup;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t i = 0; i < codes.groups(); ++i) {
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
        ahead.step();
        sifting.step();
    }
    constexpr std::size_t stride = kHalf;
    std::int32_t* sums = sifting.room();
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + kSide, 4 * stride);
    _tile_stored(2, sums + kSide * stride, 4 * stride);
    _tile_stored(3, sums + kSide * stride + kSide, 4 * stride);
    sifting.take(sieves, 2 * kSide, first, kHalf);
}

// Up to 16 queries, as many as the tiles are configured for, by a whole block.
void multiply_some(const Codes& codes, const char* queries, std::size_t count, Sieve* sieves,
                   Sifting& sifting, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t i = 0; i < codes.groups(); ++i) {
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
        ahead.step();
        sifting.step();
    }
    constexpr std::size_t stride = kBlockRows;
    std::int32_t* sums = sifting.room();
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + kSide, 4 * stride);
    _tile_stored(2, sums + 2 * kSide, 4 * stride);
    _tile_stored(3, sums + 3 * kSide, 4 * stride);
    sifting.take(sieves, count, 0, kBlockRows);
}

bool filter_amx(const Block& block, const void* queries, std::size_t steps, Sieve* sieves,
                std::size_t count, std::uint32_t limit) {
    const Codes codes(block.codes, steps);
    const std::size_t groups = codes.groups();
    const std::size_t tile = groups * kSide * kGroup;  // bytes
    const char* query = static_cast<const char*>(queries);
    Ahead ahead(block, (count + kSide - 1) / kSide * groups);
    Sifting sifting(block, groups, limit);
    if (count >= kSide) configure(kSide);
    for (; count >= 2 * kSide; count -= 2 * kSide) {
        for (std::size_t first = 0; first < kBlockRows; first += kHalf) {
            multiply_pair(codes, first, query, sieves, sifting, ahead);
        }
        query += 2 * tile;
        sieves += 2 * kSide;
    }
    if (count >= kSide) {
        multiply_some(codes, query, kSide, sieves, sifting, ahead);
        query += tile;
        sieves += kSide;
        count -= kSide;
    }
    if (count != 0) {
        configure(count);
        multiply_some(codes, query, count, sieves, sifting, ahead);
    }
    _tile_release();
    return sifting.finish();
}

constexpr Kernels with_amx(Kernels kernels) {
    kernels.name = "amx";
    kernels.few = &kAvx512Vnni;
    kernels.few_queries = kSide / 2;  // tiles would be mostly idle
    kernels.int8_tile = kSide;
    kernels.int8_group = kGroup;
    kernels.filter_int8 = filter_amx;
    return kernels;
}

}  // namespace

const Kernels kAmx = with_amx(make_kernels<Avx512Vnni>("", true));

}  // namespace robustft::knn
