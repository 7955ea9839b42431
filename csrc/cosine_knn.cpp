#include "cosine_knn.hpp"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

namespace robustft::knn {
namespace {

constexpr std::size_t kMaxRows = 0xffff'ff00;  // rows are numbered in 32 bits
constexpr std::size_t kTaskBlocks = 16;

void lower(std::atomic<std::size_t>& value, std::size_t candidate) {
    std::size_t seen = value.load();
    while (candidate < seen && !value.compare_exchange_weak(seen, candidate)) {
    }
}

[[noreturn]] void refuse(const char* name, std::size_t row, DType dtype) {
    const char* range = dtype == DType::float64 ? " and within 1e-140 ... 1e140" : "";
    throw std::invalid_argument(std::string(name) + " row " + std::to_string(row) +
                                " must be finite" + range);
}

}  // namespace

CosineIndex::CosineIndex(std::size_t dim, DType dtype, const Kernels& kernels)
    : dim_(dim), dtype_(dtype), kernels_(kernels), blocks_(dim) {
    if (dim == 0) throw std::invalid_argument("embeddings must have at least one column");
}

std::size_t CosineIndex::extra_bytes() const {
    return blocks_.owned_bytes() + ids_.capacity() * sizeof(std::int64_t);
}

const void* CosineIndex::row(std::size_t position) const {
    if (parts_.size() == 1) return parts_.front().rows[position];
    const auto part = std::prev(std::upper_bound(
        parts_.begin(), parts_.end(), position,
        [](std::size_t value, const Part& candidate) { return value < candidate.first; }));
    return part->rows[position - part->first];
}

void CosineIndex::check(const Rows& rows, const char* name, unsigned threads,
                        Monitor& monitor) const {
    constexpr std::size_t slab = kTaskBlocks * kBlockRows;
    std::atomic<std::size_t> bad{rows.count};
    parallel_for((rows.count + slab - 1) / slab, threads, monitor, [&](std::size_t task, unsigned) {
        std::vector<double> wide(dim_);
        const std::size_t end = std::min(rows.count, (task + 1) * slab);
        for (std::size_t i = task * slab; i < end && i < bad; ++i) {
            if (!widen_row(rows[i], rows.dtype, dim_, wide.data())) lower(bad, i);
        }
    });
    if (bad != rows.count) refuse(name, bad, rows.dtype);
}

void CosineIndex::append(const Rows& rows, const std::int64_t* ids, unsigned threads,
                         Monitor& monitor) {
    if (rows.count == 0) return;
    if (rows.count > kMaxRows - size_) {
        throw std::invalid_argument("embeddings must be at most 4294967040 rows");
    }
    const std::size_t first_block = size_ / kBlockRows;
    const std::size_t blocks = (size_ + rows.count + kBlockRows - 1) / kBlockRows;
    blocks_.grow(size_, blocks);
    std::atomic<std::size_t> bad{rows.count};
    const std::size_t tasks = (blocks - first_block + kTaskBlocks - 1) / kTaskBlocks;
    parallel_for(tasks, threads, monitor, [&](std::size_t task, unsigned) {
        const std::size_t block = first_block + task * kTaskBlocks;
        const std::size_t begin = std::max(size_, block * kBlockRows) - size_;
        const std::size_t end =
            std::min(size_ + rows.count, (block + kTaskBlocks) * kBlockRows) - size_;
        std::vector<double> wide(dim_);
        for (std::size_t i = begin; i < end && i < bad; ++i) {
            if (widen_row(rows[i], dtype_, dim_, wide.data())) {
                blocks_.put(size_ + i, wide.data(), inverse_norm(wide.data(), dim_), dim_);
            } else {
                lower(bad, i);
            }
        }
    });
    if (bad != rows.count) refuse("embeddings", bad, dtype_);
    commit(rows, ids);
}

void CosineIndex::attach(const Rows& rows, const std::int64_t* ids, const void* blocks) {
    if (size_ != 0) throw std::logic_error("attach needs an empty index");
    if (rows.count == 0) return;
    blocks_.attach(blocks, (rows.count + kBlockRows - 1) / kBlockRows);
    commit(rows, ids);
}

void CosineIndex::commit(const Rows& rows, const std::int64_t* ids) {
    if (ids != nullptr) ids_.insert(ids_.end(), ids, ids + rows.count);
    if (!parts_.empty() && parts_.back().rows.stride == rows.stride &&
        parts_.back().rows[parts_.back().rows.count] == rows.data) {
        parts_.back().rows.count += rows.count;  // the caller filled more of the same buffer
    } else {
        parts_.push_back({rows, size_});
    }
    size_ += rows.count;
}

}  // namespace robustft::knn
