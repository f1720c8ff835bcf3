// The functions that Python calls. Each computes one operation on all threads of the rank's pool.

#include <cstring>
#include <vector>

#include "operations.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace packtrain {
namespace {

struct Kernels {
  const Isa* isa;
  Pool pool;
};

const Isa* find_isa(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const struct {
    bool supported;
    const Isa* isa;
  } choices[] = {{avx512, &kAvx512}, {avx2, &kAvx2}, {true, &kScalar}};
#else
  const struct {
    bool supported;
    const Isa* isa;
  } choices[] = {{true, &kScalar}};
#endif
  for (const auto& choice : choices) {
    if (choice.supported && (*name == '\0' || std::strcmp(name, choice.isa->name) == 0)) return choice.isa;
  }
  return nullptr;
}

// `body(begin, end, scratch)` over pieces 0 … count − 1.
template <class Body>
void share_out(Pool& pool, int64_t count, int64_t grain, int64_t scratch_bytes, const Body& body) {
  pool.run({[](const void* context, int64_t begin, int64_t end, char* scratch) {
              (*static_cast<const Body*>(context))(begin, end, scratch);
            },
            &body, count, grain, scratch_bytes});
}

// Small enough that a thread which is held up takes fewer pieces, large enough that taking them costs nothing.
int64_t grain_of(int64_t count, const Pool& pool) {
  const int64_t grain = count / (8 * pool.size());
  return grain > 0 ? grain : 1;
}

constexpr int64_t kRowGrain = 8;  // rows of a norm or a cache write: less than this is not worth a second thread

// One half panel: columns first … first + kHalf − 1 of `source` [num_columns, num_inputs], zero where there are none.
template <class T>
void pack_half(const T* source, int64_t first, int64_t num_columns, int64_t num_inputs, T* half) {
  constexpr int64_t kPair = 4 / sizeof(T);
  for (int64_t c = 0; c < kHalf; ++c) {
    for (int64_t i = 0; i < (num_inputs + kPair - 1) / kPair * kPair; ++i) {
      const bool there = first + c < num_columns && i < num_inputs;
      half[(i / kPair * kPanel + c) * kPair + i % kPair] = there ? source[(first + c) * num_inputs + i] : T{};
    }
  }
}

template <class T>
void pack(const T* weight, const Linear& linear, int64_t panel, char* out) {
  T* first_half = reinterpret_cast<T*>(out + panel * linear.panel_bytes());
  T* second_half = first_half + kHalf * (4 / sizeof(T));
  const int64_t column = panel * linear.outputs_per_panel();
  pack_half(weight, column, linear.num_outputs, linear.num_inputs, first_half);
  if (linear.gated) {
    const T* up = weight + linear.num_outputs * linear.num_inputs;
    pack_half(up, column, linear.num_outputs, linear.num_inputs, second_half);
  } else {
    pack_half(weight, column + kHalf, linear.num_outputs, linear.num_inputs, second_half);
  }
}

// Query heads by the key/value head that they read, each in groups of at most `largest`.
std::vector<AttentionPiece> head_groups(const Attention& job, std::vector<int64_t>& heads, int64_t largest) {
  std::vector<AttentionPiece> groups;
  heads.reserve(job.num_query_heads);
  for (int64_t kv_head = 0; kv_head < job.num_kv_heads; ++kv_head) {
    int64_t in_group = largest;
    for (int64_t head = 0; head < job.num_query_heads; ++head) {
      if (job.kv_of_query[head] != kv_head) continue;
      if (in_group == largest) {
        groups.push_back({{}, 0, 0, heads.data() + heads.size(), 0, kv_head});
        in_group = 0;
      }
      heads.push_back(head);
      groups.back().num_heads = ++in_group;
    }
  }
  return groups;
}

}  // namespace
}  // namespace packtrain

using namespace packtrain;

// Null when `isa` (empty: the best) is not one that this machine has.
EXPORT Kernels* packtrain_create(int num_threads, const char* isa) {
  const Isa* found = find_isa(isa);
  return found == nullptr ? nullptr : new Kernels{found, Pool(num_threads)};
}

EXPORT void packtrain_destroy(Kernels* kernels) { delete kernels; }

EXPORT const char* packtrain_isa(const Kernels* kernels) { return kernels->isa->name; }

EXPORT int64_t packtrain_packed_bytes(const Linear* linear) { return linear->num_panels() * linear->panel_bytes(); }

// weight: [outputs, inputs]; of a gated one [2 · outputs, inputs], gate rows and then up rows.
EXPORT void packtrain_pack(Kernels* kernels, const void* weight, const Linear* linear, char* out) {
  share_out(kernels->pool, linear->num_panels(), 1, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t panel = begin; panel < end; ++panel) {
      if (linear->type == kFloat32) {
        pack(static_cast<const float*>(weight), *linear, panel, out);
      } else {
        pack(static_cast<const uint16_t*>(weight), *linear, panel, out);
      }
    }
  });
}

EXPORT void packtrain_product(Kernels* kernels, const Linear* weight, const void* x, Type x_type, int64_t num_rows,
                              void* out, Type out_type) {
  if (num_rows == 0) return;
  const Product job{*weight, x, x_type, out, out_type, num_rows};
  const int64_t num_panels = weight->num_panels();
  share_out(kernels->pool, num_panels, grain_of(num_panels, kernels->pool), kernels->isa->product_scratch_bytes,
            [&](int64_t begin, int64_t end, char* scratch) { kernels->isa->product(job, begin, end, scratch); });
}

EXPORT void packtrain_norm(Kernels* kernels, const float* x, float* addend, const void* weight, Type type,
                           int64_t num_rows, int64_t num_columns, float eps, void* out) {
  const Norm job{x, addend, weight, out, type, num_columns, eps};
  share_out(kernels->pool, num_rows, kRowGrain, 0,
            [&](int64_t begin, int64_t end, char*) { kernels->isa->norm(job, begin, end); });
}

// parts: [rows, 3].
EXPORT void packtrain_softmax_parts(Kernels* kernels, const float* logits, int64_t num_rows, int64_t num_columns,
                                    double* parts) {
  share_out(kernels->pool, num_rows, 1, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t row = begin; row < end; ++row) {
      kernels->isa->softmax_parts(logits + row * num_columns, num_columns, parts + row * 3);
    }
  });
}

EXPORT void packtrain_attention(Kernels* kernels, const Attention* job, int64_t num_rows, const Run* runs,
                                int64_t num_runs) {
  share_out(kernels->pool, num_rows, kRowGrain, 0,
            [&](int64_t begin, int64_t end, char*) { kernels->isa->write_cache(*job, begin, end); });

  std::vector<int64_t> heads;
  // A few short runs would leave threads idle if all heads of a key/value head went together.
  const bool few = num_runs * job->num_kv_heads < 2 * kernels->pool.size();
  const std::vector<AttentionPiece> groups = head_groups(*job, heads, few ? 1 : kQueryRows / 2);
  std::vector<AttentionPiece> pieces;
  for (const Run* run = runs; run < runs + num_runs; ++run) {
    for (AttentionPiece piece : groups) {
      piece.run = *run;
      const int64_t step = kQueryRows / piece.num_heads;
      for (int64_t token = 0; token < run->num_tokens; token += step) {
        piece.first_token = token;
        piece.num_tokens = run->num_tokens - token < step ? run->num_tokens - token : step;
        pieces.push_back(piece);
      }
    }
  }
  share_out(kernels->pool, static_cast<int64_t>(pieces.size()), 1, kernels->isa->attend_scratch_bytes(*job),
            [&](int64_t begin, int64_t end, char* scratch) {
              for (int64_t piece = begin; piece < end; ++piece) kernels->isa->attend(*job, pieces[piece], scratch);
            });
}
