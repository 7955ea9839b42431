// Exact cosine k-nearest neighbours over rows that stay in the caller's memory.
//
// The cosine of x and y is dot(x, y) * (1/|x| * 1/|y|) in fp64, summed in the fixed order of
// isa/cosine_knn.hpp; a zero vector has cosine 0 with everything. Neighbours are ordered by
// (cosine descending, id ascending), so the answer depends on no thread, batch or instruction set.
//
// A search first bounds every cosine from above with 8-bit codes (or fp32 values), at a fraction of
// the cost; only rows whose bound reaches the k-th best cosine are computed in fp64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cosine_knn_codes.hpp"
#include "isa/cosine_knn.hpp"
#include "parallel_for.hpp"

namespace robustft::knn {

struct Rows {  // [count, dim], elements contiguous within a row
    const void* data = nullptr;
    std::ptrdiff_t stride = 0;  // bytes from one row to the next
    std::size_t count = 0;
    DType dtype = DType::float32;

    const void* operator[](std::size_t i) const {
        return static_cast<const char*>(data) + static_cast<std::ptrdiff_t>(i) * stride;
    }
};

// What bounds the cosines: chosen by hardware, size and the data itself, or by force.
enum class Tier { automatic, int8, float32, exact };

struct SearchOptions {
    std::size_t k = 1;
    const std::int64_t* exclude = nullptr;   // [Q] one id to leave out per query
    const std::uint64_t* allowed = nullptr;  // bit per row, 64 rows a word; null: all
    double threshold = -std::numeric_limits<double>::infinity();  // only cosines above it
    unsigned threads = 1;
    Tier tier = Tier::automatic;
};

struct SearchStats {  // (query, row) pairs
    std::uint64_t int8_pairs = 0;
    std::uint64_t float_pairs = 0;
    std::uint64_t rescored = 0;  // computed in fp64
};

std::vector<const Kernels*> available_kernels();         // best first
const Kernels& choose_kernels(const std::string& name);  // "" for the best

class CosineIndex {
  public:
    CosineIndex(std::size_t dim, DType dtype, const Kernels& kernels);

    std::size_t dim() const { return dim_; }
    DType dtype() const { return dtype_; }
    std::size_t size() const { return size_; }
    std::size_t extra_bytes() const;  // held on top of the caller's rows
    const std::vector<std::int64_t>& ids() const { return ids_; }
    const BlockStore& blocks() const { return blocks_; }
    const Kernels& kernels() const { return kernels_; }

    // Adds rows that must stay alive and unchanged as long as the index; `ids` is [count] or null
    // (then a row's id is its position), the same choice for every call. Throws
    // std::invalid_argument naming the first row that holds NaN or infinity, and adds nothing then.
    void append(const Rows& rows, const std::int64_t* ids, unsigned threads, Monitor& monitor);

    // The first rows of an empty index, with the blocks made of them by another index.
    void attach(const Rows& rows, const std::int64_t* ids, const void* blocks);

    // What `append` checks, alone.
    void check(const Rows& rows, const char* name, unsigned threads, Monitor& monitor) const;

    // ids [Q, k] padded with -1, cosines [Q, k] padded with NaN.
    SearchStats search(const Rows& queries, const SearchOptions& options, std::int64_t* ids,
                       float* cosines, Monitor& monitor) const;

    const void* row(std::size_t position) const;
    std::int64_t id(std::size_t position) const {
        return ids_.empty() ? static_cast<std::int64_t>(position) : ids_[position];
    }

  private:
    struct Part {
        Rows rows;
        std::size_t first;  // position of its first row
    };

    void commit(const Rows& rows, const std::int64_t* ids);

    std::size_t dim_;
    DType dtype_;
    const Kernels& kernels_;
    std::size_t size_ = 0;
    std::vector<Part> parts_;
    BlockStore blocks_;
    std::vector<std::int64_t> ids_;
};

}  // namespace robustft::knn
