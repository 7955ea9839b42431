#include "cosine_knn.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace robustft::knn {
namespace {

constexpr std::size_t kMaxRows = 0xffff'ff00;  // rows are numbered in 32 bits
constexpr std::size_t kSlab = 1024;            // rows per task

std::invalid_argument bad_row(const char* name, std::size_t row, DType dtype) {
    const char* range = dtype == DType::float64 ? " and within 1e-140 ... 1e140" : "";
    return std::invalid_argument(std::string(name) + " row " + std::to_string(row) +
                                 " must be finite" + range);
}

}  // namespace

std::size_t item_size(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return 8;
        case DType::float32:
            return 4;
        default:
            return 2;
    }
}

double inverse_norm(const double* row, std::size_t dim) {
    const double squared = kPortable.dot[static_cast<int>(DType::float64)](row, row, dim);
    return squared > 0 ? 1 / std::sqrt(squared) : 0;
}

CosineIndex::CosineIndex(std::size_t dim, DType dtype) : dim_(dim), dtype_(dtype) {
    if (dim == 0) throw std::invalid_argument("embeddings must have at least one column");
}

std::size_t CosineIndex::extra_bytes() const {
    return inv_norm_.capacity() * sizeof(double) + ids_.capacity() * sizeof(std::int64_t);
}

const void* CosineIndex::row(std::size_t position) const {
    if (blocks_.size() == 1) return blocks_.front().rows[position];
    auto block = std::upper_bound(
        blocks_.begin(), blocks_.end(), position,
        [](std::size_t value, const Block& candidate) { return value < candidate.first; });
    --block;
    return block->rows[position - block->first];
}

std::vector<double> CosineIndex::inverse_norms(const Rows& rows, unsigned threads,
                                               Monitor& monitor) const {
    std::vector<double> inv_norm(rows.count);
    std::atomic<std::size_t> bad{rows.count};
    parallel_for((rows.count + kSlab - 1) / kSlab, threads, monitor,
                 [&](std::size_t task, unsigned) {
                     std::vector<double> wide(dim_);
                     const std::size_t end = std::min(rows.count, (task + 1) * kSlab);
                     for (std::size_t i = task * kSlab; i < end; ++i) {
                         if (!widen_row(rows[i], dtype_, dim_, wide.data())) {
                             std::size_t seen = bad.load();
                             while (i < seen && !bad.compare_exchange_weak(seen, i)) {
                             }
                             return;
                         }
                         inv_norm[i] = inverse_norm(wide.data(), dim_);
                     }
                 });
    if (bad != rows.count) throw bad_row("embeddings", bad.load(), dtype_);
    return inv_norm;
}

void CosineIndex::append(const Rows& rows, const std::int64_t* ids, unsigned threads,
                         Monitor& monitor) {
    if (rows.count == 0) return;
    if (rows.count > kMaxRows - size()) throw std::invalid_argument("too many rows");
    const std::vector<double> inv_norm = inverse_norms(rows, threads, monitor);
    inv_norm_.reserve(size() + rows.count);
    if (ids != nullptr) ids_.insert(ids_.end(), ids, ids + rows.count);
    Block* last = blocks_.empty() ? nullptr : &blocks_.back();
    if (last != nullptr && last->rows.stride == rows.stride &&
        last->rows[last->rows.count] == rows.data) {
        last->rows.count += rows.count;
    } else {
        blocks_.push_back({rows, size()});
    }
    inv_norm_.insert(inv_norm_.end(), inv_norm.begin(), inv_norm.end());
}

SearchStats CosineIndex::search(const Rows& queries, const SearchOptions& options,
                                std::int64_t* ids, float* cosines, Monitor& monitor) const {
    const std::size_t k = std::min(options.k, size());
    std::fill_n(ids, queries.count * options.k, -1);
    std::fill_n(cosines, queries.count * options.k, std::numeric_limits<float>::quiet_NaN());
    const DotFn dot = kPortable.dot[static_cast<int>(dtype_)];
    parallel_for(queries.count, options.threads, monitor, [&](std::size_t q, unsigned) {
        std::vector<double> query(dim_);
        if (!widen_row(queries[q], queries.dtype, dim_, query.data())) {
            throw bad_row("queries", q, queries.dtype);
        }
        const double inv_norm = inverse_norm(query.data(), dim_);
        TopK best(k);
        for (std::size_t i = 0; i < size(); ++i) {
            if (i % kSlab == 0) monitor.advance(std::min(kSlab, size() - i));
            if (options.allowed != nullptr && (options.allowed[i / 64] >> (i % 64) & 1) == 0) {
                continue;
            }
            if (options.exclude != nullptr && options.exclude[q] == id(i)) continue;
            const double score = dot(row(i), query.data(), dim_) * (inv_norm * inv_norm_[i]);
            if (score > options.threshold) {
                best.push({score, id(i), static_cast<std::uint32_t>(i)});
            }
        }
        std::size_t rank = q * options.k;
        for (const Scored& item : best.sorted()) {
            ids[rank] = item.id;
            cosines[rank++] = static_cast<float>(item.score);
        }
    });
    return {.rescored = queries.count * size()};
}

}  // namespace robustft::knn
