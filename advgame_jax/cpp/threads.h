// The threads of XLA's pool, for one job at a time.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// What some threads do together, each until there is no more of it.
using Job = std::function<void()>;

// Threads that have done their part of a job stay for the next, which is a few steps away: one that sleeps comes some
// twenty microseconds late, to products that take a hundred. While programs run one after the other: of two at once
// each may lose its helpers to the other, and then does its job alone.
class Helpers {
 public:
  // As many others as the pool has, but at most `most`, are asked to do the job too: first those that stay.
  void Call(ffi::ThreadPool& pool, int most, std::shared_ptr<Job> job) {
    std::shared_ptr<Job> last = job;
    Lock();
    job_.swap(last);
    posted_.fetch_add(1);
    room_ = pool.num_threads() - 1;
    int coming = staying_;
    Unlock();
    for (; coming < most; ++coming) pool.Schedule([this, job] { Help(job); });
  }

 private:
  static constexpr uint64_t kStay = 100000;  // ticks of the processor's clock, some forty microseconds

  void Help(std::shared_ptr<Job> job) {
    uint64_t seen = posted_.load();
    while (job) {
      (*job)();
      job = Next(seen);
    }
  }

  // The job that was posted since, if there is one in a while; counts it as seen. Who calls counts on those that stay,
  // which are no more than there is room for: others may have been woken for nothing.
  std::shared_ptr<Job> Next(uint64_t& seen) {
    Lock();
    const bool stays = staying_ < room_;
    staying_ += stays;
    Unlock();
    if (!stays) return nullptr;
    for (const uint64_t began = __rdtsc(); posted_.load() == seen && __rdtsc() - began < kStay;) _mm_pause();
    Lock();
    --staying_;
    std::shared_ptr<Job> job = posted_.load() == seen ? nullptr : job_;
    seen = posted_.load();
    Unlock();
    return job;
  }

  // Held for a few instructions: nobody sleeps for it.
  void Lock() {
    while (held_.test_and_set(std::memory_order_acquire)) _mm_pause();
  }
  void Unlock() { held_.clear(std::memory_order_release); }

  alignas(64) std::atomic<uint64_t> posted_{0};  // which those that stay look at all the time
  alignas(64) std::atomic_flag held_ = ATOMIC_FLAG_INIT;
  std::shared_ptr<Job> job_;
  int staying_ = 0, room_ = 0;
};

inline Helpers& TheHelpers() {
  static auto* helpers = new Helpers;
  return *helpers;
}

inline int Ceil(int n, int unit) { return (n + unit - 1) / unit; }

// f(0), …, f(n - 1) by the threads there are. Whoever is free takes the next: this waits for nobody who has not begun.
// A helper may come when all is done and keep its copy of f, which holds what it needs by value, for longer; and f
// calls no `Each`, since its thread's buffers are taken.
template <class F>
void Each(ffi::ThreadPool& pool, int n, F f) {
  struct Progress {
    std::atomic<int> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto take = [=] {
    for (int i; (i = progress->next.fetch_add(1)) < n; progress->done.fetch_add(1)) f(i);
  };
  const int helpers = std::min<int>(pool.num_threads(), n) - 1;
  if (helpers > 0) TheHelpers().Call(pool, helpers, std::make_shared<Job>(take));
  take();
  while (progress->done.load() < n) _mm_pause();
}

// Likewise of f that pass over so many numbers each: where all are few, by this thread alone, before others would come.
template <class F>
void EachOf(ffi::ThreadPool& pool, int n, int numbers, F f) {
  constexpr int kAlone = 1 << 15;
  const int each = std::max(1, kAlone / numbers);
  Each(pool, Ceil(n, each), [=](int part) {
    for (int i = part * each; i < std::min(n, (part + 1) * each); ++i) f(i);
  });
}

// 0, …, n - 1 in equal shares, one for each thread: of its own it takes the next, as they lie in memory, and then of
// the others' the last.
class Shares {
 public:
  Shares(int n, int threads) : left_(threads) {
    for (int64_t i = 0; i < threads; ++i) left_[i].range = Packed(n * i / threads, n * (i + 1) / threads);
  }

  // -1 where there is no more.
  int Take(int mine) {
    for (size_t i = 0; i < left_.size(); ++i) {
      auto& share = left_[(mine + i) % left_.size()].range;
      for (uint64_t range = share.load();;) {
        const uint32_t first = range >> 32, end = range;
        if (first == end) break;
        if (share.compare_exchange_weak(range, i ? Packed(first, end - 1) : Packed(first + 1, end)))
          return i ? end - 1 : first;
      }
    }
    return -1;
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> range;
  };
  static uint64_t Packed(uint64_t first, uint64_t end) { return first << 32 | end; }

  std::vector<Range> left_;
};

// work(next) by the threads there are, to which next() gives 0, …, n - 1 and at the end -1: each its own share, and
// then of others'. A thread that comes late may get nothing, one that is early the work of another too.
template <class Work>
void ShareOut(ffi::ThreadPool& pool, int n, Work work) {
  const int threads = std::max(1, std::min<int>(pool.num_threads(), n));
  auto shares = std::make_shared<Shares>(n, threads);
  Each(pool, threads, [=](int mine) { work([&] { return shares->Take(mine); }); });
}

}  // namespace
