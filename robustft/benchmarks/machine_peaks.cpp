// What this machine reaches: fp32 and 8-bit products from registers, and reading memory.
// Usage: machine_peaks THREADS; prints name, rate, unit, separated by tabs.
#include <immintrin.h>
#include <sys/mman.h>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kChains = 12;
std::atomic<std::uint64_t> sink;

// Operations a second over all threads, the best of five.
double rate(unsigned threads, double operations, const std::function<void(unsigned)>& body) {
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const auto begin = Clock::now();
        std::vector<std::thread> workers;
        for (unsigned i = 0; i < threads; ++i) workers.emplace_back(body, i);
        for (auto& worker : workers) worker.join();
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        best = std::max(best, operations * threads / seconds);
    }
    return best;
}

void print(const char* name, double rate, const char* unit) {
    std::printf("%s\t%.1f\t%s\n", name, rate / 1e9, unit);
}

}  // namespace

int main(int count, char** arguments) {
    const unsigned threads = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 1;
    constexpr long rounds = 4'000'000;

    typedef float Floats __attribute__((vector_size(sizeof(float) * 16)));
    print("machine: fp32 peak",
          rate(threads, 2.0 * 16 * kChains * rounds,
               [](unsigned) {
#ifdef __AVX512F__
                   __m512 sums[kChains] = {}, x = _mm512_set1_ps(1);
#pragma GCC unroll 12
                   for (auto& sum : sums) sum = x;
                   for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
                       for (auto& sum : sums)
                           asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(x));
                   }
                   sink += static_cast<std::uint64_t>(_mm512_reduce_add_ps(sums[0]));
#else
              Floats sums[kChains / 2] = {}, x = Floats{} + 1;
              for (long i = 0; i < 2 * rounds; ++i) {
                  for (auto& sum : sums) sum += x * x;
              }
              sink += static_cast<std::uint64_t>(sums[0][0]);
#endif
               }),
          "GFLOP/s");

#ifdef __AVX512VNNI__
    print("machine: VNNI peak",
          rate(threads, 2.0 * 64 * kChains * rounds,
               [](unsigned) {
                   __m512i sums[kChains] = {}, x = _mm512_set1_epi8(1);
                   for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
                       for (auto& sum : sums)
                           asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(x));
                   }
                   sink += static_cast<std::uint64_t>(_mm512_reduce_add_epi32(sums[0]));
               }),
          "GOP/s");
#endif
#ifdef __AMX_INT8__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
        print("machine: AMX int8 peak",
              rate(threads, 2.0 * 16 * 16 * 64 * 4 * rounds / 4,
                   [](unsigned) {
                       struct {
                           std::uint8_t palette = 1, start = 0, reserved[14] = {};
                           std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                           std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
                       } config;
                       asm volatile("ldtilecfg %0" : : "m"(config));
                       for (long i = 0; i < rounds / 4; ++i) {
                           _tile_dpbsud(0, 4, 6);
                           _tile_dpbsud(1, 4, 7);
                           _tile_dpbsud(2, 5, 6);
                           _tile_dpbsud(3, 5, 7);
                       }
                       _tile_release();
                   }),
              "GOP/s");
    }
#endif

    const std::size_t words = std::size_t{64} << 20;  // 512 MiB
    constexpr std::size_t page = 2 << 20;             // what a scan of an index reads: large pages
    auto* memory = static_cast<std::uint64_t*>(std::aligned_alloc(page, 8 * words));
    if (memory == nullptr) return 1;
    madvise(memory, 8 * words, MADV_HUGEPAGE);
    std::fill_n(memory, words, 1);
    print("machine: memory read",
          rate(threads, 8.0 * words / threads,
               [&](unsigned worker) {
                   const std::size_t share = words / threads;
                   std::uint64_t sum = 0;
                   for (std::size_t i = worker * share; i < (worker + 1) * share; ++i)
                       sum += memory[i];
                   sink += sum;
               }),
          "GB/s");
    return 0;
}
