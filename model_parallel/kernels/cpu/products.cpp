// Products with weights that are not in groups, and the first half of what adapters add to any.
#include "isa.h"

namespace packtrain {
namespace {
#include "product.h"
}  // namespace

void multiply_plain(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  auto* sums = reinterpret_cast<float*>(scratch);
  const bool is_float = job.x_type == kFloat32;
  if (job.weight.type == kFloat32) {
    multiply_panels<Float32Steps>(job, first_panel, last_panel, sums);
  } else if (expands(job)) {
    (is_float ? multiply_expanded_panels<MixedSteps> : multiply_expanded_panels<Bfloat16Steps>)(job, first_panel,
                                                                                                last_panel, sums);
  } else if (job.weight.type == kInt8) {
    (is_float ? multiply_panels<Int8MixedSteps> : multiply_panels<Int8Steps>)(job, first_panel, last_panel, sums);
  } else {
    (is_float ? multiply_panels<MixedSteps> : multiply_panels<Bfloat16Steps>)(job, first_panel, last_panel, sums);
  }
}

int64_t plain_scratch_bytes(const Product& job) {
  return kSumFloats * sizeof(float) + (expands(job) ? job.weight.num_steps() * kPanel * 4 : 0);
}

void widen_rows(const Product& job, int64_t first_row, int64_t last_row) {
  const int64_t num_inputs = job.weight.num_inputs, begin = first_row * num_inputs, end = last_row * num_inputs;
  const auto* x = static_cast<const uint16_t*>(job.x);
  auto* out = static_cast<float*>(job.prepared_x);
  int64_t i = begin;
  for (; i + Vec::kLanes <= end; i += Vec::kLanes) Vec::store(out + i, Vec::load(x + i));
  for (; i < end; ++i) out[i] = to_float(x[i]);
}

void shrink(const Shrink* runs, Type x_type, int64_t first, int64_t last) {
  const bool is_float = x_type == kFloat32;
  if (runs->weights->type == kFloat32) return shrink_halves<Float32Steps>(runs, first, last);
  (is_float ? shrink_halves<MixedSteps> : shrink_halves<Bfloat16Steps>)(runs, first, last);
}

}  // namespace packtrain
