// The seam between the search and its instruction sets: plain data and function pointers, so that
// nothing inline is compiled twice with different flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace robustft::knn {

enum class DType : std::uint8_t { float32, float16, bfloat16, float64 };

// Every dot product that decides an order is summed in this one way, whatever the instruction set:
// element i goes to lane i mod 16, each product and each sum rounded to fp64, lanes then folded
// in halves (8, 4, 2, 1).
inline constexpr std::size_t kLanes = 16;

// row [dim] of the kernel's dtype, query [dim].
using DotFn = double (*)(const void* row, const double* query, std::size_t dim);

// Rows are filtered in blocks of 64. A block's head describes its quantised rows: the unit row is
// scale * code within a Euclidean distance of `error`.
inline constexpr std::size_t kBlockRows = 64;

struct BlockHead {
    float scale[kBlockRows];
    float error[kBlockRows];
    double inv_norm[kBlockRows];  // of the caller's row; 0 for a zero row
};

// One query's stand against a block: a row survives if
//     bound = scale * dot(row codes, query codes) + slope * error >= floor.
struct Sieve {
    float slope;
    float floor;
    std::int32_t offset;  // what a sum of the raised row codes is too large by, negated
    std::uint32_t count;  // survivors so far
    std::uint32_t* rows;  // [>= count + 80] their positions
    float* bounds;        // [>= count + 80]
};

struct Block {
    const void* codes;               // uint8 [steps][64][4] (code + 128), or float [steps][64]
    const float* scale;              // [64]
    const float* error;              // [64]
    const std::uint32_t* positions;  // [64]
    std::uint64_t mask;              // the rows that take part
    const void* next;                // [next_bytes] what will be read next; may be null
    std::size_t next_bytes;
};

inline constexpr std::int32_t kLargestCode = 127;
inline constexpr std::int32_t kNarrowSum = 32767 / (128 + kLargestCode);  // row codes are raised

// Filters one block for `count` queries. Their codes lie in tiles of queries (the last one
// narrower), int8 [groups][width][int8_group], padded with zeros, or float [steps][width]. Returns
// whether some sieve now holds more than `limit` survivors.
using FilterFn = bool (*)(const Block& block, const void* queries, std::size_t steps, Sieve* sieves,
                          std::size_t count, std::uint32_t limit);

// panel [dim][64] = the unit vectors of 64 rows of one dtype, rounded to fp32.
using PackFn = void (*)(const void* const* rows, const double* inv_norm, std::size_t dim,
                        float* panel);

struct Kernels {
    const char* name;
    std::size_t int8_tile;   // queries per tile of the integer filter
    std::size_t int8_group;  // bytes of one query that lie together in it
    std::size_t float_tile;  // queries per tile of the fp32 filter
    // So many steps' products are summed in 16 bits, two of each to a lane: where that is more than
    // one, the positive query codes of a lane sum up to kNarrowSum at most, and so do the negative.
    std::size_t narrow_steps;
    bool fast_int8;  // whether the integer filter beats the fp32 one
    FilterFn filter_int8;
    FilterFn filter_float;
    DotFn dot[4];                  // by DType
    PackFn pack[4];                // by DType
    const Kernels* few = nullptr;  // better filters for a batch of up to few_queries
    std::size_t few_queries = 0;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512Vnni;
extern const Kernels kAmx;
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
#endif

}  // namespace robustft::knn
