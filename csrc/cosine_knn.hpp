// Exact cosine k-nearest neighbours over rows that stay in the caller's memory.
//
// The cosine of x and y is dot(x, y) * (1/|x| * 1/|y|) in fp64, summed in the fixed order of
// isa/cosine_knn.hpp; a zero vector has cosine 0 with everything. Neighbours are ordered by
// (cosine descending, id ascending), so the answer depends on no thread, batch or instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "isa/cosine_knn.hpp"
#include "parallel_for.hpp"
#include "topk.hpp"

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

struct SearchOptions {
    std::size_t k = 1;
    const std::int64_t* exclude = nullptr;   // [Q] one id to leave out per query
    const std::uint64_t* allowed = nullptr;  // bit per row, 64 rows a word; null: all
    double threshold = -std::numeric_limits<double>::infinity();  // only cosines above it
    unsigned threads = 1;
};

struct SearchStats {
    std::uint64_t rescored = 0;  // fp64 dot products
};

class CosineIndex {
  public:
    CosineIndex(std::size_t dim, DType dtype);

    std::size_t dim() const { return dim_; }
    DType dtype() const { return dtype_; }
    std::size_t size() const { return inv_norm_.size(); }
    std::size_t extra_bytes() const;  // held on top of the caller's rows
    const std::vector<std::int64_t>& ids() const { return ids_; }

    // Adds rows that must stay alive and unchanged as long as the index; `ids` is [count] or null
    // (then a row's id is its position), the same choice for every call. Throws
    // std::invalid_argument naming the first row that holds NaN or infinity, and adds nothing then.
    void append(const Rows& rows, const std::int64_t* ids, unsigned threads, Monitor& monitor);

    // What `append` checks, alone.
    void check(const Rows& rows, unsigned threads, Monitor& monitor) const {
        inverse_norms(rows, threads, monitor);
    }

    // ids [Q, k] padded with -1, cosines [Q, k] padded with NaN.
    SearchStats search(const Rows& queries, const SearchOptions& options, std::int64_t* ids,
                       float* cosines, Monitor& monitor) const;

  private:
    struct Block {
        Rows rows;
        std::size_t first;  // position of its first row
    };

    const void* row(std::size_t position) const;
    std::vector<double> inverse_norms(const Rows& rows, unsigned threads, Monitor& monitor) const;
    std::int64_t id(std::size_t position) const {
        return ids_.empty() ? static_cast<std::int64_t>(position) : ids_[position];
    }

    std::size_t dim_;
    DType dtype_;
    std::vector<Block> blocks_;
    std::vector<double> inv_norm_;  // 0 for a zero row
    std::vector<std::int64_t> ids_;
};

// [dim] of any dtype to fp64; false if a value is NaN, infinite or (float64 only) so large or small
// that its square leaves the range of fp64.
bool widen_row(const void* row, DType dtype, std::size_t dim, double* out);
double inverse_norm(const double* row, std::size_t dim);  // 0 for a zero row
std::size_t item_size(DType dtype);

}  // namespace robustft::knn
