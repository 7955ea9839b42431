// Rows as numbers of other kinds: widened to fp64, and quantised to 8 bits with a proven error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "isa/cosine_knn.hpp"

namespace robustft::knn {

std::size_t item_size(DType dtype);

// [dim] of any dtype to fp64; false if a value is NaN, infinite or (float64 only) so large or small
// that its square leaves the range of fp64.
bool widen_row(const void* row, DType dtype, std::size_t dim, double* out);

double inverse_norm(const double* row, std::size_t dim);  // 0 for a zero row

// The unit vector of a row is scale * codes within a Euclidean distance of `error` (rounded up);
// `norm` is the length of scale * codes (rounded up). Codes lie in [-limit, limit].
struct Quantised {
    float scale;
    float error;
    double norm;
};
Quantised quantise(const double* row, double inv_norm, std::size_t dim, std::int32_t limit,
                   std::int8_t* codes);

// The quantised rows, in blocks of kBlockRows: a BlockHead, then code + 128 as uint8
// [steps][kBlockRows][4], a step being four columns (the last ones padded with zero codes).
// Blocks never move once made; they may lie in a mapped file.
class BlockStore {
  public:
    explicit BlockStore(std::size_t dim)
        : steps_((dim + 3) / 4), bytes_(sizeof(BlockHead) + steps_ * 4 * kBlockRows) {}

    std::size_t steps() const { return steps_; }
    std::size_t block_bytes() const { return bytes_; }
    std::size_t owned_bytes() const;

    const BlockHead& head(std::size_t block) const {
        return *reinterpret_cast<const BlockHead*>(at(block));
    }
    const std::uint8_t* codes(std::size_t block) const {
        return reinterpret_cast<const std::uint8_t*>(at(block)) + sizeof(BlockHead);
    }

    // Makes [0, blocks) exist. When `rows` of them are in use, the last one unfilled, that one
    // becomes writable even if it lay in a file.
    void grow(std::size_t rows, std::size_t blocks);
    void attach(const void* data, std::size_t blocks);  // the first blocks, not owned

    // Quantises one row, given as fp64, into its place.
    void put(std::size_t position, const double* row, double inv_norm, std::size_t dim);

    struct Span {
        const void* data;
        std::size_t blocks;
    };
    std::vector<Span> spans(std::size_t blocks) const;  // the first `blocks`, in order

  private:
    struct Free {
        void operator()(void* data) const { std::free(data); }
    };
    struct Chunk {
        std::unique_ptr<char, Free> owned;  // null: in a file
        const char* data;
        std::size_t first;
        std::size_t blocks;
    };

    std::size_t total() const {
        return chunks_.empty() ? 0 : chunks_.back().first + chunks_.back().blocks;
    }
    const char* at(std::size_t block) const;

    std::size_t steps_;
    std::size_t bytes_;
    std::vector<Chunk> chunks_;
};

}  // namespace robustft::knn
