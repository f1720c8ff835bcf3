// Exchange between ranks that map one piece of memory.
//
// Each operation is a turn, counted by every rank in its own Member. A rank copies its part into its slot of the turn,
// publishes the turn's number, waits until every other rank has published it too, and reads all slots. There are two
// sets of slots, for odd and even turns, so that one meeting a turn is enough: whoever writes for turn t + 2 has met all
// others at turn t + 1, and they came there when they had finished with the slots of turn t.
//
// All-zero memory is a group that has not begun. Turn numbers wrap around; ranks are never two turns apart.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kSlotBytes = 256 << 10;  // Larger exchanges take several turns. Small enough to stay in a core's cache.

// How a rank waits. Balanced ranks meet within microseconds; then a core that others want is given away, and at last
// the rank sleeps. A sleep is short enough to notice that a peer has left, which wakes nobody.
constexpr int kSpins = 50;
constexpr int64_t kYieldNs = 500'000;
constexpr int64_t kSleepNs = 20'000'000;

enum Status : int32_t { kDone = 0, kLate = 1, kLeft = 2, kMismatch = 3 };

struct alignas(kLine) Member {
  std::atomic<uint32_t> turn;
  int64_t num_bytes[2];  // What it brings to the odd and the even turn.
};

struct Header {
  alignas(kLine) std::atomic<uint32_t> has_left;
  alignas(kLine) std::atomic<uint32_t> num_sleeping;
};

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Group {
 public:
  Group(void* segment, int32_t rank, int32_t size, int64_t timeout_ns)
      : header_(static_cast<Header*>(segment)),
        members_(reinterpret_cast<Member*>(header_ + 1)),
        slots_(reinterpret_cast<char*>(members_ + size)),
        rank_(rank),
        size_(size),
        timeout_ns_(timeout_ns),
        turn_(members_[rank].turn.load(std::memory_order_relaxed)) {}

  // Status in the low byte; above it, the peer that is to blame.
  int32_t exchange(const void* part, int64_t num_bytes) {
    turn_ += 1;
    Member& me = members_[rank_];
    me.num_bytes[turn_ % 2] = num_bytes;
    if (num_bytes) std::memcpy(slot(rank_), part, num_bytes);
    // Sequentially consistent, like the counting in `sleep`: either this rank sees the sleeper, or that one the turn.
    me.turn.store(turn_);
    if (header_->num_sleeping.load()) futex(me, FUTEX_WAKE, INT_MAX, nullptr);
    for (int32_t peer = 0; peer < size_; ++peer) {
      Status status = wait_for(members_[peer]);
      if (status == kDone && members_[peer].num_bytes[turn_ % 2] != num_bytes) status = kMismatch;
      if (status != kDone) return status | peer << 8;
    }
    return kDone;
  }

  char* slot(int32_t rank) const { return slots_ + (turn_ % 2 * size_ + rank) * kSlotBytes; }

  void leave() {
    header_->has_left.store(1);
    futex(members_[rank_], FUTEX_WAKE, INT_MAX, nullptr);
  }

 private:
  Status wait_for(const Member& peer) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (has_come(peer)) return kDone;
      pause_core();
    }
    const int64_t began_ns = now_ns();
    for (;;) {
      const bool left = header_->has_left.load();  // Before the turn: who leaves has taken part in all turns until then.
      if (has_come(peer)) return kDone;
      const int64_t waited_ns = now_ns() - began_ns;
      if (left) return kLeft;
      if (waited_ns > timeout_ns_) return kLate;
      if (waited_ns < kYieldNs) {
        sched_yield();
      } else {
        sleep(peer, std::min(kSleepNs, timeout_ns_ - waited_ns + 1));
      }
    }
  }

  bool has_come(const Member& peer) const {
    return static_cast<int32_t>(peer.turn.load(std::memory_order_acquire) - turn_) >= 0;
  }

  void sleep(const Member& peer, int64_t most_ns) {
    header_->num_sleeping.fetch_add(1);
    const uint32_t seen = peer.turn.load();
    if (static_cast<int32_t>(seen - turn_) < 0) {
      const timespec timeout{most_ns / 1'000'000'000, most_ns % 1'000'000'000};
      futex(peer, FUTEX_WAIT, seen, &timeout);
    }
    header_->num_sleeping.fetch_sub(1);
  }

  static void futex(const Member& member, int operation, uint32_t value, const timespec* timeout) {
    syscall(SYS_futex, &member.turn, operation, value, timeout, nullptr, 0);
  }

  Header* header_;
  Member* members_;
  char* slots_;
  int32_t rank_;
  int32_t size_;
  int64_t timeout_ns_;
  uint32_t turn_;
};

// out may be a.
void add(float* out, const float* a, const float* b, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

}  // namespace

// Bytes of the memory that a group needs; a multiple of the cache line, as its address must be.
EXPORT int64_t packtrain_segment_bytes(int32_t size) {
  return sizeof(Header) + size * sizeof(Member) + 2 * size * kSlotBytes;
}

// x becomes the sum over at least two ranks, added in their order.
EXPORT int32_t packtrain_all_reduce(void* segment, int32_t rank, int32_t size, int64_t timeout_ns, float* x,
                                    int64_t count) {
  constexpr int64_t kMost = kSlotBytes / sizeof(float);
  Group group(segment, rank, size, timeout_ns);
  int64_t done = 0;
  do {
    const int64_t part = std::min(kMost, count - done);
    if (int32_t failed = group.exchange(x + done, part * sizeof(float))) return failed;
    const auto from = [&](int32_t peer) { return reinterpret_cast<const float*>(group.slot(peer)); };
    add(x + done, from(0), from(1), part);
    for (int32_t peer = 2; peer < size; ++peer) add(x + done, x + done, from(peer), part);
    done += part;
  } while (done < count);
  return kDone;
}

// out holds size times num_bytes. With none it is a barrier.
EXPORT int32_t packtrain_all_gather(void* segment, int32_t rank, int32_t size, int64_t timeout_ns, const char* x,
                                    char* out, int64_t num_bytes) {
  Group group(segment, rank, size, timeout_ns);
  int64_t done = 0;
  do {
    const int64_t part = std::min(kSlotBytes, num_bytes - done);
    if (int32_t failed = group.exchange(x + done, part)) return failed;
    for (int32_t peer = 0; part && peer < size; ++peer) {
      std::memcpy(out + peer * num_bytes + done, group.slot(peer), part);
    }
    done += part;
  } while (done < num_bytes);
  return kDone;
}

// Fails the ranks that wait now or later for a turn that is not complete.
EXPORT void packtrain_leave(void* segment, int32_t rank, int32_t size) { Group(segment, rank, size, 0).leave(); }
