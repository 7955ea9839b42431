// How a search is cut into work: batches of queries, or one batch over ranges of rows.
#include <algorithm>
#include <bit>
#include <memory>
#include <mutex>

#include "cosine_knn_scan.hpp"

namespace robustft::knn {
namespace {

constexpr std::size_t kMaxInt8Dim = 16384;  // kSlack holds, and sums fit 32 bits
// A batch: what its queries keep touching should stay in the second-level cache, and there should
// be enough of them to make up for reading all rows from memory again.
constexpr std::size_t kCache = 768 << 10;
constexpr std::size_t kBatch = 128;
constexpr std::size_t kLargestBatch = 256;
constexpr std::size_t kScratch = 64 << 20;  // bytes, a limit that only a single query may exceed
constexpr std::size_t kTaskBlocks = 64;
constexpr std::size_t kParallelFinish = 16;  // queries
constexpr double kWorkPerThread = 4e6;       // multiplications that pay for starting a thread

Plan make_plan(const CosineIndex& index, const Rows& queries, const SearchOptions& options) {
    Plan plan{.index = index,
              .options = options,
              .queries = queries,
              .k = 0,
              .tier = options.tier,
              .adaptive = false,
              .gathered = {}};
    plan.rows = index.size();
    plan.blocks = (index.size() + kBlockRows - 1) / kBlockRows;
    if (options.allowed != nullptr) {
        plan.rows = 0;
        for (std::size_t word = 0; word < plan.blocks; ++word) {
            plan.rows += static_cast<std::size_t>(std::popcount(options.allowed[word]));
        }
        // Fewer than half: copying their codes together costs less than passing over the others.
        plan.gather = plan.rows < index.size() / 2;
    }
    if (plan.gather) {
        plan.gathered.reserve(plan.rows);
        for (std::size_t word = 0; word < plan.blocks; ++word) {
            for (std::uint64_t bits = options.allowed[word]; bits != 0; bits &= bits - 1) {
                plan.gathered.push_back(static_cast<std::uint32_t>(
                    word * 64 + static_cast<std::size_t>(std::countr_zero(bits))));
            }
        }
        plan.blocks = (plan.rows + kBlockRows - 1) / kBlockRows;
    }
    plan.k = std::min(options.k, plan.rows);
    if (plan.tier == Tier::automatic) {
        // Most rows wanted: nothing to filter.
        if (4 * plan.k >= plan.rows) {
            plan.tier = Tier::exact;
        } else if (index.dim() > kMaxInt8Dim || !index.kernels().fast_int8) {
            plan.tier = Tier::float32;
        } else {
            plan.tier = Tier::int8;
            plan.adaptive = true;
        }
    } else if (plan.tier == Tier::int8 && index.dim() > kMaxInt8Dim) {
        plan.tier = Tier::float32;
    }
    return plan;
}

}  // namespace

SearchStats CosineIndex::search(const Rows& queries, const SearchOptions& options,
                                std::int64_t* ids, float* cosines, Monitor& monitor) const {
    const DefaultArithmetic arithmetic;
    std::fill_n(ids, queries.count * options.k, -1);
    std::fill_n(cosines, queries.count * options.k, std::numeric_limits<float>::quiet_NaN());
    check(queries, "queries", queries.count < 4096 ? 1 : options.threads, monitor);
    const Plan plan = make_plan(*this, queries, options);
    if (plan.k == 0 || queries.count == 0) return {};

    const double work = static_cast<double>(plan.rows) * static_cast<double>(queries.count) *
                        static_cast<double>(dim_);
    const auto threads =
        static_cast<unsigned>(std::clamp<double>(options.threads, 1, 1 + work / kWorkPerThread));
    const std::size_t bytes = plan.query_bytes();
    const std::size_t largest = std::clamp<std::size_t>(
        kScratch / bytes, 1, std::clamp(kCache / bytes, kBatch, kLargestBatch));
    SearchStats stats;
    std::mutex mutex;
    const auto count = [&](const SearchStats& part) {
        const std::lock_guard lock(mutex);
        stats.int8_pairs += part.int8_pairs;
        stats.float_pairs += part.float_pairs;
        stats.rescored += part.rescored;
    };

    // Enough queries: every worker takes batches of its own over all rows.
    const std::size_t pieces = threads == 1 ? 1 : 4 * std::size_t{threads};
    if (queries.count >= pieces * std::min<std::size_t>(largest, 64)) {
        std::size_t batches = std::max((queries.count + largest - 1) / largest, pieces);
        batches = (batches + threads - 1) / threads * threads;
        parallel_for(batches, threads, monitor, [&](std::size_t task, unsigned) {
            const std::size_t first = queries.count * task / batches;
            const std::size_t last = queries.count * (task + 1) / batches;
            Batch batch(plan, first, last - first);
            Scan scan(plan, batch);
            scan.run(0, plan.blocks, monitor);
            for (std::size_t q = 0; q < batch.count(); ++q) {
                scan.finish(q, ids + (first + q) * options.k, cosines + (first + q) * options.k,
                            monitor);
            }
            count(scan.stats());
        });
        return stats;
    }

    // Few: the workers share the rows, and the floors they find.
    for (std::size_t first = 0; first < queries.count; first += largest) {
        Batch batch(plan, first, std::min(largest, queries.count - first));
        std::vector<std::unique_ptr<Scan>> scans(threads);
        const std::size_t step =
            std::clamp<std::size_t>(plan.blocks / (16 * std::size_t{threads}), 1, kTaskBlocks);
        parallel_for((plan.blocks + step - 1) / step, threads, monitor,
                     [&](std::size_t task, unsigned worker) {
                         if (!scans[worker]) scans[worker] = std::make_unique<Scan>(plan, batch);
                         scans[worker]->run(task * step, std::min(plan.blocks, (task + 1) * step),
                                            monitor);
                     });
        std::erase(scans, nullptr);
        Scan& main = *scans.front();
        const auto finish = [&](std::size_t q) {
            for (std::size_t other = 1; other < scans.size(); ++other) {
                main.absorb(*scans[other], q);
            }
            main.finish(q, ids + (first + q) * options.k, cosines + (first + q) * options.k,
                        monitor);
        };
        parallel_for(batch.count(), batch.count() < kParallelFinish ? 1 : threads, monitor,
                     [&](std::size_t q, unsigned) { finish(q); });
        for (const auto& scan : scans) count(scan->stats());
    }
    return stats;
}

}  // namespace robustft::knn
