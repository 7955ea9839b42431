// Threads that work for one call: nothing survives a fork, nothing spins.
// An exception in any worker stops the others and reaches the caller.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace robustft {

// Thrown inside a worker when another one has failed; the caller never sees it.
struct Stopped {};

// Lets a long computation be watched and stopped. Workers call `advance` at least every few
// milliseconds; `poll` runs on the calling thread alone, about every 50 ms, and stops everything
// by throwing.
class Monitor {
  public:
    using Poll = std::function<void(std::uint64_t done)>;

    explicit Monitor(Poll poll = {}) : poll_(std::move(poll)) {}
    Monitor(const Monitor&) = delete;
    Monitor& operator=(const Monitor&) = delete;

    void advance(std::uint64_t amount) {
        done_.fetch_add(amount, std::memory_order_relaxed);
        if (stop_.load(std::memory_order_relaxed)) throw Stopped();
        if (std::this_thread::get_id() == caller_) poll_if_due();
    }

    void poll_if_due() {
        if (!poll_) return;
        const auto now = Clock::now();
        if (now < next_poll_) return;
        poll_(done_.load(std::memory_order_relaxed));
        next_poll_ = Clock::now() + interval;
    }

    void fail(std::exception_ptr error) {
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::move(error);
        stop_.store(true, std::memory_order_relaxed);
    }

    void rethrow() {
        const std::lock_guard lock(mutex_);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    static constexpr std::chrono::milliseconds interval{50};

  private:
    using Clock = std::chrono::steady_clock;
    Poll poll_;
    std::thread::id caller_ = std::this_thread::get_id();
    Clock::time_point next_poll_ = Clock::now() + interval;
    std::atomic<std::uint64_t> done_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Arithmetic as C++ starts it: rounded to nearest, subnormal numbers kept. A caller may have it
// otherwise (`torch.set_flush_denormal`, a library linked with -ffast-math), and threads inherit
// it.
class DefaultArithmetic {
  public:
    DefaultArithmetic(const DefaultArithmetic&) = delete;
    DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

#if defined(__x86_64__)
    // The x87's part, which nothing here computes with, would take 18 times as long.
    DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~DefaultArithmetic() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    DefaultArithmetic() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&before_); }

  private:
    std::fenv_t before_;
#endif
};

inline unsigned hardware_threads() { return std::max(1U, std::thread::hardware_concurrency()); }

// Runs body(task, worker) for every task in [0, tasks), each once, on up to `threads` workers of
// which the caller is number 0. Tasks are handed out in ascending order.
template <class Body>
void parallel_for(std::size_t tasks, unsigned threads, Monitor& monitor, Body&& body) {
    // Outlives the call: a helper that starts too late reads `closed`, and nothing of the caller's.
    // On a busy machine (another library's spinning threads, say) a start takes milliseconds.
    struct Shared {
        std::mutex mutex;
        std::condition_variable finished;
        std::atomic<unsigned> running{0};
        bool closed = false;
    };
    const auto shared = std::make_shared<Shared>();
    std::atomic<std::size_t> next{0};

    const auto work = [&](unsigned worker) noexcept {
        const DefaultArithmetic arithmetic;
        try {
            for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
                monitor.advance(0);
                body(task, worker);
            }
        } catch (const Stopped&) {
        } catch (...) {
            monitor.fail(std::current_exception());
        }
    };

    const std::size_t wanted = std::min<std::size_t>(std::max(1U, threads), tasks);
    for (unsigned worker = 1; worker < wanted; ++worker) {
        try {
            std::thread([&work, shared, worker] {
                {
                    const std::lock_guard lock(shared->mutex);
                    if (shared->closed) return;
                    ++shared->running;
                }
                work(worker);
                const std::lock_guard lock(shared->mutex);
                --shared->running;
                shared->finished.notify_one();
            }).detach();
        } catch (...) {
            // No thread, or no memory for one: those that started do the work, and use what is on
            // this stack.
            break;
        }
    }
    work(0);
    {
        std::unique_lock lock(shared->mutex);
        shared->closed = true;
        lock.unlock();
        // To be woken takes as long as a short call: first a little patience.
        const auto patience = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        while (shared->running != 0 && std::chrono::steady_clock::now() < patience) {
            std::this_thread::yield();
        }
        lock.lock();
        while (!shared->finished.wait_for(lock, Monitor::interval,
                                          [&] { return shared->running == 0; })) {
            lock.unlock();
            try {
                monitor.poll_if_due();
            } catch (...) {
                monitor.fail(std::current_exception());
            }
            lock.lock();
        }
    }
    monitor.rethrow();
}

// The same on the OpenMP threads already in the process, for work between two products of a library
// that uses them: they spin for milliseconds after each, and threads beside them would get half a
// core. Such a pool does not survive a fork, so it is no place for work that comes alone.
template <class Body>
void parallel_for_between_products(std::size_t tasks, unsigned threads, Monitor& monitor,
                                   Body&& body) {
    using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
    // The entry point of `#pragma omp parallel` in libgomp, and in LLVM's and Intel's libraries.
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (!parallel || threads <= 1 || tasks <= 1) {
        parallel_for(tasks, threads, monitor, body);
        return;
    }
    std::atomic<std::size_t> next{0};
    std::atomic<unsigned> workers{0};
    auto work = [&]() noexcept {
        const DefaultArithmetic arithmetic;
        const unsigned worker = workers.fetch_add(1, std::memory_order_relaxed);
        try {
            for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
                monitor.advance(0);
                body(task, worker);
            }
        } catch (const Stopped&) {
        } catch (...) {
            monitor.fail(std::current_exception());
        }
    };
    parallel([](void* p) { (*static_cast<decltype(work)*>(p))(); }, &work, threads, 0);
    monitor.rethrow();
}

}  // namespace robustft
