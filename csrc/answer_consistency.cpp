#include "answer_consistency.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "isa/answer_consistency.hpp"

namespace robustft::consistency {
namespace {

std::vector<const Kernels*> available() {  // best first
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&kAvx512);
    }
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{available().front()};
    return kernels;
}

constexpr std::size_t kMaskBudget = std::size_t{1} << 18;  // 64-bit masks kept at once: 2 MiB
constexpr std::size_t kQuickWords = 16;  // a question of longer answers may take minutes

// One worker's memory, grown as needed and reused from question to question.
class Worker {
  public:
    Worker(const Answers& answers, const Kernels& kernels, Monitor& monitor)
        : answers_(answers), kernels_(kernels), monitor_(monitor), slots_(answers.slots) {}

    void compare(std::size_t question, Metric metric, float* agreement) {
        start_ = answers_.start + question * slots_;
        length_ = answers_.length + question * slots_;
        std::fill_n(agreement, slots_ * slots_, 0.0F);
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            if (length_[slot] >= 0) agreement[slot * slots_ + slot] = 1.0F;
        }
        switch (metric) {
            case Metric::exact:
                return exact(agreement);
            case Metric::token_f1:
                return token_f1(agreement);
            case Metric::lcs:
                return aligned(agreement, true);
            case Metric::edit:
                return aligned(agreement, false);
        }
    }

  private:
    const std::int32_t* tokens(std::size_t slot) const { return answers_.tokens + start_[slot]; }
    std::size_t size(std::size_t slot) const {
        return static_cast<std::size_t>(std::max<std::int64_t>(length_[slot], 0));
    }

    template <class Score>
    void fill(float* agreement, std::size_t b, Score&& score) {
        if (length_[b] < 0) return;
        for (std::size_t a = 0; a < b; ++a) {
            if (length_[a] < 0) continue;
            agreement[a * slots_ + b] = agreement[b * slots_ + a] = score(a);
        }
    }

    static float f_measure(std::int64_t common, std::size_t a, std::size_t b) {
        if (a + b == 0) return 1.0F;
        return static_cast<float>(2.0 * static_cast<double>(common) / static_cast<double>(a + b));
    }

    void exact(float* agreement) {
        for (std::size_t b = 0; b < slots_; ++b) {
            fill(agreement, b, [&](std::size_t a) {
                return size(a) == size(b) && std::equal(tokens(a), tokens(a) + size(a), tokens(b))
                           ? 1.0F
                           : 0.0F;
            });
        }
    }

    // Tokens become ranks 0, 1, ... in order of first sight; ranks_ holds all answers end to end.
    // owner_[rank] is the only answer that has the token, or kShared: others match nothing.
    void rank() {
        begin_.assign(slots_ + 1, 0);
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            begin_[slot + 1] = begin_[slot] + size(slot);
        }
        const std::size_t total = begin_[slots_];
        const std::size_t capacity = std::bit_ceil(std::max<std::size_t>(2 * total, 16));
        const int shift = 64 - std::countr_zero(capacity);
        table_.assign(capacity, Entry{0, -1});
        ranks_.resize(total);
        owner_.resize(total);
        Entry* const table = table_.data();
        std::int32_t* const owner = owner_.data();
        std::int32_t distinct = 0;
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            const std::int32_t* const token = tokens(slot);
            std::int32_t* const out = ranks_.data() + begin_[slot];
            const auto self = static_cast<std::int32_t>(slot);
            for (std::size_t i = 0, n = size(slot); i < n; ++i) {
                const auto key = static_cast<std::uint32_t>(token[i]);
                std::size_t place = (key * 0x9E3779B97F4A7C15ULL) >> shift;
                Entry entry = table[place];
                while (entry.rank >= 0 && entry.key != key) {
                    place = (place + 1) & (capacity - 1);
                    entry = table[place];
                }
                if (entry.rank < 0) {
                    entry = {key, distinct};
                    table[place] = entry;
                    owner[distinct++] = self;
                }
                owner[entry.rank] = owner[entry.rank] == self ? self : kShared;
                out[i] = entry.rank;
            }
        }
        owner_.resize(static_cast<std::size_t>(distinct));
    }

    // The n-th occurrence of a token is a feature of its own: a multiset becomes a set of bits.
    void token_f1(float* agreement) {
        rank();
        const std::size_t distinct = owner_.size();
        next_.assign(distinct, -1);  // feature -> the feature of the next occurrence
        seen_.assign(distinct, -1);  // rank -> the last answer that used it
        last_.resize(distinct);      // rank -> the feature of its latest occurrence there
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            for (std::size_t i = begin_[slot]; i < begin_[slot + 1]; ++i) {
                const auto rank = static_cast<std::size_t>(ranks_[i]);
                if (seen_[rank] != static_cast<std::int32_t>(slot)) {
                    seen_[rank] = static_cast<std::int32_t>(slot);
                    last_[rank] = ranks_[i];
                } else {
                    const auto previous = static_cast<std::size_t>(last_[rank]);
                    if (next_[previous] < 0) {
                        next_[previous] = static_cast<std::int32_t>(next_.size());
                        next_.push_back(-1);
                    }
                    last_[rank] = next_[previous];
                }
                ranks_[i] = last_[rank];
            }
        }
        const std::size_t words = (next_.size() + 63) / 64;
        masks_.assign(slots_ * words, 0);
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            std::uint64_t* bits = masks_.data() + slot * words;
            for (std::size_t i = begin_[slot]; i < begin_[slot + 1]; ++i) {
                bits[ranks_[i] >> 6] |= std::uint64_t{1} << (ranks_[i] & 63);
            }
        }
        for (std::size_t b = 0; b < slots_; ++b) {
            fill(agreement, b, [&](std::size_t a) {
                return f_measure(
                    kernels_.common(masks_.data() + a * words, masks_.data() + b * words, words),
                    size(a), size(b));
            });
        }
    }

    // Ranks become rows of the mask table: row 0, all zero, for a token that no other answer has.
    // A common subsequence never touches those, so LCS leaves them out altogether.
    std::size_t assign_rows(bool drop_unshared) {
        std::int32_t rows = 1;
        last_.resize(owner_.size());
        for (std::size_t rank = 0; rank < owner_.size(); ++rank) {
            last_[rank] = owner_[rank] == kShared ? rows++ : 0;
        }
        std::size_t kept = 0, longest = 0;
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            const std::size_t from = begin_[slot], to = begin_[slot + 1];
            begin_[slot] = kept;
            for (std::size_t i = from; i < to; ++i) {
                const std::int32_t row = last_[static_cast<std::size_t>(ranks_[i])];
                ranks_[kept] = row;
                kept += !drop_unshared || row != 0;
            }
            longest = std::max(longest, kept - begin_[slot]);
        }
        begin_[slots_] = kept;
        rows_ = static_cast<std::size_t>(rows);
        return longest;
    }

    // Sets (or clears again) the bits of the positions that `word` covers, in every pattern.
    void mark(std::size_t word, std::uint64_t* masks, bool set) {
        for (std::size_t slot = 0; slot < slots_; ++slot) {
            const std::size_t from = begin_[slot] + word * 64;
            const std::size_t to = std::min(from + 64, begin_[slot + 1]);
            for (std::size_t i = from; i < to; ++i) {
                std::uint64_t& mask = masks[static_cast<std::size_t>(ranks_[i]) * lanes_ + slot];
                mask = set ? mask | (std::uint64_t{1} << (i - from)) : 0;
            }
        }
        std::fill_n(masks, lanes_, 0);  // row 0 matches nothing
    }

    void aligned(float* agreement, bool lcs) {
        rank();
        const std::size_t longest = assign_rows(lcs);
        const std::size_t words = (longest + 63) / 64;
        lanes_ = (slots_ + kLaneBlock - 1) / kLaneBlock * kLaneBlock;
        const std::size_t table = rows_ * lanes_;
        // Long answers of many different words: hold the masks of one word at a time.
        const bool all_words = words * table <= kMaskBudget;
        masks_.assign(all_words ? words * table : table, 0);
        for (std::size_t word = 0; all_words && word < words; ++word) {
            mark(word, masks_.data() + word * table, true);
        }
        if (words > 1) carry_.resize(longest * lanes_);
        valid_.resize(lanes_);
        for (std::size_t b = 1; b < slots_; ++b) {
            if (length_[b] < 0) continue;
            total_.assign(lanes_, 0);
            Stream stream{masks_.data(),
                          lanes_,
                          ranks_.data() + begin_[b],
                          begin_[b + 1] - begin_[b],
                          (b + kLaneBlock - 1) / kLaneBlock * kLaneBlock,
                          words > 1 ? carry_.data() : nullptr,
                          true};
            for (std::size_t word = 0; word < words; ++word) {
                if (all_words)
                    stream.masks = masks_.data() + word * table;
                else
                    mark(word, masks_.data(), true);
                stream.first_word = word == 0;
                if (lcs) {
                    kernels_.lcs(stream, total_.data());
                } else {
                    for (std::size_t lane = 0; lane < lanes_; ++lane) {
                        valid_[lane] = low_bits(lane < slots_ ? size(lane) : 0, word);
                    }
                    kernels_.edit(stream, valid_.data(), total_.data());
                }
                if (!all_words) mark(word, masks_.data(), false);
                if (words > kQuickWords) monitor_.advance(0);
            }
            fill(agreement, b, [&](std::size_t a) {
                if (lcs) return f_measure(total_[a], size(a), size(b));
                const auto bound = static_cast<double>(std::max(size(a), size(b)));
                if (bound == 0) return 1.0F;
                const auto distance = static_cast<double>(size(b)) + static_cast<double>(total_[a]);
                return static_cast<float>((bound - distance) / bound);
            });
        }
    }

    static std::uint64_t low_bits(std::size_t length, std::size_t word) {
        if (length <= word * 64) return 0;
        const std::size_t bits = length - word * 64;
        return bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
    }

    static constexpr std::int32_t kShared = -1;

    struct Entry {
        std::uint32_t key;
        std::int32_t rank;
    };

    const Answers& answers_;
    const Kernels& kernels_;
    Monitor& monitor_;
    const std::size_t slots_;
    const std::int64_t* start_ = nullptr;
    const std::int64_t* length_ = nullptr;
    std::size_t rows_ = 0, lanes_ = 0;
    std::vector<Entry> table_;
    std::vector<std::size_t> begin_;
    std::vector<std::int32_t> ranks_, owner_, next_, seen_, last_;
    std::vector<std::uint64_t> masks_, carry_, valid_;
    std::vector<std::int64_t> total_;
};

void check_slots(const Answers& answers) {
    const auto count = static_cast<std::int64_t>(answers.count);
    for (std::size_t i = 0; i < answers.questions * answers.slots; ++i) {
        const std::int64_t start = answers.start[i], length = answers.length[i];
        if (length > 0 && (start < 0 || start > count || length > count - start)) {
            throw std::invalid_argument("answer " + std::to_string(i) + " lies outside the tokens");
        }
    }
}

// Questions are handed to workers in blocks, so that a block's bookkeeping is negligible.
constexpr std::size_t kBlock = 32;

std::size_t blocks_of(std::size_t questions) { return (questions + kBlock - 1) / kBlock; }

// Tokens and pairs of answers, 3 to 8 ns each: below 50 microseconds or so of work a thread costs
// more than it saves.
constexpr std::size_t kWorthAThread = std::size_t{1} << 14;

template <class Body>
void for_questions(std::size_t questions, std::size_t work, unsigned threads, Monitor& monitor,
                   Body&& body) {
    const auto used =
        static_cast<unsigned>(std::min<std::size_t>(threads, 1 + work / kWorthAThread));
    parallel_for(blocks_of(questions), used, monitor, [&](std::size_t block, unsigned worker) {
        const std::size_t end = std::min(questions, (block + 1) * kBlock);
        for (std::size_t question = block * kBlock; question < end; ++question) {
            body(question, worker);
            monitor.advance(1);
        }
    });
}

using Row = std::uint64_t;

void connected_components(const Row* linked, std::size_t slots, Row present,
                          std::int64_t* cluster) {
    std::int64_t count = 0;
    for (Row rest = present; rest != 0; ++count) {
        Row members = rest & (~rest + 1), frontier = members;
        while (frontier != 0) {
            const auto slot = static_cast<std::size_t>(std::countr_zero(frontier));
            frontier &= frontier - 1;
            const Row fresh = linked[slot] & ~members;
            members |= fresh;
            frontier |= fresh;
        }
        for (std::size_t slot = 0; slot < slots; ++slot) {
            if (members >> slot & 1) cluster[slot] = count;
        }
        rest &= ~members;
    }
}

// The rule of the published semantic-entropy code (Kuhn et al. 2023): each answer still without a
// cluster opens one and takes every later answer linked to it, also out of an earlier cluster.
void greedy(const Row* linked, std::size_t slots, Row present, std::int64_t* cluster) {
    std::int64_t count = 0;
    for (std::size_t slot = 0; slot < slots; ++slot) {
        if ((present >> slot & 1) == 0 || cluster[slot] >= 0) continue;
        cluster[slot] = count;
        for (std::size_t later = slot + 1; later < slots; ++later) {
            if (linked[slot] >> later & 1) cluster[later] = count;
        }
        ++count;
    }
}

void summarise_one(const Votes& votes, const Summary& out, std::size_t question) {
    const std::size_t slots = votes.slots;
    const float* agreement = votes.agreement + question * slots * slots;
    const std::uint8_t* present = votes.present + question * slots;
    std::int64_t* cluster = out.cluster + question * slots;

    Row linked[kMaxClustered] = {}, everyone = 0;
    for (std::size_t a = 0; a < slots; ++a) everyone |= Row{present[a] != 0} << a;
    const int others = std::popcount(everyone) - 1;
    for (std::size_t a = 0; a < slots; ++a) {
        double sum = 0;
        if (present[a]) {
            for (std::size_t b = 0; b < slots; ++b) {
                if (!present[b] || a == b) continue;
                const float value = agreement[a * slots + b];
                sum += value;
                linked[a] |= Row{value >= votes.threshold} << b;
            }
        }
        out.mean_agreement[question * slots + a] =
            static_cast<float>(others > 0 ? sum / others : 0.0);
        cluster[a] = -1;
    }
    if (votes.rule == Clustering::greedy)
        greedy(linked, slots, everyone, cluster);
    else
        connected_components(linked, slots, everyone, cluster);

    const double* weights = votes.weight ? votes.weight + question * slots : nullptr;
    double share[kMaxClustered] = {}, total = 0;
    for (std::size_t a = 0; a < slots; ++a) {
        if (!present[a]) continue;
        const double weight = weights ? weights[a] : 1.0;
        share[cluster[a]] += weight;
        total += weight;
    }
    std::int64_t majority = -1;
    double heaviest = 0, entropy = 0;
    for (std::size_t c = 0; total > 0 && c < slots; ++c) {
        if (share[c] > heaviest) {
            heaviest = share[c];
            majority = static_cast<std::int64_t>(c);
        }
        const double p = share[c] / total;
        if (p > 0) entropy -= p * std::log(p);
    }
    out.majority[question] = majority;
    out.majority_fraction[question] = static_cast<float>(majority < 0 ? 0.0 : heaviest / total);
    out.semantic_entropy[question] = static_cast<float>(entropy) + 0.0F;  // -0 becomes 0
}

}  // namespace

void pairwise(const Answers& answers, Metric metric, float* agreement, unsigned threads,
              Monitor& monitor) {
    check_slots(answers);
    const Kernels& kernels = *chosen().load(std::memory_order_relaxed);
    const std::size_t most = std::min<std::size_t>(threads, blocks_of(answers.questions));
    std::vector<Worker> workers(std::max<std::size_t>(1, most), Worker(answers, kernels, monitor));
    const std::size_t pairs = answers.slots * answers.slots;
    for_questions(answers.questions, answers.count + answers.questions * pairs, threads, monitor,
                  [&](std::size_t question, unsigned worker) {
                      workers[worker].compare(question, metric, agreement + question * pairs);
                  });
}

void summarise(const Votes& votes, const Summary& summary, unsigned threads, Monitor& monitor) {
    if (votes.slots > kMaxClustered) {
        throw std::invalid_argument("at most 64 answers a question can be clustered, got " +
                                    std::to_string(votes.slots));
    }
    for_questions(votes.questions, votes.questions * votes.slots * votes.slots, threads, monitor,
                  [&](std::size_t question, unsigned) { summarise_one(votes, summary, question); });
}

std::string instruction_set() { return chosen().load()->name; }

void force_instruction_set(const std::string& name) {
    for (const Kernels* kernels : available()) {
        if (name.empty() || name == kernels->name) {
            chosen().store(kernels);
            return;
        }
    }
    throw std::invalid_argument("instruction set not available here: " + name);
}

}  // namespace robustft::consistency
