// What each instruction set implements (isa_*.cpp) and api.cpp calls, with the data that operations work on.
#pragma once

#include <cstdint>

namespace packtrain {

enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// Columns of a weight panel, in two halves. A panel holds, for every step (an input feature; for bfloat16 and int8 a pair of
// them), the weights of the first half's columns and then of the second's. So a product reads a panel from front to back.
// Plain: the halves are neighbouring outputs. Gated: the first half is of the gate, the second the same outputs of the up
// projection, so that silu(gate) · up is at hand in registers. A panel of int8 begins with a float32 for each of its columns,
// by which the whole column is multiplied.
constexpr int64_t kHalf = 16;
constexpr int64_t kPanel = 2 * kHalf;

struct Linear {
  const char* panels;
  int64_t num_inputs;
  int64_t num_outputs;  // of a gated one: columns of gate, which are as many of up
  Type type;
  int32_t gated;

  int64_t outputs_per_panel() const { return gated ? kHalf : kPanel; }
  int64_t num_panels() const { return (num_outputs + outputs_per_panel() - 1) / outputs_per_panel(); }
  int64_t num_steps() const { return type == kFloat32 ? num_inputs : (num_inputs + 1) / 2; }
  int64_t column_bytes() const { return type == kInt8 ? 2 : 4; }  // of a step: a float32, or a pair of bfloat16 or int8
  int64_t scale_bytes() const { return type == kInt8 ? kPanel * sizeof(float) : 0; }
  int64_t panel_bytes() const { return scale_bytes() + num_steps() * kPanel * column_bytes(); }
};

// Half a panel of what takes an adapter's h to outputs of a product.
struct HalfPanel {
  int64_t offset;  // of its weights, in bytes
  int64_t first_input, num_inputs;  // of h; even where weights lie in pairs, and 0 where the adapter adds nothing
};

// What an adapter adds to one product, in half panels of columns: down [inputs, rank], up [rank, outputs].
struct LowRank {
  const char* down;  // null: it adds nothing
  const char* up;
  const HalfPanel* up_halves;  // two for each panel of the product
  int64_t num_inputs;
  int64_t num_halves;  // of down
  Type type;
};

// h [rows, 16 · num_halves] = x [rows, inputs] · downᵀ.
struct Shrink {
  const LowRank* weights;
  const void* x;  // of the weights' type
  int64_t num_rows;
  float* h;
};

// A run of a product's rows that one adapter changes.
struct AdaptedRows {
  int64_t first_row, num_rows;
  const LowRank* weights;
  const float* h;
};

// out [rows, outputs] = x [rows, inputs] · weightᵀ, or silu(gate) · up. x is bfloat16 or float32; float32 where the weight is.
struct Product {
  Linear weight;
  const void* x;
  Type x_type;
  void* out;
  Type out_type;
  int64_t num_rows;
  const AdaptedRows* adapted;
  int64_t num_adapted;
};

// sum = x + residual (where there is one; it is kept in `residual`), out = sum / sqrt(mean(sum²) + eps) · weight.
struct Norm {
  const float* x;
  float* residual;  // null: none
  const void* weight;
  void* out;  // of the weight's type
  Type type;
  int64_t num_columns;
  float eps;
};

// A run of one sequence's tokens; see AttentionPlan.
struct Run {
  int64_t first_row, num_tokens, start, first_block;
};

// Paged attention. A block of the cache holds P positions of each key/value head: first their keys and then their values, which
// are read together and so come from memory in one stream. Keys lie with the positions innermost, [block][head][D][P]
// (bfloat16: [block][head][D / 2][P][2]), so that scores of neighbouring positions fill a vector; values lie [block][head][P][D].
struct Attention {
  const void* qkv;  // [rows, (H + 2K) · D], before rotation
  void* out;        // [rows, H · D]
  void* keys;    // of the first head of the first block
  void* values;
  const float* cos;  // [rows, D]
  const float* sin;
  const int64_t* slots;      // [rows]
  const int64_t* blocks;     // block tables of all runs, one after another
  const int64_t* kv_of_query;  // [H]
  Type type;                 // of qkv, out and cache
  int64_t num_query_heads, num_kv_heads, head_dim, block_size;

  int64_t part_elements() const { return 2 * head_dim * block_size; }  // of a head in a block
  int64_t row_width() const { return (num_query_heads + 2 * num_kv_heads) * head_dim; }
  int64_t blocks_per_tile() const { return block_size < kTile ? kTile / block_size : 1; }
  int64_t tile() const { return blocks_per_tile() * block_size; }

  static constexpr int64_t kTile = 128;  // cached positions, about, between two corrections of the running maximum
};

// Some query heads, all of one key/value head, of some neighbouring tokens of a run: at most kQueryRows of (token, head).
struct AttentionPiece {
  Run run;
  int64_t first_token, num_tokens;  // within the run
  const int64_t* heads;
  int64_t num_heads;
  int64_t kv_head;
};
constexpr int64_t kQueryRows = 48;

struct Isa {
  const char* name;
  void (*product)(const Product&, int64_t first_panel, int64_t last_panel, char* scratch);
  int64_t (*product_scratch_bytes)(const Product&);
  void (*shrink)(const Shrink&, int64_t first_half, int64_t last_half);
  void (*norm)(const Norm&, int64_t first_row, int64_t last_row);
  void (*softmax_parts)(const float* logits, int64_t n, double* parts);  // maximum, sum of exp(logit − maximum), first index
  void (*write_cache)(const Attention&, int64_t first_row, int64_t last_row);
  void (*attend)(const Attention&, const AttentionPiece&, const AttentionPiece* next, char* scratch);
  int64_t (*attend_scratch_bytes)(const Attention&);
};

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

}  // namespace packtrain
