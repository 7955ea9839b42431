// The k best (score, id) pairs seen so far, in one total order that no thread count, batch split or
// arrival order can change: score descending, then id ascending, then row ascending.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace robustft {

struct Scored {
    double score;
    std::int64_t id;
    std::uint32_t row;
};

inline bool better(const Scored& a, const Scored& b) {
    if (a.score != b.score) return a.score > b.score;
    if (a.id != b.id) return a.id < b.id;
    return a.row < b.row;
}

class TopK {
  public:
    explicit TopK(std::size_t k = 0) : k_(k) {}

    void reset(std::size_t k) {
        k_ = k;
        heap_.clear();
    }

    void push(const Scored& item) {
        if (heap_.size() < k_) {
            heap_.push_back(item);
            std::push_heap(heap_.begin(), heap_.end(), better);
        } else if (k_ != 0 && better(item, heap_.front())) {
            std::pop_heap(heap_.begin(), heap_.end(), better);
            heap_.back() = item;
            std::push_heap(heap_.begin(), heap_.end(), better);
        }
    }

    bool full() const { return heap_.size() >= k_; }
    std::size_t size() const { return heap_.size(); }
    const std::vector<Scored>& items() const { return heap_; }  // in no particular order

    // The score a row must reach to matter; -infinity until k items are held.
    double floor() const {
        return full() && k_ != 0 ? heap_.front().score : -std::numeric_limits<double>::infinity();
    }

    // Best first. The heap order is gone afterwards: `reset` before the next push.
    const std::vector<Scored>& sorted() {
        std::sort(heap_.begin(), heap_.end(), better);
        return heap_;
    }

  private:
    std::size_t k_;
    std::vector<Scored> heap_;  // worst at the front
};

}  // namespace robustft
