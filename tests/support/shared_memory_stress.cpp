// Ranks as threads, exchanging sizes around the borders of a slot, with delays, across the wrap of the turn counter.
// Built with a sanitizer by tests/unit/collectives/test_shared_memory.py. Argument: the number of operations. Exits with 1 at the
// first wrong number.

#include "../../model_parallel/collectives/shared_memory/collectives.cpp"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kTimeoutNs = 60'000'000'000;

float value(int32_t rank, int operation, int64_t i) {
  return static_cast<float>((rank + 1) * 1'000 + operation) + static_cast<float>(i % 97) * 0.125f;
}

void expect(bool holds, const char* what, int operation) {
  if (holds) return;
  std::fprintf(stderr, "operation %d: %s\n", operation, what);
  std::exit(1);
}

int64_t draw_size(std::mt19937& random) {
  constexpr int64_t kSlot = kSlotBytes / sizeof(float);
  const int64_t sizes[] = {0, 1, 576, kSlot - 1, kSlot, kSlot + 1, 2 * kSlot + 7};
  return random() % 8 ? sizes[random() % 3] : sizes[random() % 7];
}

void run(char* segment, int32_t rank, int32_t size, unsigned seed, int num_operations) {
  std::mt19937 same(seed);  // The same draws on every rank.
  std::mt19937 own(seed + 1 + rank);
  for (int operation = 0; operation < num_operations; ++operation) {
    const int64_t count = draw_size(same);
    std::vector<float> x(count);
    for (int64_t i = 0; i < count; ++i) x[i] = value(rank, operation, i);
    if (own() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 1500));
    if (same() % 2) {
      expect(!packtrain_all_reduce(segment, rank, size, kTimeoutNs, x.data(), count), "all_reduce failed", operation);
      for (int64_t i = 0; i < count; ++i) {
        float sum = value(0, operation, i);
        for (int32_t peer = 1; peer < size; ++peer) sum += value(peer, operation, i);
        expect(x[i] == sum, "wrong sum", operation);
      }
    } else {
      std::vector<float> all(size * count);
      const int32_t status = packtrain_all_gather(segment, rank, size, kTimeoutNs, reinterpret_cast<char*>(x.data()),
                                                  reinterpret_cast<char*>(all.data()), count * sizeof(float));
      expect(!status, "all_gather failed", operation);
      for (int64_t i = 0; i < size * count; ++i) {
        expect(all[i] == value(i / count, operation, i % count), "wrong part", operation);
      }
    }
  }
  packtrain_leave(segment, rank, size);
}

}  // namespace

int main(int, char** arguments) {
  const int num_operations = std::atoi(arguments[1]);
  for (int32_t size = 2; size <= 5; ++size) {
    const int64_t num_bytes = packtrain_segment_bytes(size);
    const std::unique_ptr<char, decltype(&std::free)> memory(
        static_cast<char*>(std::aligned_alloc(kLine, num_bytes)), &std::free);
    std::memset(memory.get(), 0, num_bytes);
    auto* members = reinterpret_cast<Member*>(memory.get() + sizeof(Header));
    for (int32_t rank = 0; rank < size; ++rank) members[rank].turn.store(UINT32_MAX - 40);
    std::vector<std::thread> ranks;
    for (int32_t rank = 0; rank < size; ++rank) ranks.emplace_back(run, memory.get(), rank, size, 100u * size, num_operations);
    for (std::thread& thread : ranks) thread.join();
  }
  return 0;
}
