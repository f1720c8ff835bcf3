// Products with weights in groups.
#include "isa.h"

namespace packtrain {
namespace {
#include "product.h"
#include "group_product.h"
}  // namespace

void multiply_groups(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  multiply_grouped_as<Vec>(job, first_panel, last_panel, scratch);
}

void arrange_rows(const Product& job, int64_t first_row, int64_t last_row) {
  const Linear& weight = job.weight;
  const int64_t num_inputs = weight.groups.num_inputs();
  for (int64_t row = first_row; row < last_row; ++row) {
    const auto* halves = static_cast<const uint16_t*>(job.x) + row * weight.num_inputs;
    float* sums = job.group_sums + row * weight.groups.num_groups;
    if (multiplies_bfloat16(job)) {
      uint16_t* out = static_cast<uint16_t*>(job.prepared_x) + row * num_inputs;
      arrange(weight, halves, out, [](uint16_t x) { return x; });
      if (weight.groups.subtracts()) sum_groups(weight.groups, out, sums);
      continue;
    }
    float* out = static_cast<float*>(job.prepared_x) + row * num_inputs;
    if (job.x_type == kFloat32) {
      arrange(weight, static_cast<const float*>(job.x) + row * weight.num_inputs, out, [](float x) { return x; });
    } else {
      arrange(weight, halves, out, [](uint16_t x) { return to_float(x); });
    }
    if (weight.groups.subtracts()) sum_groups(weight.groups, out, sums);
  }
}

int64_t groups_scratch_bytes(const Product& job) {
  const int64_t totals = job.num_rows * kPanel * sizeof(float);
  if (job.num_rows <= Vec::kGroupRows) return totals;
  const GroupFormat& format = job.weight.groups;
  const int64_t groups = spans_at_once(format) * format.groups_per_span;
  return totals + groups * (kExpandedScaleBytes + format.group_size * kPanel * static_cast<int64_t>(sizeof(float)));
}

}  // namespace packtrain
