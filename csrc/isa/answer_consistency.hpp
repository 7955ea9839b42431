// The seam between the pairwise comparison and its instruction sets: plain data and function
// pointers. One text, answer_consistency_impl.inc, is compiled once per vector width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace robustft::consistency {

// Patterns of one question stand side by side, one 64-bit lane each; their number is padded to a
// multiple of this.
inline constexpr std::size_t kLaneBlock = 8;

// One 64-position word of every pattern against one stream of tokens.
struct Stream {
    const std::uint64_t* masks;  // [rows, stride]: bit p of masks[row, lane] = pattern has row at p
    std::size_t stride;          // lanes in a row
    const std::int32_t* rows;    // [steps]: the stream's tokens as rows of `masks`
    std::size_t steps;
    std::size_t lanes;     // lanes to work on, a multiple of kLaneBlock
    std::uint64_t* carry;  // [steps, stride], null when the patterns fit one word
    bool first_word;       // carry is written only (true) or read, then written
};

struct Kernels {
    const char* name;
    // total[lane] += how many of this word's positions are in a longest common subsequence.
    void (*lcs)(const Stream& stream, std::int64_t* total);
    // total[lane] += change of the edit distance down this word's `valid[lane]` positions.
    void (*edit)(const Stream& stream, const std::uint64_t* valid, std::int64_t* total);
    // popcount(a & b) over `words` words.
    std::int64_t (*common)(const std::uint64_t* a, const std::uint64_t* b, std::size_t words);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace robustft::consistency
