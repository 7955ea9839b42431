// One worker's search of some rows for one batch of queries.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cosine_knn.hpp"
#include "topk.hpp"

namespace robustft::knn {

// What a search is the same for all its workers.
struct Plan {
    const CosineIndex& index;
    const SearchOptions& options;
    Rows queries;
    std::size_t k;                        // <= rows in use
    Tier tier;                            // the first one; `automatic` may leave int8 later
    bool adaptive;                        // whether the data may change the tier
    std::vector<std::uint32_t> gathered;  // positions of the allowed rows, if few enough to gather
    bool gather = false;
    std::size_t rows = 0;    // rows in use
    std::size_t blocks = 0;  // of up to 64 rows in use (gathered) or of all rows

    std::uint32_t raw_limit() const;  // survivors a query may pile up before they are looked at
    std::size_t kept_limit() const;   // candidates it may hold before they are computed
    std::size_t query_bytes() const;  // scratch per query of a batch
};

// Queries [first, first + count) in every form a scan needs.
class Batch {
  public:
    Batch(const Plan& plan, std::size_t first, std::size_t count);

    std::size_t first() const { return first_; }
    std::size_t count() const { return count_; }
    const Kernels& kernels() const { return kernels_; }
    const double* wide(std::size_t q) const { return wide_.data() + q * dim_; }
    double inv_norm(std::size_t q) const { return inv_norm_[q]; }
    bool zero(std::size_t q) const { return inv_norm_[q] == 0; }

    // The filter's bound is a cosine in units of `unit`, short of it by at most `slack`; the true
    // cosine lies within 2 * (error of the row * norm + slack) below it.
    struct Scale {
        double unit;
        double norm;
        double slack;
        float slope;
        std::int32_t offset;
        float caution;  // 2: the bound in full; less: what its error will not exceed in practice
    };
    const Scale& scale(Tier tier, std::size_t q) const {
        return tier == Tier::int8 ? int8_[q] : float_[q];
    }
    const void* codes(Tier tier) const {
        return tier == Tier::int8 ? static_cast<const void*>(int8_codes_.data())
                                  : static_cast<const void*>(float_codes_.data());
    }
    // No row below it is looked at; see Scan::certified.
    std::atomic<double>& floor(std::size_t q) { return floors_[q]; }
    void be_certain();
    bool certain() const { return certain_; }

  private:
    std::size_t first_, count_, dim_;
    const Kernels& kernels_;    // best for so many queries
    std::vector<double> wide_;  // [count, dim]
    std::vector<double> inv_norm_;
    std::vector<std::int8_t> int8_codes_;  // in tiles, as Kernels wants them
    std::vector<float> float_codes_;
    std::vector<Scale> int8_, float_;
    std::vector<std::atomic<double>> floors_;
    bool certain_ = false;
};

class Scan {
  public:
    Scan(const Plan& plan, Batch& batch);

    void run(std::size_t first_block, std::size_t last_block, Monitor& monitor);

    // After the runs; different queries may be handled by different threads.
    void absorb(Scan& other, std::size_t q);  // takes over the other's candidates of query q
    void finish(std::size_t q, std::int64_t* ids, float* cosines, Monitor& monitor);

    SearchStats stats() const;

  private:
    struct Candidate {
        float upper;  // the cosine lies in [upper - 2 * reach, upper]
        float reach;
        std::uint32_t row;
    };
    struct Query {
        std::vector<Candidate> kept;
        TopK best;
        double floor;
        std::uint64_t rescored = 0;
        std::vector<float> scores;  // scratch
    };

    const BlockHead& head(std::uint32_t row) const {
        return index_.blocks().head(row / kBlockRows);
    }
    std::uint64_t select(std::size_t block, std::uint32_t* positions) const;
    void filter(std::size_t block, std::uint64_t mask);
    void compute_all(std::uint64_t mask);
    void use(Tier tier);
    std::size_t settle(std::size_t q);  // rows computed
    void tighten(std::size_t q);
    bool certified(const Query& query) const;
    std::size_t rescore(std::size_t q);  // rows computed
    void rescore_one(std::size_t q, std::uint32_t row);
    void offer(std::size_t q, std::uint32_t row, double score);
    void lower_sieve(std::size_t q);
    std::size_t next_block(std::size_t block, std::size_t rows);
    void change(Tier tier);
    void give_up(std::size_t block);
    void forget(std::size_t block);

    const Plan& plan_;
    Batch& batch_;
    const CosineIndex& index_;
    DotFn dot_;
    Tier tier_;
    std::uint32_t raw_limit_;
    std::vector<Sieve> sieves_;
    std::vector<std::uint32_t> raw_rows_;
    std::vector<float> raw_bounds_;
    std::vector<Query> queries_;
    std::vector<float> panel_;  // one block in fp32
    std::vector<std::uint32_t> gathered_codes_;
    alignas(64) float gathered_scale_[kBlockRows];
    alignas(64) float gathered_error_[kBlockRows];
    alignas(64) std::uint32_t positions_[kBlockRows];
    std::uint64_t int8_pairs_ = 0, float_pairs_ = 0;
    // How the 8-bit filter fares: in its trial, which lasts for so many more rows, and after it.
    std::size_t trial_start_ = 0, trial_left_, trial_rows_ = 0, trial_survivors_ = 0;
    std::size_t probe_rows_ = 0, probe_rescored_ = 0;
    std::size_t float_until_ = 0, float_span_;  // blocks
};

}  // namespace robustft::knn
