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

void shrink(const Shrink& job, int64_t first, int64_t last) {
  if (job.weights->type == kFloat32) return shrink_halves<Float32Steps>(job, first, last);
  shrink_halves<Bfloat16Steps>(job, first, last);
}

}  // namespace packtrain
