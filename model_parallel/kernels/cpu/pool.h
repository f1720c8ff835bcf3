// A few threads that live as long as a rank's kernels and share out the pieces of one operation at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace packtrain {

// Work in pieces 0 … count − 1. Each thread has a run of its own, so that it reads memory in one stream, and helps the others
// when it is through: a thread that the system holds up does less.
// `run(context, begin, end, scratch)` computes pieces begin … end − 1; scratch is the thread's own, of the bytes asked for.
struct Job {
  void (*run)(const void* context, int64_t begin, int64_t end, char* scratch);
  const void* context;
  int64_t count;
  int64_t grain;  // pieces that are taken at a time
  int64_t scratch_bytes;
};

class Pool {
 public:
  // The caller of `run` is one of the threads. An idle thread spins for some microseconds, giving way to any other that
  // wants the core, and then sleeps.
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()); }
  void run(const Job& job);  // one call at a time; returns when all pieces are done
  int64_t num_done() const;  // grows with the pieces that are done; may be read by any thread at any time

 private:
  void serve(int thread);
  void take_pieces(int thread);
  int64_t run_begin(int thread) const { return job_.count * thread / size(); }
  char* scratch(int thread, int64_t num_bytes);

  struct alignas(64) Worker {
    std::atomic<int64_t> next{0};      // first piece of its run that nobody has taken
    std::atomic<int64_t> num_done{0};  // how often this thread has taken pieces and computed them
    std::unique_ptr<char[]> scratch;
    int64_t scratch_bytes = 0;
  };
  static void count_piece(Worker& worker);
  std::vector<Worker> workers_;  // the caller is the first
  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> turn_{0};     // odd while there is a job; the threads wait for it to change
  alignas(64) std::atomic<uint32_t> working_{0};  // threads, besides the caller, that may look at the job
};

}  // namespace packtrain
