// Matrix products over packed panels. Every output is one chain of multiply-adds over the inputs in their order, whatever
// rows and columns stand beside it: that is the whole of batch invariance here.

// How one step (a word of weights a column) is multiplied; X is the element of x.
struct Float32Steps {
  using X = float;
  static constexpr int kInputs = 1, kColumnBytes = 4;
  struct Weights {
    Vec::F value;
  };
  using Broadcast = Vec::F;
  static Weights weights(const void* p) { return {Vec::load(static_cast<const float*>(p))}; }
  static Broadcast broadcast(const X* x) { return Vec::set(*x); }
  static Broadcast broadcast_last(const X* x) { return Vec::set(*x); }
  static Vec::F add(Vec::F sum, const Broadcast& x, const Weights& w) { return Vec::fma(x, w.value, sum); }
};

struct Bfloat16Steps {
  using X = uint16_t;
  static constexpr int kInputs = 2, kColumnBytes = 4;
  using Weights = Vec::Words;
  using Broadcast = Vec::Words;
  static Weights weights(const void* p) { return Vec::words(p); }
  static Broadcast broadcast(const X* x) { return Vec::set_word(word_at(x)); }
  static Broadcast broadcast_last(const X* x) { return Vec::set_word(half_word_at(x)); }
  static Vec::F add(Vec::F sum, const Broadcast& x, const Weights& w) { return Vec::dot(sum, x, w); }
};

// float32 x on bfloat16 weights: nothing is rounded.
struct MixedSteps {
  using X = float;
  static constexpr int kInputs = 2, kColumnBytes = 4;
  struct Weights {
    Vec::F even, odd;
  };
  struct Broadcast {
    Vec::F even, odd;
  };
  static Weights weights(const void* p) {
    const Vec::Words words = Vec::words(p);
    return {Vec::even(words), Vec::odd(words)};
  }
  static Broadcast broadcast(const X* x) { return {Vec::set(x[0]), Vec::set(x[1])}; }
  static Broadcast broadcast_last(const X* x) { return {Vec::set(x[0]), Vec::set(0.0f)}; }
  static Vec::F add(Vec::F sum, const Broadcast& x, const Weights& w) {
    return Vec::fma(x.odd, w.odd, Vec::fma(x.even, w.even, sum));
  }
};

// int8 weights, which bfloat16 and float32 hold exactly. Their columns' scales are applied to the sums.
struct Int8Steps : Bfloat16Steps {
  static constexpr int kColumnBytes = 2;
  using Weights = Vec::Pairs;
  static Weights weights(const void* p) { return Vec::pairs(static_cast<const int8_t*>(p)); }
  static Vec::F add(Vec::F sum, const Broadcast& x, const Weights& w) { return Vec::dot(sum, x, w); }
};

struct Int8MixedSteps : MixedSteps {
  static constexpr int kColumnBytes = 2;
  static Weights weights(const void* p) {
    const Vec::Pairs pairs = Vec::pairs(static_cast<const int8_t*>(p));
    return {Vec::even(pairs), Vec::odd(pairs)};
  }
};

#include "low_rank.h"

// Memory that will be needed soon, and how much further to look with each step.
struct Ahead {
  const char* data;
  int64_t step_bytes;
};

// out[R][kPanel] = R rows of x times one panel.
template <class Steps, int R>
void multiply_tile(const typename Steps::X* x, int64_t num_inputs, const char* panel, Ahead ahead, float* out) {
  constexpr int kColumn = Steps::kColumnBytes;
  constexpr int kBytes = Vec::kLanes * kColumn, kHalfBytes = kHalf * kColumn, kStepBytes = kPanel * kColumn;
  const int64_t num_whole = num_inputs / Steps::kInputs;
  for (int column = 0; column < kHalf; column += Vec::kLanes, panel += kBytes) {
    Vec::F sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec::set(0.0f);
    const char* p = panel;
    for (int64_t step = 0; step < num_whole; ++step, p += kStepBytes) {
      const auto first = Steps::weights(p), second = Steps::weights(p + kHalfBytes);
      const char* soon = ahead.data + step * ahead.step_bytes;
      for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(soon + line, 0, 2);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto xr = Steps::broadcast(x + r * num_inputs + step * Steps::kInputs);
        sum[r][0] = Steps::add(sum[r][0], xr, first);
        sum[r][1] = Steps::add(sum[r][1], xr, second);
      }
    }
    if (num_inputs % Steps::kInputs) {
      const auto first = Steps::weights(p), second = Steps::weights(p + kHalfBytes);
      for (int r = 0; r < R; ++r) {
        const auto xr = Steps::broadcast_last(x + (r + 1) * num_inputs - 1);
        sum[r][0] = Steps::add(sum[r][0], xr, first);
        sum[r][1] = Steps::add(sum[r][1], xr, second);
      }
    }
    for (int r = 0; r < R; ++r) {
      Vec::store(out + r * kPanel + column, sum[r][0]);
      Vec::store(out + r * kPanel + kHalf + column, sum[r][1]);
    }
  }
}

template <class Steps, int R = Vec::kProductRows>
void multiply_rows(int num_rows, const typename Steps::X* x, int64_t num_inputs, const char* panel, Ahead ahead,
                   float* out) {
  if constexpr (R == 1) {
    multiply_tile<Steps, 1>(x, num_inputs, panel, ahead, out);
  } else if (num_rows == R) {
    multiply_tile<Steps, R>(x, num_inputs, panel, ahead, out);
  } else {
    multiply_rows<Steps, R - 1>(num_rows, x, num_inputs, panel, ahead, out);
  }
}

constexpr int64_t kSumFloats = Vec::kProductRows * kPanel;

inline int64_t num_row_tiles(const Product& job) { return (job.num_rows + Vec::kProductRows - 1) / Vec::kProductRows; }

inline Vec::F silu(Vec::F x) {
  return Vec::div(x, Vec::add(Vec::set(1.0f), exponential(Vec::mul(x, Vec::set(-1.0f)))));
}

template <class Out>
void finish_row(const float* sums, bool gated, Out* out, int64_t num_outputs) {
  if (gated) {
    for (int64_t c = 0; c < smaller(num_outputs, kHalf); c += Vec::kLanes) {
      Vec::store(out + c, Vec::mul(silu(Vec::load(sums + c)), Vec::load(sums + kHalf + c)), num_outputs - c);
    }
  } else {
    for (int64_t c = 0; c < smaller(num_outputs, kPanel); c += Vec::kLanes) {
      Vec::store(out + c, Vec::load(sums + c), num_outputs - c);
    }
  }
}

constexpr int64_t kAheadBytes = 8192;

// What a tile fetches from memory: all tiles of rows together the `next` panel as it is stored, so that memory and arithmetic work
// at the same time, or, when there is one tile, what lies a little further on.
template <class Steps>
Ahead ahead_of(const Product& job, const char* panel, const char* next, int64_t tile) {
  const int64_t num_tiles = num_row_tiles(job), bytes = job.weight.panel_bytes();
  if (num_tiles == 1) return {panel + kAheadBytes, kPanel * Steps::kColumnBytes};
  const int64_t num_fetches = num_tiles * job.weight.num_inputs / Steps::kInputs + 1;
  return {next + bytes * tile / num_tiles, (bytes + num_fetches - 1) / num_fetches};
}

// The sums of one panel, `scales` times them where there are any, as outputs of job.num_rows rows.
template <class Steps>
void multiply_panel(const Product& job, int64_t panel, const char* weights, const float* scales, const char* next,
                    float* sums) {
  const Linear& weight = job.weight;
  const auto* x = static_cast<const typename Steps::X*>(job.x);
  const int64_t num_tiles = num_row_tiles(job), first = panel * weight.outputs_per_panel();
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t row = job.num_rows * tile / num_tiles, end = job.num_rows * (tile + 1) / num_tiles;
    multiply_rows<Steps>(static_cast<int>(end - row), x + row * weight.num_inputs, weight.num_inputs, weights,
                         ahead_of<Steps>(job, weights, next, tile), sums);
    for (int64_t c = 0; scales != nullptr && c < (end - row) * kPanel; ++c) sums[c] *= scales[c % kPanel];
    expand(job, panel, job.first_row + row, job.first_row + end, sums);
    for (int64_t r = row; r < end; ++r) {
      const int64_t num_outputs = weight.num_outputs - first, at = r * job.out_stride + first;
      float* row_sums = sums + (r - row) * kPanel;
      if (job.out_type == kFloat32) {
        finish_row(row_sums, weight.gated, static_cast<float*>(job.out) + at, num_outputs);
      } else {
        finish_row(row_sums, weight.gated, static_cast<uint16_t*>(job.out) + at, num_outputs);
      }
    }
  }
}

template <class Steps>
void multiply_panels(const Product& job, int64_t first_panel, int64_t last_panel, float* sums) {
  const int64_t panel_bytes = job.weight.panel_bytes(), scale_bytes = job.weight.scale_bytes();
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const char* data = job.weight.panels + panel * panel_bytes;
    const auto* scales = scale_bytes ? reinterpret_cast<const float*>(data) : nullptr;
    multiply_panel<Steps>(job, panel, data + scale_bytes, scales, data + panel_bytes, sums);
  }
}

inline void expand(const int8_t* __restrict values, int64_t count, uint16_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(bits_of(static_cast<float>(values[i])) >> 16);
}

// Many rows on int8: each panel becomes one of bfloat16 first, so that it is converted once and not for every tile of rows.
template <class Steps>
void multiply_expanded_panels(const Product& job, int64_t first_panel, int64_t last_panel, float* sums) {
  auto* expanded = reinterpret_cast<uint16_t*>(sums + kSumFloats);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const char* data = job.weight.panels + panel * job.weight.panel_bytes();
    const auto* values = reinterpret_cast<const int8_t*>(data + job.weight.scale_bytes());
    expand(values, job.weight.num_steps() * kPanel * 2, expanded);
    multiply_panel<Steps>(job, panel, reinterpret_cast<const char*>(expanded), reinterpret_cast<const float*>(data),
                          data + job.weight.panel_bytes(), sums);
  }
}

inline bool expands(const Product& job) { return job.weight.type == kInt8 && num_row_tiles(job) > 1; }
