// The functions that Python calls. Each computes one operation on all threads of the rank's pool, and becomes part of the
// program that is being recorded, if one is: a list of calls on the same memory, which can then be made again as one call.

#include <algorithm>
#include <chrono>
#include <cmath>
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

// By bins of Gumbel noise, with a margin for what is rounded: the least hash of 52 bits that may give as much.
std::vector<int64_t> least_hashes_of_bins() {
  constexpr double kMargin = 1e-5, kHashes = 0x1p52;
  constexpr int kNumBins = static_cast<int>(kDrawBins * kMostNoise);
  std::vector<int64_t> least(kNumBins + 1, 0);
  for (int bin = 1; bin < kNumBins; ++bin) {
    const double part_above = -std::expm1(-std::exp(kMargin - bin / kDrawBins));
    least[bin] = std::max(0.0, kHashes - std::ceil(part_above * kHashes) - 2.0);
  }
  least[kNumBins] = INT64_MAX;
  return least;
}

struct Kernels {
  const Isa* isa;
  Pool pool;
  Program* recording = nullptr;
  std::vector<float> h{};              // of the product that is computed
  std::vector<AdaptedRows> adapted{};  // of the same
  std::vector<Shrink> shrunk{};        // of the same
  // Of kRowsAtOnce rows of the widest product whose x was prepared.
  std::vector<float> prepared_x{}, group_sums{};
  std::vector<int64_t> least_hashes = least_hashes_of_bins();
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

bool has_isa(const char* name) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (is("avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (is("avx512")) return avx512;
  if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return is("scalar");
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
constexpr int64_t kShrunkAtOnce = 4;  // half panels of h: with as many the chains of few rows do not wait for one another
constexpr int64_t kFewRows = 64;  // of a product: with as few, one thread is soon through, and nobody waits for its pieces

// Computes the first half of what adapters add to a product, and gives the product what it needs for the second.
void shrink(Kernels* kernels, Product& job, const StepAdapters& step, int64_t number) {
  std::vector<AdaptedRows>& adapted = kernels->adapted;
  std::vector<Shrink>& shrunk = kernels->shrunk;
  adapted.clear();
  shrunk.clear();
  int64_t num_floats = 0, num_halves = 0;
  for (const AdapterRun* run = step.runs; run < step.runs + step.num_runs; ++run) {
    const LowRank* weights = run->products + number;
    if (weights->down == nullptr) continue;
    adapted.push_back({run->first_row, run->num_rows, weights, nullptr});
    num_floats += run->num_rows * weights->num_halves * kHalf;
    num_halves += weights->num_halves;
  }
  if (static_cast<int64_t>(kernels->h.size()) < num_floats) kernels->h.resize(num_floats);
  float* h = kernels->h.data();
  for (AdaptedRows& run : adapted) {
    run.h = h;
    const int64_t x_bytes = run.weights->num_inputs * (job.x_type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
    shrunk.push_back({run.weights, static_cast<const char*>(job.x) + run.first_row * x_bytes, run.num_rows, h});
    h += run.num_rows * run.weights->num_halves * kHalf;
  }
  const int64_t grain = num_halves < kShrunkAtOnce * kernels->pool.size() ? kShrunkAtOnce / 2 : kShrunkAtOnce;
  share_out(kernels->pool, num_halves, grain, 0, [&](int64_t begin, int64_t end, char*) {
    kernels->isa->shrink(shrunk.data(), job.x_type, begin, end);
  });
  job.adapted = adapted.data();
  job.num_adapted = static_cast<int64_t>(adapted.size());
}

void reserve(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

constexpr int64_t kRowsAtOnce = 128;  // of a product whose x is prepared: x and sums stay in a core's own cache
constexpr int64_t kWidenedRows = 4;   // of a product: with fewer, converting x in each step costs no more than before them

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

// A matrix in groups as the checkpoint's reader gives it: rows are outputs. Null where the kind has none.
struct GroupMatrix {
  const uint8_t* values;  // [outputs, inputs · bits / 8]: two of four bits a byte, the lower bits first, or an int8
  const char* scales;     // [outputs, spans] of scale_type
  const char* minimums;
  const uint8_t* zeros;        // [outputs, spans]
  const uint8_t* scale_codes;  // [outputs, groups]
  const uint8_t* minimum_codes;
};

// Eight numbers of four bits, two a byte, as a panel has them.
inline uint32_t packed_word(const uint8_t* bytes) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t nibble = bytes[i / 2] >> (i % 2 * 4) & 15;
    word |= nibble << (4 * (i % 2 * 4 + i / 2));
  }
  return word;
}

// One column of one panel, from `row` of the matrix; zeros where that is negative.
void pack_group_column(const GroupMatrix& matrix, const GroupFormat& format, int64_t row, int64_t column, char* panel) {
  const int64_t num_spans = format.num_groups / format.groups_per_span, size = format.group_size;
  const int64_t scale_size = format.scale_type == kFloat32 ? 4 : 2, row_bytes = format.num_inputs() * format.bits / 8;
  const auto put = [](char* to, const void* from, int64_t index, int64_t bytes, bool there) {
    if (there) std::memcpy(to, static_cast<const char*>(from) + index * bytes, bytes);
    else std::memset(to, 0, bytes);
  };
  const bool there = row >= 0;
  for (int64_t s = 0; s < num_spans; ++s) {
    char* span = panel + s * format.span_bytes();
    const int64_t index = row * num_spans + s;
    put(span + column * scale_size, matrix.scales, index, scale_size, there);
    char* rest = span + format.scale_bytes();
    if (format.has_minimums()) put(rest + column * scale_size, matrix.minimums, index, scale_size, there);
    if (format.kind == kZeros) put(rest + column, matrix.zeros, index, 1, there);
    for (int64_t g = 0; g < format.groups_per_span; ++g) {
      char* codes = span + format.span_header_bytes() + g * format.group_bytes();
      const int64_t group = s * format.groups_per_span + g, group_index = row * format.num_groups + group;
      if (format.code_bytes() != 0) put(codes + column, matrix.scale_codes, group_index, 1, there);
      if (format.kind == kMinimumCodes) put(codes + kPanel + column, matrix.minimum_codes, group_index, 1, there);
      char* weights = codes + format.code_bytes();
      const uint8_t* values = matrix.values + row * row_bytes + group * size * format.bits / 8;
      for (int64_t i = 0; i < size; i += format.bits == 4 ? 8 : 2) {
        if (format.bits == 4) {
          const uint32_t word = there ? packed_word(values + i / 2) : 0;
          std::memcpy(weights + (i / 8 * kPanel + column) * 4, &word, 4);
        } else {
          put(weights + (i / 2 * kPanel + column) * 2, values + i, 0, 2, there);
        }
      }
    }
  }
}

inline float half_widened(uint16_t half) {
  if ((half & 0x7c00) == 0x7c00) return half & 0x3ff ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
  const float value = std::ldexp(static_cast<float>(half & 0x3ff) + (half & 0x7c00 ? 1024.0f : 0.0f),
                                 (half & 0x7c00 ? (half >> 10 & 31) : 1) - 25);
  return half & 0x8000 ? -value : value;
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

// The same from a packed matrix in groups.
void embed_packed_row(const Linear& weight, int64_t index, float* out) {
  const GroupFormat& format = weight.groups;
  if (index < 0 || index >= weight.num_outputs) {
    for (int64_t c = 0; c < weight.num_inputs; ++c) out[c] = 0.0f;
    return;
  }
  const char* panel = weight.panels + index / kPanel * weight.panel_bytes();
  const int64_t column = index % kPanel;
  const auto scale_at = [&](const char* p) {
    if (format.scale_type == kFloat32) return reinterpret_cast<const float*>(p)[column];
    const uint16_t half = reinterpret_cast<const uint16_t*>(p)[column];
    return format.scale_type == kFloat16 ? half_widened(half) : widened(half);
  };
  for (int64_t group = 0; group < format.num_groups; ++group) {
    const char* span = panel + group / format.groups_per_span * format.span_bytes();
    const char* codes = span + format.span_header_bytes() + group % format.groups_per_span * format.group_bytes();
    float scale = scale_at(span), minimum = format.has_minimums() ? scale_at(span + format.scale_bytes()) : 0.0f;
    if (format.kind == kMinimumCodes) {
      scale *= static_cast<float>(static_cast<uint8_t>(codes[column]));
      minimum *= static_cast<float>(static_cast<uint8_t>(codes[kPanel + column]));
    } else if (format.kind != kMinimums) {
      if (format.kind == kScaleCodes) scale *= static_cast<float>(static_cast<int8_t>(codes[column]));
      const auto zero = format.kind == kZeros ? static_cast<uint8_t>(span[format.scale_bytes() + column]) : 0;
      minimum = scale * static_cast<float>(format.zero + zero);
    }
    const char* weights = codes + format.code_bytes();
    for (int64_t i = 0; i < format.group_size; ++i) {
      const int64_t c = group * format.group_size + i - weight.num_before;
      if (c < 0 || c >= weight.num_inputs) continue;
      float q;
      if (format.bits == 4) {
        uint32_t word;
        std::memcpy(&word, weights + (i / 8 * kPanel + column) * 4, 4);
        q = static_cast<float>(word >> (4 * (i % 2 * 4 + i % 8 / 2)) & 15);
      } else {
        q = static_cast<float>(static_cast<int8_t>(weights[(i / 2 * kPanel + column) * 2 + i % 2]));
      }
      out[c] = scale * q - minimum;
    }
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
EXPORT int packtrain_has_isa(const char* name) { return has_isa(name); }

EXPORT Kernels* packtrain_create(int num_threads, const Isa* isa) { return new Kernels{isa, Pool(num_threads)}; }

EXPORT void packtrain_destroy(Kernels* kernels) { delete kernels; }

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

// weight: [outputs, inputs of the groups]; of a gated one [2 · outputs, …], gate rows and then up rows.
EXPORT void packtrain_pack_groups(Kernels* kernels, const GroupMatrix* matrix, const Linear* linear, char* out) {
  share_out(kernels->pool, linear->num_panels(), 1, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t output = panel * linear->outputs_per_panel() + (linear->gated ? c % kHalf : c);
        const int64_t row = output + (linear->gated ? c / kHalf * linear->num_outputs : 0);
        pack_group_column(*matrix, linear->groups, output < linear->num_outputs ? row : -1, c,
                          out + panel * linear->panel_bytes());
      }
    }
  });
}

// Rows of an ungated weight in groups.
EXPORT void packtrain_embed_packed(Kernels* kernels, const int64_t* token_ids, int64_t num_rows, const Linear* weight,
                                   int64_t first_id, float* out) {
  perform(kernels, [=, linear = *weight] {
    share_out(kernels->pool, num_rows, 1, 0, [&](int64_t begin, int64_t end, char*) {
      for (int64_t row = begin; row < end; ++row) {
        embed_packed_row(linear, token_ids[row] - first_id, out + row * linear.num_inputs);
      }
    });
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
// out_stride: elements from a row's outputs to the next row's. first_output: of the product's, where these are a part.
EXPORT void packtrain_product(Kernels* kernels, const Linear* weight, const void* x, Type x_type, int64_t num_rows,
                              void* out, Type out_type, int64_t out_stride, int64_t first_output, const StepAdapters* step,
                              int64_t number) {
  if (num_rows == 0) return;
  const auto multiply = [=](const Product& job) {
    const int64_t num_panels = job.weight.num_panels();
    const bool in_pieces = kernels->pool.size() > 1 || job.num_rows > kFewRows;
    const int64_t grain = in_pieces ? grain_of(num_panels, kernels->pool) : num_panels;
    share_out(kernels->pool, num_panels, grain, kernels->isa->product_scratch_bytes(job),
              [&](int64_t begin, int64_t end, char* scratch) { kernels->isa->product(job, begin, end, scratch); });
  };
  const bool widens = kernels->isa->widens_x && x_type == kBfloat16 && weight->type != kGroups && num_rows >= kWidenedRows;
  const auto prepare = [=](Product& job) {
    const bool in_groups = job.weight.type == kGroups;
    reserve(kernels->prepared_x, kRowsAtOnce * (in_groups ? job.weight.groups.num_inputs() : job.weight.num_inputs));
    if (in_groups) reserve(kernels->group_sums, kRowsAtOnce * job.weight.groups.num_groups);
    job.prepared_x = kernels->prepared_x.data();
    job.group_sums = kernels->group_sums.data();
    share_out(kernels->pool, job.num_rows, kRowGrain, 0,
              [&](int64_t begin, int64_t end, char*) { kernels->isa->prepare_rows(job, begin, end); });
    if (widens) job.x = job.prepared_x, job.x_type = kFloat32;
  };
  const Product known{*weight, x, x_type, out, out_type, num_rows, nullptr, 0, 0, first_output / kHalf, out_stride, nullptr, nullptr};
  perform(kernels, [=] {
    Product whole = known;
    const bool at_once = whole.weight.type != kGroups && (!widens || whole.num_rows <= kRowsAtOnce);
    if (at_once && widens) prepare(whole);
    if (step != nullptr && step->num_runs > 0) shrink(kernels, whole, *step, number);
    if (at_once) return multiply(whole);
    for (int64_t row = 0; row < whole.num_rows; row += kRowsAtOnce) {
      Product job = whole;
      job.first_row = row;
      job.num_rows = whole.num_rows - row < kRowsAtOnce ? whole.num_rows - row : kRowsAtOnce;
      const int64_t x_bytes = job.x_type == kFloat32 ? 4 : 2, out_bytes = job.out_type == kFloat32 ? 4 : 2;
      job.x = static_cast<const char*>(job.x) + row * job.weight.num_inputs * x_bytes;
      job.out = static_cast<char*>(job.out) + row * job.out_stride * out_bytes;
      prepare(job);
      multiply(job);
    }
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

EXPORT void packtrain_draws(Kernels* kernels, const Draw* draws, int64_t num_draws) {
  int64_t scratch_bytes = 0;
  for (int64_t i = 0; i < num_draws; ++i) scratch_bytes = std::max(scratch_bytes, draw_scratch_bytes(draws[i]));
  share_out(kernels->pool, num_draws, 1, scratch_bytes, [&](int64_t begin, int64_t end, char* scratch) {
    for (int64_t i = begin; i < end; ++i) kernels->isa->draw(draws[i], kernels->least_hashes.data(), scratch);
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
