// Do K answers to one question say the same? For N questions at once: pairwise agreement of token
// sequences, then clusters, majority and semantic entropy of any agreement matrix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "parallel_for.hpp"

namespace robustft::consistency {

enum class Metric : std::uint8_t { exact, token_f1, lcs, edit };
enum class Clustering : std::uint8_t { components, greedy };

inline constexpr std::size_t kMaxClustered = 64;  // one adjacency row is one 64-bit word

// N x K slots, each a run of tokens or empty-handed.
struct Answers {
    const std::int32_t* tokens;  // [count]
    std::size_t count;
    const std::int64_t* start;   // [N, K]
    const std::int64_t* length;  // [N, K]; negative: there is no answer in this slot
    std::size_t questions;       // N
    std::size_t slots;           // K
};

// agreement [N, K, K] in [0, 1], symmetric, 1 on the diagonal, 0 wherever an answer is absent.
//   exact    1 if the sequences are equal, else 0
//   token_f1 2 |multiset intersection| / (len + len)
//   lcs      2 LCS / (len + len)                       (ROUGE-L's F measure)
//   edit     1 - Levenshtein / max(len, len)
// Two empty answers agree (1). Throws std::invalid_argument for a slot outside `tokens`.
void pairwise(const Answers& answers, Metric metric, float* agreement, unsigned threads,
              Monitor& monitor);

struct Votes {
    const float* agreement;       // [N, K, K]
    const std::uint8_t* present;  // [N, K]
    const double* weight;         // [N, K], not negative; null: every answer has one vote
    std::size_t questions;
    std::size_t slots;  // at most kMaxClustered
    float threshold;    // answers with agreement >= threshold are linked
    Clustering rule;
};

struct Summary {
    float* mean_agreement;     // [N, K] with the other answers present; 0 without any
    std::int64_t* cluster;     // [N, K] numbered by first member; -1 where absent
    std::int64_t* majority;    // [N] the heaviest cluster, the first of equals; -1 if none
    float* majority_fraction;  // [N] its share of the votes
    float* semantic_entropy;   // [N] nats
};

// Throws std::invalid_argument when slots > kMaxClustered.
void summarise(const Votes& votes, const Summary& summary, unsigned threads, Monitor& monitor);

// Which instruction set `pairwise` uses here; `force` ("", "portable", "avx2", "avx512") is for
// tests and benchmarks. Throws std::invalid_argument for one this machine lacks.
std::string instruction_set();
void force_instruction_set(const std::string& name);

}  // namespace robustft::consistency
