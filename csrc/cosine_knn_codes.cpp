#include "cosine_knn_codes.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace robustft::knn {
namespace {

float from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000U) << 16;
    const std::uint32_t magnitude = (bits & 0x7fffU) << 13;
    if (magnitude >= 0x0f80'0000U) return std::numeric_limits<float>::quiet_NaN();
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

float from_brain(std::uint16_t bits) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Sums and maxima over kLanes lanes, so that a compiler may use vectors without reordering.
struct Lanes {
    double lane[kLanes] = {};
    double sum() const {
        double total = 0;
        for (const double x : lane) total += x;
        return total;
    }
    double max() const { return *std::max_element(lane, lane + kLanes); }
};

template <class Body>
void each(std::size_t dim, Body&& body) {
    std::size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) body(i + lane, lane);
    }
    for (std::size_t lane = 0; i + lane < dim; ++lane) body(i + lane, lane);
}

double largest_magnitude(const double* row, std::size_t dim) {
    Lanes largest;
    each(dim, [&](std::size_t i, std::size_t lane) {
        const double x = std::abs(row[i]);
        largest.lane[lane] = x > largest.lane[lane] ? x : largest.lane[lane];
    });
    return largest.max();
}

template <class T, class Widen>
bool widen_all(const void* row, std::size_t dim, double* out, Widen widen) {
    const T* x = static_cast<const T*>(row);
    Lanes poison;  // x * 0 is 0 unless x is NaN or infinite
    each(dim, [&](std::size_t i, std::size_t lane) {
        out[i] = widen(x[i]);
        poison.lane[lane] += out[i] * 0;
    });
    return poison.sum() == 0;
}

constexpr std::size_t kHugePage = 2 << 20;

float round_up(double x) {
    const auto near = static_cast<float>(x);
    return near < x ? std::nextafter(near, std::numeric_limits<float>::infinity()) : near;
}

// Large pieces in large pages: a scan reads them from end to end, faster by a fifth.
char* allocate(std::size_t bytes) {
    const std::size_t page = bytes >= 2 * kHugePage ? kHugePage : 64;
    const std::size_t rounded = (bytes + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, rounded);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    return static_cast<char*>(memory);
}

constexpr double kCautious = 1 + 1e-6;  // covers the rounding of a norm computed in fp64

constexpr std::size_t kFirstChunk = 16;  // blocks; later ones double
constexpr std::size_t kLargestChunk = 1024;

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

bool widen_row(const void* row, DType dtype, std::size_t dim, double* out) {
    switch (dtype) {
        case DType::float32:
            return widen_all<float>(row, dim, out, [](float x) { return x; });
        case DType::float16:
            return widen_all<std::uint16_t>(row, dim, out, from_half);
        case DType::bfloat16:
            return widen_all<std::uint16_t>(row, dim, out, from_brain);
        case DType::float64:
            break;
    }
    if (!widen_all<double>(row, dim, out, [](double x) { return x; })) return false;
    const double largest = largest_magnitude(out, dim);
    return largest == 0 || (largest >= 1e-140 && largest <= 1e140);
}

double inverse_norm(const double* row, std::size_t dim) {
    const double squared = kPortable.dot[static_cast<int>(DType::float64)](row, row, dim);
    return squared > 0 ? 1 / std::sqrt(squared) : 0;
}

Quantised quantise(const double* row, double inv_norm, std::size_t dim, std::int32_t limit,
                   std::int8_t* codes) {
    if (inv_norm == 0) {
        std::memset(codes, 0, dim);
        return {0, 0, 0};
    }
    // Any codes would do: the error is that of the codes chosen, not that of a good choice.
    const auto scale = static_cast<float>(largest_magnitude(row, dim) * inv_norm / limit);
    const double to_code = inv_norm / scale;
    const double wide_scale = scale;
    constexpr double magic = 0x1.8p52;  // x + magic - magic rounds x to an integer
    Lanes error;
    Lanes norm;
    each(dim, [&](std::size_t i, std::size_t lane) {
        const double code = row[i] * to_code + magic - magic;
        const double back = code * wide_scale;
        const double rest = row[i] * inv_norm - back;
        error.lane[lane] += rest * rest;
        norm.lane[lane] += back * back;
        codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(code));
    });
    return {scale, round_up(std::sqrt(error.sum()) * kCautious), std::sqrt(norm.sum()) * kCautious};
}

std::size_t BlockStore::owned_bytes() const {
    std::size_t blocks = 0;
    for (const Chunk& chunk : chunks_) blocks += chunk.owned ? chunk.blocks : 0;
    return blocks * bytes_;
}

const char* BlockStore::at(std::size_t block) const {
    const Chunk* chunk = &chunks_.front();
    if (block >= chunk->blocks) {
        chunk = &*std::prev(std::upper_bound(
            chunks_.begin(), chunks_.end(), block,
            [](std::size_t value, const Chunk& candidate) { return value < candidate.first; }));
    }
    return chunk->data + (block - chunk->first) * bytes_;
}

void BlockStore::attach(const void* data, std::size_t blocks) {
    if (blocks != 0) chunks_.push_back({nullptr, static_cast<const char*>(data), total(), blocks});
}

void BlockStore::grow(std::size_t rows, std::size_t blocks) {
    const bool replaces = rows % kBlockRows != 0 && !chunks_.back().owned;
    const std::size_t kept = total() - (replaces ? 1 : 0);
    if (blocks <= kept) return;
    const std::size_t wanted = blocks - kept;
    const bool first = chunks_.empty();
    const std::size_t usual =
        first || !chunks_.back().owned
            ? kFirstChunk
            : std::clamp(2 * chunks_.back().blocks, kFirstChunk, kLargestChunk);
    // The rows an index is built from get exactly their room; what is added later, room to grow.
    const std::size_t count = first ? wanted : std::max(wanted, usual);
    std::unique_ptr<char, Free> memory(allocate(count * bytes_));
    char* const data = memory.get();
    chunks_.push_back({std::move(memory), data, kept, count});
    // Only now that nothing can fail any more.
    if (replaces) {
        Chunk& mapped = chunks_[chunks_.size() - 2];
        --mapped.blocks;
        std::memcpy(data, mapped.data + mapped.blocks * bytes_, bytes_);
    }
}

void BlockStore::put(std::size_t position, const double* row, double inv_norm, std::size_t dim) {
    const std::size_t lane = position % kBlockRows;
    char* block = const_cast<char*>(at(position / kBlockRows));  // grow() made it writable
    if (lane == 0) std::memset(block, 0, bytes_);  // what is saved to disk holds no stale memory
    std::vector<std::int8_t> codes(steps_ * 4);
    const Quantised result = quantise(row, inv_norm, dim, kLargestCode, codes.data());
    auto* head = reinterpret_cast<BlockHead*>(block);
    head->scale[lane] = result.scale;
    head->error[lane] = result.error;
    head->inv_norm[lane] = inv_norm;
    char* out = block + sizeof(BlockHead) + lane * 4;
    for (std::size_t step = 0; step < steps_; ++step, out += 4 * kBlockRows) {
        std::uint32_t word;
        std::memcpy(&word, codes.data() + step * 4, 4);
        word ^= 0x8080'8080U;  // code + 128
        std::memcpy(out, &word, 4);
    }
}

std::vector<BlockStore::Span> BlockStore::spans(std::size_t blocks) const {
    std::vector<Span> out;
    for (const Chunk& chunk : chunks_) {
        if (chunk.first < blocks) {
            out.push_back({chunk.data, std::min(chunk.blocks, blocks - chunk.first)});
        }
    }
    return out;
}

}  // namespace robustft::knn
