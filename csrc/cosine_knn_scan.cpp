#include "cosine_knn_scan.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

namespace robustft::knn {
namespace {

constexpr float kOnes[kBlockRows] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
constexpr float kZeros[kBlockRows] = {};

constexpr std::size_t kFirstFloatSpan = 256;  // blocks before the 8-bit filter gets another try
// Trials of the 8-bit filter fail when it lets through more than this share of the rows, in 1/32:
// at first without a floor to go by, later in fewer rows and with the floor found so far. A row
// computed in fp64 costs about as much as 20 in the fp32 filter.
constexpr std::size_t kShares = 32, kFirstShare = 28, kRetryShare = 2, kRetryRows = 256;
constexpr std::size_t kSlackRoom = 80;  // past the limit: a block's rows and a vector's width
// What is fetched of how many rows to come: the start of each; the hardware goes on by itself.
constexpr std::size_t kPrefetchLines = 12, kPrefetchRows = 3;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float round_down(double x) {
    const auto near = static_cast<float>(x);
    return near > x ? std::nextafter(near, -kInfinity) : near;
}

}  // namespace

std::uint32_t Plan::raw_limit() const {
    return static_cast<std::uint32_t>(std::clamp<std::size_t>(4 * k, 128, 4096));
}
std::size_t Plan::kept_limit() const { return 4 * k + 256; }
std::size_t Plan::query_bytes() const {
    return index.dim() + (raw_limit() + kSlackRoom) * 8 + 6 * k * 12 + k * sizeof(Scored);
}

Scan::Scan(const Plan& plan, Batch& batch)
    : plan_(plan),
      batch_(batch),
      index_(plan.index),
      dot_(index_.kernels().dot[static_cast<int>(index_.dtype())]),
      tier_(plan.tier),
      raw_limit_(plan.raw_limit()),
      sieves_(batch.count()),
      queries_(batch.count()),
      trial_left_(plan.adaptive ? 2 * plan.kept_limit() : 0),
      float_span_(kFirstFloatSpan) {
    const std::size_t room = raw_limit_ + kSlackRoom;
    if (tier_ != Tier::exact) {
        raw_rows_.resize(batch.count() * room);
        raw_bounds_.resize(batch.count() * room);
    }
    for (std::size_t q = 0; q < batch.count(); ++q) {
        queries_[q].best.reset(plan.k);
        queries_[q].floor = plan.options.threshold;
        sieves_[q].count = 0;
        sieves_[q].rows = raw_rows_.data() + q * room;
        sieves_[q].bounds = raw_bounds_.data() + q * room;
    }
    use(tier_);
}

// Every query's sieve in the units of a tier. What the last one let through must be settled.
void Scan::use(Tier tier) {
    tier_ = tier;
    if (tier == Tier::exact) return;
    for (std::size_t q = 0; q < batch_.count(); ++q) {
        sieves_[q].slope = batch_.scale(tier, q).slope;
        sieves_[q].offset = batch_.scale(tier, q).offset;
        lower_sieve(q);
    }
}

void Scan::lower_sieve(std::size_t q) {
    const Batch::Scale& scale = batch_.scale(tier_, q);
    // A zero query needs no filter: its answer is known.
    sieves_[q].floor = batch_.zero(q) ? std::numeric_limits<float>::infinity()
                                      : round_down((queries_[q].floor - scale.slack) / scale.unit);
}

// The rows of one block that take part: their positions and a bit for each.
std::uint64_t Scan::select(std::size_t block, std::uint32_t* positions) const {
    const auto first = static_cast<std::uint32_t>(block * kBlockRows);
    if (plan_.gather) {
        const std::size_t count = std::min(kBlockRows, plan_.gathered.size() - first);
        for (std::size_t i = 0; i < kBlockRows; ++i) {
            positions[i] = plan_.gathered[first + std::min(i, count - 1)];
        }
        return ~std::uint64_t{0} >> (kBlockRows - count);
    }
    const std::size_t count = std::min(kBlockRows, index_.size() - first);
    for (std::uint32_t i = 0; i < kBlockRows; ++i) positions[i] = first + i;
    const std::uint64_t mask = ~std::uint64_t{0} >> (kBlockRows - count);
    return plan_.options.allowed == nullptr ? mask : mask & plan_.options.allowed[block];
}

void Scan::run(std::size_t first_block, std::size_t last_block, Monitor& monitor) {
    std::uint64_t done = 0;
    trial_start_ = first_block;
    for (std::size_t block = first_block; block < last_block;) {
        const std::uint64_t mask = select(block, positions_);
        if (tier_ == Tier::exact) {
            compute_all(mask);
        } else if (mask != 0) {
            filter(block, mask);
        }
        block = plan_.adaptive ? next_block(block, static_cast<std::size_t>(std::popcount(mask)))
                               : block + 1;
        done += kBlockRows * batch_.count();
        if (done >= 4096) {
            monitor.advance(done);
            done = 0;
        }
    }
    monitor.advance(done);
}

void Scan::compute_all(std::uint64_t mask) {
    for (; mask != 0; mask &= mask - 1) {
        const std::uint32_t row = positions_[std::countr_zero(mask)];
        for (std::size_t q = 0; q < batch_.count(); ++q) {
            if (!batch_.zero(q)) rescore_one(q, row);
        }
    }
}

void Scan::filter(std::size_t block, std::uint64_t mask) {
    const Kernels& kernels = batch_.kernels();
    const BlockStore& store = index_.blocks();
    Block view{nullptr, kOnes, kZeros, positions_, mask, nullptr, 0};
    bool full;
    if (tier_ == Tier::int8) {
        if (plan_.gather) {
            gathered_codes_.resize(store.steps() * kBlockRows);
            for (std::size_t i = 0; i < kBlockRows; ++i) {
                const std::size_t from = positions_[i] / kBlockRows,
                                  lane = positions_[i] % kBlockRows;
                gathered_scale_[i] = store.head(from).scale[lane];
                gathered_error_[i] = store.head(from).error[lane];
                const std::uint8_t* codes = store.codes(from) + lane * 4;
                for (std::size_t step = 0; step < store.steps(); ++step) {
                    std::memcpy(&gathered_codes_[step * kBlockRows + i],
                                codes + step * 4 * kBlockRows, 4);
                }
            }
            view.codes = gathered_codes_.data();
            view.scale = gathered_scale_;
            view.error = gathered_error_;
        } else {
            view.codes = store.codes(block);
            view.scale = store.head(block).scale;
            view.error = store.head(block).error;
            if (block + 1 < plan_.blocks) {
                view.next = &store.head(block + 1);
                view.next_bytes = store.block_bytes();
            }
        }
        full = kernels.filter_int8(view, batch_.codes(tier_), store.steps(), sieves_.data(),
                                   batch_.count(), raw_limit_);
        int8_pairs_ += static_cast<std::size_t>(std::popcount(mask)) * batch_.count();
    } else {
        panel_.resize(index_.dim() * kBlockRows);
        const void* rows[kBlockRows];
        double inv_norm[kBlockRows];
        const std::size_t some = positions_[std::countr_zero(mask)];
        for (std::size_t i = 0; i < kBlockRows; ++i) {
            // Rows outside the mask may not exist; any other stands in for them.
            const std::size_t row = (mask >> i & 1) != 0 ? positions_[i] : some;
            rows[i] = index_.row(row);
            inv_norm[i] = head(row).inv_norm[row % kBlockRows];
        }
        kernels.pack[static_cast<int>(index_.dtype())](rows, inv_norm, index_.dim(), panel_.data());
        view.codes = panel_.data();
        full = kernels.filter_float(view, batch_.codes(tier_), index_.dim(), sieves_.data(),
                                    batch_.count(), raw_limit_);
        float_pairs_ += static_cast<std::size_t>(std::popcount(mask)) * batch_.count();
    }
    if (!full) return;
    for (std::size_t q = 0; q < batch_.count(); ++q) {
        if (sieves_[q].count <= raw_limit_) continue;
        trial_survivors_ += sieves_[q].count;
        probe_rescored_ += settle(q);
    }
}

// Turns survivors into candidates, drops those that can no longer win, raises the floor.
std::size_t Scan::settle(std::size_t q) {
    Query& query = queries_[q];
    Sieve& sieve = sieves_[q];
    std::atomic<double>& shared = batch_.floor(q);
    query.floor = std::max(query.floor, shared.load(std::memory_order_relaxed));
    const Batch::Scale& scale = batch_.scale(tier_, q);
    const std::int64_t* exclude = plan_.options.exclude;
    const std::int64_t excluded = exclude == nullptr ? -1 : exclude[batch_.first() + q];
    for (std::uint32_t i = 0; i < sieve.count; ++i) {
        __builtin_prefetch(&head(sieve.rows[i]).error[sieve.rows[i] % kBlockRows]);
    }
    const std::size_t before = query.kept.size();
    query.kept.resize(before + sieve.count);
    Candidate* out = query.kept.data() + before;
    const auto unit = static_cast<float>(scale.unit), slack = static_cast<float>(scale.slack);
    const float norm = tier_ == Tier::int8 ? static_cast<float>(scale.norm) : 0;
    const float cut = round_down(query.floor);
    for (std::uint32_t i = 0; i < sieve.count; ++i) {  // no branches: they would be coin tosses
        const std::uint32_t row = sieve.rows[i];
        const float upper = sieve.bounds[i] * unit + slack;
        *out = {upper, slack + norm * head(row).error[row % kBlockRows], row};
        out += upper >= cut;
    }
    query.kept.resize(static_cast<std::size_t>(out - query.kept.data()));
    if (exclude != nullptr) {
        const auto fresh = query.kept.begin() + static_cast<std::ptrdiff_t>(before);
        query.kept.erase(
            std::remove_if(fresh, query.kept.end(),
                           [&](const Candidate& c) { return index_.id(c.row) == excluded; }),
            query.kept.end());
    }
    sieve.count = 0;
    tighten(q);
    const bool many = query.kept.size() > plan_.kept_limit() && trial_left_ == 0;
    const std::size_t rescored = many ? rescore(q) : 0;
    double seen = shared.load(std::memory_order_relaxed);
    while (query.floor > seen &&
           !shared.compare_exchange_weak(seen, query.floor, std::memory_order_relaxed)) {
    }
    lower_sieve(q);
    return rescored;
}

// The k-th largest of what is reached, computed or estimated with caution, is the new floor. Only
// what lies above the present one can raise it.
void Scan::tighten(std::size_t q) {
    Query& query = queries_[q];
    std::vector<float>& scores = query.scores;
    scores.resize(query.best.size() + query.kept.size());
    const float floor = round_down(query.floor);
    const float caution = batch_.scale(tier_, q).caution;
    float* out = scores.data();
    for (const Scored& item : query.best.items()) {
        *out = round_down(item.score);
        out += *out > floor;
    }
    for (const Candidate& candidate : query.kept) {
        *out = candidate.upper - caution * candidate.reach;
        out += *out > floor;
    }
    if (out < scores.data() + plan_.k) return;
    float* kth = scores.data() + (plan_.k - 1);
    std::nth_element(scores.data(), kth, out, std::greater<>());
    query.floor = std::max<double>(query.floor, *kth);
    Candidate* end = query.kept.data();
    for (const Candidate& candidate : query.kept) {
        *end = candidate;
        end += candidate.upper >= *kth;
    }
    query.kept.resize(static_cast<std::size_t>(end - query.kept.data()));
}

// Whether the rows passed over cannot be among the k best: the k-th cosine found reaches the
// highest floor that turned a row away.
bool Scan::certified(const Query& query) const {
    return query.floor <= plan_.options.threshold ||
           (query.best.full() && query.best.floor() >= query.floor);
}

void Scan::rescore_one(std::size_t q, std::uint32_t row) {
    const double inv_norm = head(row).inv_norm[row % kBlockRows];
    ++queries_[q].rescored;
    offer(q, row,
          dot_(index_.row(row), batch_.wide(q), index_.dim()) * (batch_.inv_norm(q) * inv_norm));
}

void Scan::offer(std::size_t q, std::uint32_t row, double score) {
    if (!(score > plan_.options.threshold)) return;
    const std::int64_t id = index_.id(row);
    if (plan_.options.exclude != nullptr && plan_.options.exclude[batch_.first() + q] == id) return;
    queries_[q].best.push({score, id, row});
}

// Computes candidates in fp64, the most promising first, until none can win any more.
std::size_t Scan::rescore(std::size_t q) {
    Query& query = queries_[q];
    std::sort(query.kept.begin(), query.kept.end(),
              [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
    const std::size_t lines =
        std::min(index_.dim() * item_size(index_.dtype()) / 64 + 1, kPrefetchLines);
    const auto prefetch = [&](std::size_t i) {
        if (i >= query.kept.size() || query.kept[i].upper < query.floor) return;
        const char* row = static_cast<const char*>(index_.row(query.kept[i].row));
        for (std::size_t line = 0; line < lines; ++line) __builtin_prefetch(row + line * 64);
    };
    for (std::size_t row = 0; row < kPrefetchRows; ++row) prefetch(row);
    std::size_t i = 0;
    for (; i < query.kept.size() && query.kept[i].upper >= query.floor; ++i) {
        prefetch(i + kPrefetchRows);
        rescore_one(q, query.kept[i].row);
        query.floor = std::max(query.floor, query.best.floor());
    }
    query.kept.clear();
    return i;
}

// The 8-bit bound is useless where most cosines lie closer together than its error. Such stretches
// go through the fp32 filter, with a fresh try of the 8-bit one at growing intervals. Every try
// begins with a trial, during which nothing is computed in fp64: if it turns hardly any row away,
// its rows are filtered again in fp32. Later, the rows computed are what tells: where the fp32
// filter lets most through, too, the rest of its stretch is computed without it.
std::size_t Scan::next_block(std::size_t block, std::size_t rows) {
    if (tier_ != Tier::int8) {
        probe_rows_ += rows;
        if (block + 1 >= float_until_) {
            change(Tier::int8);
            trial_start_ = block + 1;
            trial_left_ = kRetryRows;
            trial_rows_ = trial_survivors_ = 0;
        } else if (tier_ == Tier::float32 &&
                   probe_rescored_ > batch_.count() * (plan_.kept_limit() + probe_rows_ / 2)) {
            change(Tier::exact);
        }
        return block + 1;
    }
    if (trial_left_ != 0) {
        trial_rows_ += rows;
        trial_left_ -= std::min(trial_left_, rows);
        if (trial_left_ != 0) return block + 1;
        for (const Sieve& sieve : sieves_) trial_survivors_ += sieve.count;
        const std::size_t share = float_span_ == kFirstFloatSpan ? kFirstShare : kRetryShare;
        if (kShares * trial_survivors_ > share * trial_rows_ * batch_.count()) {
            forget(trial_start_);
            give_up(trial_start_);
            return trial_start_;
        }
        probe_rows_ = probe_rescored_ = 0;
        return block + 1;
    }
    probe_rows_ += rows;
    if (probe_rescored_ > batch_.count() * (plan_.kept_limit() / 2 + probe_rows_ / kShares)) {
        give_up(block);
    }
    return block + 1;
}

void Scan::change(Tier tier) {
    for (std::size_t q = 0; q < batch_.count(); ++q) settle(q);
    use(tier);
}

void Scan::give_up(std::size_t block) {
    change(Tier::float32);
    float_until_ = block + float_span_;
    float_span_ *= 2;
    probe_rows_ = probe_rescored_ = 0;
}

// Drops what has survived of the rows from a block on: they will be filtered again. The floors that
// they raised stay; see Scan::certified.
void Scan::forget(std::size_t block) {
    const std::size_t at = block * kBlockRows;
    const std::size_t first = plan_.gather ? plan_.gathered[at] : at;
    for (std::size_t q = 0; q < batch_.count(); ++q) {
        Sieve& sieve = sieves_[q];
        std::uint32_t left = 0;
        for (std::uint32_t i = 0; i < sieve.count; ++i) {
            sieve.rows[left] = sieve.rows[i];
            sieve.bounds[left] = sieve.bounds[i];
            left += sieve.rows[i] < first;
        }
        sieve.count = left;
        std::erase_if(queries_[q].kept, [&](const Candidate& c) { return c.row >= first; });
    }
}

void Scan::absorb(Scan& other, std::size_t q) {
    if (plan_.tier != Tier::exact) other.settle(q);
    Query& mine = queries_[q];
    Query& theirs = other.queries_[q];
    mine.floor = std::max(mine.floor, theirs.floor);
    mine.kept.insert(mine.kept.end(), theirs.kept.begin(), theirs.kept.end());
    theirs.kept = {};
    for (const Scored& item : theirs.best.items()) mine.best.push(item);
    mine.rescored += std::exchange(theirs.rescored, 0);
    theirs.best.reset(0);
}

void Scan::finish(std::size_t q, std::int64_t* ids, float* cosines, Monitor& monitor) {
    Query& query = queries_[q];
    if (batch_.zero(q)) {
        // Cosine 0 with every row: the lowest ids win.
        query.best.reset(plan_.k);
        std::uint32_t positions[kBlockRows];
        for (std::size_t block = 0; block < plan_.blocks; ++block) {
            for (std::uint64_t mask = select(block, positions); mask != 0; mask &= mask - 1) {
                offer(q, positions[std::countr_zero(mask)], 0);
            }
        }
    } else if (plan_.tier != Tier::exact) {
        settle(q);
        rescore(q);
        if (!certified(query)) {
            // With the bounds in full no floor is too high, or they are not those of these rows.
            if (batch_.certain()) {
                throw std::invalid_argument("the index's blocks are not those of its rows");
            }
            Batch batch(plan_, batch_.first() + q, 1);
            batch.be_certain();
            if (query.best.full()) batch.floor(0) = query.best.floor();
            Scan again(plan_, batch);
            again.run(0, plan_.blocks, monitor);
            again.finish(0, ids, cosines, monitor);
            query.rescored += again.queries_[0].rescored;
            return;
        }
    }
    std::size_t rank = 0;
    for (const Scored& item : query.best.sorted()) {
        ids[rank] = item.id;
        cosines[rank++] = static_cast<float>(item.score);
    }
    query.best.reset(0);
}

SearchStats Scan::stats() const {
    SearchStats stats{.int8_pairs = int8_pairs_, .float_pairs = float_pairs_};
    for (const Query& query : queries_) stats.rescored += query.rescored;
    return stats;
}

}  // namespace robustft::knn
