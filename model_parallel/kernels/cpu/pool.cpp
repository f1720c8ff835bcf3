#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace packtrain {
namespace {

constexpr int kQuickLooks = 256;
constexpr auto kSpin = std::chrono::microseconds(50);  // operations of a step follow one another within this

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Return when `value` is no longer `old`: looks at it for a while, then sleeps.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kQuickLooks; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (std::chrono::steady_clock::now() < end) {
    if (value.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int num_threads) : workers_(num_threads) {
  for (int thread = 1; thread < num_threads; ++thread) threads_.emplace_back(&Pool::serve, this, thread);
}

Pool::~Pool() {
  stopping_ = true;
  turn_ += 2;
  turn_.notify_all();
  for (auto& thread : threads_) thread.join();
}

// Only threads that have begun are waited for, not those that the system has yet to wake: a thread announces itself in
// `working_` before it asks whether there still is a job, and the job is closed before `working_` is looked at.
void Pool::run(const Job& job) {
  if (job.count <= 0) return;
  if (threads_.empty() || job.count <= job.grain) {
    char* memory = scratch(0, job.scratch_bytes);
    for (int64_t begin = 0; begin < job.count; begin += job.grain) {
      job.run(job.context, begin, std::min(begin + job.grain, job.count), memory);
      count_piece(workers_[0]);
    }
    return;
  }
  job_ = job;
  for (int thread = 0; thread < size(); ++thread) workers_[thread].next = run_begin(thread);
  ++turn_;
  turn_.notify_all();
  take_pieces(0);
  ++turn_;
  for (uint32_t left; (left = working_) != 0;) wait_for_change(working_, left);
}

void Pool::serve(int thread) {
  for (uint32_t seen = 0; !stopping_;) {
    wait_for_change(turn_, seen);
    seen = turn_;
    if (seen % 2 == 0) continue;
    ++working_;
    if (turn_ % 2) take_pieces(thread);
    if (--working_ == 0) working_.notify_all();
  }
}

void Pool::take_pieces(int thread) {
  char* memory = scratch(thread, job_.scratch_bytes);
  for (int turn = 0; turn < size(); ++turn) {
    const int owner = (thread + turn) % size();
    const int64_t run_end = run_begin(owner + 1);
    for (;;) {
      const int64_t begin = workers_[owner].next.fetch_add(job_.grain, std::memory_order_relaxed);
      if (begin >= run_end) break;
      job_.run(job_.context, begin, std::min(begin + job_.grain, run_end), memory);
      count_piece(workers_[thread]);
    }
  }
}

// Only the worker's own thread writes.
void Pool::count_piece(Worker& worker) {
  worker.num_done.store(worker.num_done.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

int64_t Pool::num_done() const {
  int64_t sum = 0;
  for (const Worker& worker : workers_) sum += worker.num_done.load(std::memory_order_relaxed);
  return sum;
}

char* Pool::scratch(int thread, int64_t num_bytes) {
  Worker& worker = workers_[thread];
  if (num_bytes > worker.scratch_bytes) {
    worker.scratch = std::make_unique<char[]>(num_bytes);
    worker.scratch_bytes = num_bytes;
  }
  return worker.scratch.get();
}

}  // namespace packtrain
