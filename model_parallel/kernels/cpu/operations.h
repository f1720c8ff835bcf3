// What each instruction set implements (operations.cpp) and api.cpp calls, with the data that operations work on.
#pragma once

#include <cstdint>

namespace packtrain {

enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFloat16 = 3, kGroups = 4 };

// Columns of a weight panel, in two halves. A panel holds, for every step (an input feature; for bfloat16 and int8 a pair of
// them), the weights of the first half's columns and then of the second's. So a product reads a panel from front to back.
// Plain: the halves are neighbouring outputs. Gated: the first half is of the gate, the second the same outputs of the up
// projection, so that silu(gate) · up is at hand in registers. A panel of int8 begins with a float32 for each of its columns,
// by which the whole column is multiplied.
constexpr int64_t kHalf = 16;
constexpr int64_t kPanel = 2 * kHalf;

// How the weights of a group come out of its whole numbers q: w = scale · q − minimum.
enum GroupKind : int32_t {
  kFixedZero = 0,     // minimum = scale · zero
  kZeros = 1,         // minimum = scale · (zero + the group's own zero)
  kMinimums = 2,      // minimum is stored
  kScaleCodes = 3,    // scale = code · the span's scale (signed codes), minimum = scale · zero
  kMinimumCodes = 4,  // scale = code · the span's scale, minimum = code · the span's minimum (unsigned codes)
};

// Weights of 4 bits (q from 0 to 15) or 8 (q from −128 to 127) in groups of neighbouring inputs. A span is the groups that share a
// scale; without codes it is one group. A panel holds, span after span: its columns' scales, minimums and zeros where the kind has
// them, and of each of its groups first the codes and then q. Those of 8 bits lie as in an int8 panel. Those of 4 lie in words of
// eight inputs of a column, the even ones in the lower half: 0 2 4 6 1 3 5 7 from the lowest bits on.
struct GroupFormat {
  int32_t bits;
  int32_t kind;
  Type scale_type;  // of scales and minimums: float32, bfloat16 or float16
  int32_t zero;
  int64_t group_size;  // a multiple of 8
  int64_t num_groups;
  int64_t groups_per_span;

  int64_t num_inputs() const { return num_groups * group_size; }
  int64_t scale_bytes() const { return kPanel * (scale_type == kFloat32 ? 4 : 2); }
  bool has_minimums() const { return kind == kMinimums || kind == kMinimumCodes; }
  bool subtracts() const { return kind != kFixedZero && kind != kScaleCodes ? true : zero != 0; }
  int64_t span_header_bytes() const { return scale_bytes() * (has_minimums() ? 2 : 1) + (kind == kZeros ? kPanel : 0); }
  int64_t code_bytes() const { return kind == kMinimumCodes ? 2 * kPanel : kind == kScaleCodes ? kPanel : 0; }
  int64_t group_bytes() const { return code_bytes() + group_size * kPanel * bits / 8; }
  int64_t span_bytes() const { return span_header_bytes() + groups_per_span * group_bytes(); }
  int64_t panel_bytes() const { return num_groups / groups_per_span * span_bytes(); }
};

struct Linear {
  const char* panels;
  int64_t num_inputs;
  int64_t num_outputs;  // of a gated one: columns of gate, which are as many of up
  Type type;
  int32_t gated;
  GroupFormat groups;  // of type kGroups
  int64_t num_before;  // inputs of the first group that x does not have; it may lack some of the last group too
  const int32_t* order;  // null, or where in x each input of the groups is, −1: nowhere. Then num_before is 0.

  int64_t outputs_per_panel() const { return gated ? kHalf : kPanel; }
  int64_t num_panels() const { return (num_outputs + outputs_per_panel() - 1) / outputs_per_panel(); }
  int64_t num_steps() const { return type == kFloat32 ? num_inputs : (num_inputs + 1) / 2; }
  int64_t column_bytes() const { return type == kInt8 ? 2 : 4; }  // of a step: a float32, or a pair of bfloat16 or int8
  int64_t scale_bytes() const { return type == kInt8 ? kPanel * sizeof(float) : 0; }
  int64_t panel_bytes() const {
    return type == kGroups ? groups.panel_bytes() : scale_bytes() + num_steps() * kPanel * column_bytes();
  }
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
  const void* x;
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
  int64_t first_row;   // that the step's rows of adapters are counted from
  int64_t first_half;  // of the adapters' half panels, where the outputs are a part of the product's
  int64_t out_stride;  // elements from one row's outputs to the next's
  // Of weights in groups, whose rows are prepared first: x with all inputs of the groups [rows, groups.num_inputs()], and the sum of
  // each group's [rows, groups.num_groups].
  // Or of others, where the instruction set widens x: x as float32.
  void* prepared_x;
  float* group_sums;
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

// Where one row's sum of value / temperature and noise may be highest; kernels/randomness.py decides among these places.
struct Draw {
  const void* values;
  const bool* forbidden;  // places that are not taken, or null
  bool is_double;         // or float32
  double temperature;
  uint64_t key;
  int64_t num_values, first_id;
  int64_t* found;  // their number, 0 where it cannot be told, and the places: [1 + kMostDraws]
};
constexpr int64_t kMostDraws = 7;
constexpr int64_t draw_scratch_bytes(const Draw& job) {
  return job.forbidden == nullptr ? 0 : job.num_values * static_cast<int64_t>(job.is_double ? sizeof(double) : sizeof(float));
}
constexpr double kDrawBins = 4.0;    // to a unit
constexpr double kMostNoise = 37.0;  // of a hash of 52 bits

struct Isa {
  // It multiplies bfloat16 as float32: x of a product with many rows is converted once, and not again for each panel.
  bool widens_x;
  void (*product)(const Product&, int64_t first_panel, int64_t last_panel, char* scratch);
  int64_t (*product_scratch_bytes)(const Product&);
  void (*prepare_rows)(const Product&, int64_t first_row, int64_t last_row);
  // Half panels of some runs' h, counted from the first run's first. x_type: bfloat16 or float32; float32 where the weights are.
  void (*shrink)(const Shrink* runs, Type x_type, int64_t first_half, int64_t last_half);
  void (*norm)(const Norm&, int64_t first_row, int64_t last_row);
  void (*softmax_parts)(const float* logits, int64_t n, double* parts);  // maximum, sum of exp(logit − maximum), first index
  // least_hashes: by bins of noise, the least hash that may give as much. scratch: of draw_scratch_bytes.
  void (*draw)(const Draw&, const int64_t* least_hashes, char* scratch);
  void (*write_cache)(const Attention&, int64_t first_row, int64_t last_row);
  void (*attend)(const Attention&, const AttentionPiece&, const AttentionPiece* next, char* scratch);
  int64_t (*attend_scratch_bytes)(const Attention&);
};

}  // namespace packtrain
