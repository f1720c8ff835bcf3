// The functions that Python calls. Each computes one operation on all threads of the rank's pool, and becomes part of the
// program that is being recorded, if one is: a list of calls on the same memory, which can then be made again as one call.

#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "operations.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace packtrain {
namespace {

// Calls in their order. One that does not return 0 has failed.
using Program = std::vector<std::function<int32_t()>>;

struct Kernels {
  const Isa* isa;
  Pool pool;
  Program* recording = nullptr;
  std::vector<float> h;              // of the product that is computed
  std::vector<AdaptedRows> adapted;  // of the same
};

// Rows of a step, one after another, that one adapter changes; and what it adds to each product of the model.
struct AdapterRun {
  int64_t first_row, num_rows;
  const LowRank* products;
};

struct StepAdapters {
  const AdapterRun* runs;
  int64_t num_runs;
};

// All that `call` refers to, besides memory that outlives the program, is held in it by value.
template <class Call>
void perform(Kernels* kernels, const Call& call) {
  if (kernels->recording != nullptr) kernels->recording->push_back([call] { return call(), 0; });
  call();
}

int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

constexpr int64_t kRowGrain = 8;  // rows of a norm, a cache write or a look-up: less than this is not worth a second thread
constexpr int64_t kFewPositions = 512;  // cached positions of all pieces together: as few are not worth it either
constexpr int64_t kFewRows = 64;  // of a product: with as few, one thread is soon through, and nobody waits for its pieces

// Computes the first half of what adapters add to a product, and gives the product what it needs for the second.
void shrink(Kernels* kernels, Product& job, const StepAdapters& step, int64_t number) {
  std::vector<AdaptedRows>& adapted = kernels->adapted;
  adapted.clear();
  int64_t num_floats = 0, num_pairs = 0;
  for (const AdapterRun* run = step.runs; run < step.runs + step.num_runs; ++run) {
    const LowRank* weights = run->products + number;
    if (weights->down == nullptr) continue;
    adapted.push_back({run->first_row, run->num_rows, weights, nullptr});
    num_floats += run->num_rows * weights->num_halves * kHalf;
    num_pairs += (weights->num_halves + 1) / 2;
  }
  if (static_cast<int64_t>(kernels->h.size()) < num_floats) kernels->h.resize(num_floats);
  float* h = kernels->h.data();
  for (AdaptedRows& run : adapted) {
    run.h = h;
    h += run.num_rows * run.weights->num_halves * kHalf;
  }
  // Two half panels at a time, of one run after another.
  share_out(kernels->pool, num_pairs, 1, 0, [&](int64_t begin, int64_t end, char*) {
    int64_t first = 0;  // pair of the run
    for (const AdaptedRows& run : adapted) {
      const int64_t num_halves = run.weights->num_halves, last = first + (num_halves + 1) / 2;
      for (int64_t pair = begin > first ? begin : first; pair < (end < last ? end : last); ++pair) {
        const int64_t half = 2 * (pair - first);
        const int64_t x_bytes = run.weights->num_inputs * (job.x_type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
        const Shrink part{run.weights, static_cast<const char*>(job.x) + run.first_row * x_bytes, run.num_rows,
                          const_cast<float*>(run.h)};
        kernels->isa->shrink(part, half, half + 2 < num_halves ? half + 2 : num_halves);
      }
      first = last;
    }
  });
  job.adapted = adapted.data();
  job.num_adapted = static_cast<int64_t>(adapted.size());
}

// Input features of a step.
template <class T>
constexpr int64_t kElementsOfStep = sizeof(T) == sizeof(float) ? 1 : 2;

// One half panel: columns first … first + kHalf − 1 of `source` [num_columns, num_inputs], zero where there are none.
template <class T>
void pack_half(const T* source, int64_t first, int64_t num_columns, int64_t num_inputs, T* half) {
  constexpr int64_t kPair = kElementsOfStep<T>;
  for (int64_t c = 0; c < kHalf; ++c) {
    for (int64_t i = 0; i < (num_inputs + kPair - 1) / kPair * kPair; ++i) {
      const bool there = first + c < num_columns && i < num_inputs;
      half[(i / kPair * kPanel + c) * kPair + i % kPair] = there ? source[(first + c) * num_inputs + i] : T{};
    }
  }
}

template <class T>
void pack(const T* weight, const Linear& linear, int64_t panel, char* out) {
  T* first_half = reinterpret_cast<T*>(out + panel * linear.panel_bytes() + linear.scale_bytes());
  T* second_half = first_half + kHalf * kElementsOfStep<T>;
  const int64_t column = panel * linear.outputs_per_panel();
  pack_half(weight, column, linear.num_outputs, linear.num_inputs, first_half);
  if (linear.gated) {
    const T* up = weight + linear.num_outputs * linear.num_inputs;
    pack_half(up, column, linear.num_outputs, linear.num_inputs, second_half);
  } else {
    pack_half(weight, column + kHalf, linear.num_outputs, linear.num_inputs, second_half);
  }
}

// Scales of a panel's columns: one for each row of the weight.
void pack_scales(const float* scales, const Linear& linear, int64_t panel, char* out) {
  auto* panel_scales = reinterpret_cast<float*>(out + panel * linear.panel_bytes());
  const int64_t column = panel * linear.outputs_per_panel();
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t output = column + (linear.gated ? c % kHalf : c);
    const int64_t row = output + (linear.gated ? c / kHalf * linear.num_outputs : 0);
    panel_scales[c] = output < linear.num_outputs ? scales[row] : 0.0f;
  }
}

inline float widened(float x) { return x; }
inline float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One token's row of the embedding, zero where it is not held here.
template <class T>
void embed_row(const T* weight, int64_t index, int64_t num_held, int64_t num_columns, float* out) {
  const bool held = 0 <= index && index < num_held;
  for (int64_t c = 0; c < num_columns; ++c) out[c] = held ? widened(weight[index * num_columns + c]) : 0.0f;
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

// What a step's attention is made of. `heads` is memory that the pieces refer to.
std::vector<AttentionPiece> attention_pieces(const Attention& job, const Run* runs, int64_t num_runs, int num_threads,
                                             std::vector<int64_t>& heads) {
  // Heads that read the same keys and values go together, unless that left threads idle.
  const bool few = num_runs * job.num_kv_heads < num_threads;
  const std::vector<AttentionPiece> groups = head_groups(job, heads, few ? 1 : kQueryRows / 2);
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
  return pieces;
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

EXPORT int64_t packtrain_num_done(const Kernels* kernels) { return kernels->pool.num_done(); }

EXPORT int64_t packtrain_packed_bytes(const Linear* linear) { return linear->num_panels() * linear->panel_bytes(); }

// weight: [outputs, inputs]; of a gated one [2 · outputs, inputs], gate rows and then up rows. scales: a float32 a row of an
// int8 weight, null of others.
EXPORT void packtrain_pack(Kernels* kernels, const void* weight, const float* scales, const Linear* linear, char* out) {
  share_out(kernels->pool, linear->num_panels(), 1, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t panel = begin; panel < end; ++panel) {
      if (linear->type == kFloat32) {
        pack(static_cast<const float*>(weight), *linear, panel, out);
      } else if (linear->type == kBfloat16) {
        pack(static_cast<const uint16_t*>(weight), *linear, panel, out);
      } else {
        pack_scales(scales, *linear, panel, out);
        pack(static_cast<const int8_t*>(weight), *linear, panel, out);
      }
    }
  });
}

EXPORT void packtrain_embed(Kernels* kernels, const int64_t* token_ids, int64_t num_rows, const void* weight, Type type,
                            int64_t first_id, int64_t num_held, int64_t num_columns, float* out) {
  perform(kernels, [=] {
    share_out(kernels->pool, num_rows, kRowGrain, 0, [&](int64_t begin, int64_t end, char*) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t index = token_ids[row] - first_id;
        float* row_out = out + row * num_columns;
        if (type == kFloat32) {
          embed_row(static_cast<const float*>(weight), index, num_held, num_columns, row_out);
        } else {
          embed_row(static_cast<const uint16_t*>(weight), index, num_held, num_columns, row_out);
        }
      }
    });
  });
}

// step: null where no adapters are known; what it refers to is read when the product is computed. `number`: of this product.
EXPORT void packtrain_product(Kernels* kernels, const Linear* weight, const void* x, Type x_type, int64_t num_rows,
                              void* out, Type out_type, const StepAdapters* step, int64_t number) {
  if (num_rows == 0) return;
  perform(kernels, [=, linear = *weight] {
    Product job{linear, x, x_type, out, out_type, num_rows, nullptr, 0};
    if (step != nullptr && step->num_runs > 0) shrink(kernels, job, *step, number);
    const int64_t num_panels = job.weight.num_panels();
    const bool in_pieces = kernels->pool.size() > 1 || job.num_rows > kFewRows;
    const int64_t grain = in_pieces ? grain_of(num_panels, kernels->pool) : num_panels;
    share_out(kernels->pool, num_panels, grain, kernels->isa->product_scratch_bytes(job),
              [&](int64_t begin, int64_t end, char* scratch) { kernels->isa->product(job, begin, end, scratch); });
  });
}

EXPORT void packtrain_norm(Kernels* kernels, const float* x, float* residual, const void* weight, Type type,
                           int64_t num_rows, int64_t num_columns, float eps, void* out) {
  perform(kernels, [=, job = Norm{x, residual, weight, out, type, num_columns, eps}] {
    share_out(kernels->pool, num_rows, kRowGrain, 0,
              [&](int64_t begin, int64_t end, char*) { kernels->isa->norm(job, begin, end); });
  });
}

// parts: [rows, 3].
EXPORT void packtrain_softmax_parts(Kernels* kernels, const float* logits, int64_t num_rows, int64_t num_columns,
                                    double* parts) {
  perform(kernels, [=] {
    share_out(kernels->pool, num_rows, 1, 0, [&](int64_t begin, int64_t end, char*) {
      for (int64_t row = begin; row < end; ++row) {
        kernels->isa->softmax_parts(logits + row * num_columns, num_columns, parts + row * 3);
      }
    });
  });
}

EXPORT void packtrain_attention(Kernels* kernels, const Attention* attention, int64_t num_rows, const Run* runs,
                                int64_t num_runs) {
  perform(kernels, [=, job = *attention] {
    share_out(kernels->pool, num_rows, kRowGrain, 0,
              [&](int64_t begin, int64_t end, char*) { kernels->isa->write_cache(job, begin, end); });
    std::vector<int64_t> heads;
    const std::vector<AttentionPiece> pieces = attention_pieces(job, runs, num_runs, kernels->pool.size(), heads);
    int64_t num_positions = 0;
    for (const AttentionPiece& piece : pieces) num_positions += piece.num_tokens * (piece.run.start + piece.num_tokens);
    const auto count = static_cast<int64_t>(pieces.size());
    const int64_t grain = num_positions < kFewPositions ? count : 1;
    share_out(kernels->pool, count, grain, kernels->isa->attend_scratch_bytes(job),
              [&](int64_t begin, int64_t end, char* scratch) {
                for (int64_t piece = begin; piece < end; ++piece) {
                  const AttentionPiece* next = piece + 1 < count ? &pieces[piece + 1] : nullptr;
                  kernels->isa->attend(job, pieces[piece], next, scratch);
                }
              });
  });
}

// Calls from now on, until `packtrain_end_recording`, are made and become part of the program.
EXPORT Program* packtrain_begin_recording(Kernels* kernels) { return kernels->recording = new Program; }

EXPORT void packtrain_end_recording(Kernels* kernels) { kernels->recording = nullptr; }

// Adds a call of runtime/shared_memory's packtrain_all_reduce, which the caller has made already.
EXPORT void packtrain_record_all_reduce(Program* program,
                                        int32_t (*all_reduce)(void*, int32_t, int32_t, int64_t, float*, int64_t),
                                        void* segment, int32_t rank, int32_t size, int64_t timeout_ns, float* x,
                                        int64_t count) {
  program->push_back([=] { return all_reduce(segment, rank, size, timeout_ns, x, count); });
}

// 0, or what the call that failed returned. durations_ns: null, or of as many as the program has calls.
EXPORT int32_t packtrain_replay(const Program* program, int64_t* durations_ns) {
  for (const auto& call : *program) {
    const int64_t began_ns = durations_ns != nullptr ? now_ns() : 0;
    if (const int32_t status = call()) return status;
    if (durations_ns != nullptr) *durations_ns++ = now_ns() - began_ns;
  }
  return 0;
}

EXPORT int64_t packtrain_num_calls(const Program* program) { return static_cast<int64_t>(program->size()); }

EXPORT void packtrain_forget(Program* program) { delete program; }
