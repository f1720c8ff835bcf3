// What adapters add to products: for some rows h = x · downᵀ and then h · upᵀ, with an adapter of each run of rows.
//
// Both matrices lie in half panels of 16 columns. As in product.h, every output is one chain of multiply-adds over the inputs in
// their order, whatever stands beside it.

// R rows times H half panels, each with an x of its own. `add`: the sums are added to what `out` holds.
template <class Steps, int R, int H>
void multiply_halves(const typename Steps::X* const* x, int64_t x_stride, int64_t num_steps, const char* const* halves,
                     bool add, float* const* out, int64_t out_stride) {
  constexpr int kColumn = Steps::kColumnBytes;
  for (int column = 0; column < kHalf; column += Vec::kLanes) {
    Vec::F sum[R][H];
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < H; ++h) sum[r][h] = Vec::set(0.0f);
    }
    for (int64_t step = 0; step < num_steps; ++step) {
      const int64_t at = (step * kHalf + column) * kColumn, input = step * Steps::kInputs;
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const auto weights = Steps::weights(halves[h] + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r][h] = Steps::add(sum[r][h], Steps::broadcast(x[h] + r * x_stride + input), weights);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < H; ++h) {
        float* to = out[h] + r * out_stride + column;
        Vec::store(to, add ? Vec::add(Vec::load(to), sum[r][h]) : sum[r][h]);
      }
    }
  }
}

template <class Steps, int H, int R = 4>
void multiply_halves_of_rows(int64_t num_rows, const typename Steps::X* const* x, int64_t x_stride, int64_t num_steps,
                             const char* const* halves, bool add, float* const* out, int64_t out_stride) {
  const typename Steps::X* row_x[H];
  float* row_out[H];
  int64_t row = 0;
  for (; row + R <= num_rows; row += R) {
    for (int h = 0; h < H; ++h) row_x[h] = x[h] + row * x_stride, row_out[h] = out[h] + row * out_stride;
    multiply_halves<Steps, R, H>(row_x, x_stride, num_steps, halves, add, row_out, out_stride);
  }
  if constexpr (R > 1) {
    if (row < num_rows) {
      for (int h = 0; h < H; ++h) row_x[h] = x[h] + row * x_stride, row_out[h] = out[h] + row * out_stride;
      multiply_halves_of_rows<Steps, H, R / 2>(num_rows - row, row_x, x_stride, num_steps, halves, add, row_out, out_stride);
    }
  }
}

// Half panels first … last − 1 of h. An odd number of inputs was packed with a zero, and x is read as far as its rows go.
template <class Steps>
void shrink_halves(const Shrink& job, int64_t first, int64_t last) {
  using X = typename Steps::X;
  const LowRank& weights = *job.weights;
  const int64_t num_steps = weights.num_inputs / Steps::kInputs, bytes = num_steps * kHalf * Steps::kColumnBytes;
  const int64_t rest = weights.num_inputs % Steps::kInputs;
  const int64_t stride = bytes + (rest ? kHalf * Steps::kColumnBytes : 0);
  const auto* x = static_cast<const X*>(job.x);
  const int64_t h_stride = weights.num_halves * kHalf;
  for (int64_t half = first; half < last; half += 2) {
    const bool is_pair = half + 1 < last;
    const char* halves[2] = {weights.down + half * stride, weights.down + (half + 1) * stride};
    const X* inputs[2] = {x, x};
    float* out[2] = {job.h + half * kHalf, job.h + (half + 1) * kHalf};
    (is_pair ? multiply_halves_of_rows<Steps, 2> : multiply_halves_of_rows<Steps, 1>)(
        job.num_rows, inputs, weights.num_inputs, num_steps, halves, false, out, h_stride);
    if (rest == 0) continue;
    for (int64_t h = half; h < half + 1 + is_pair; ++h) {  // the last input, by itself
      const char* step = weights.down + h * stride + bytes;
      for (int64_t row = 0; row < job.num_rows; ++row) {
        const auto last_x = Steps::broadcast_last(x + (row + 1) * weights.num_inputs - 1);
        for (int column = 0; column < kHalf; column += Vec::kLanes) {
          float* to = job.h + row * h_stride + h * kHalf + column;
          Vec::store(to, Steps::add(Vec::load(to), last_x, Steps::weights(step + column * Steps::kColumnBytes)));
        }
      }
    }
  }
}

// Adds h · upᵀ to the sums of one panel's columns, of rows `row` … `end` − 1 of the product.
template <class Steps>
void expand_panel(const AdaptedRows& run, int64_t half, int64_t row, int64_t end, float* sums) {
  const int64_t first = run.first_row > row ? run.first_row : row;
  const int64_t last = smaller(run.first_row + run.num_rows, end);
  if (first >= last) return;
  const HalfPanel* both = run.weights->up_halves + half;
  const int64_t h_stride = run.weights->num_halves * kHalf;
  const float* h = run.h + (first - run.first_row) * h_stride;
  const char* halves[2] = {run.weights->up + both[0].offset, run.weights->up + both[1].offset};
  const float* inputs[2] = {h + both[0].first_input, h + both[1].first_input};
  float* out[2] = {sums + (first - row) * kPanel, sums + (first - row) * kPanel + kHalf};
  const int64_t steps[2] = {both[0].num_inputs / Steps::kInputs, both[1].num_inputs / Steps::kInputs};
  if (steps[0] == steps[1] && steps[0] > 0) {
    multiply_halves_of_rows<Steps, 2>(last - first, inputs, h_stride, steps[0], halves, true, out, kPanel);
    return;
  }
  for (int i = 0; i < 2; ++i) {
    if (steps[i] == 0) continue;
    multiply_halves_of_rows<Steps, 1>(last - first, inputs + i, h_stride, steps[i], halves + i, true, out + i, kPanel);
  }
}

inline void expand(const Product& job, int64_t panel, int64_t row, int64_t end, float* sums) {
  for (const AdaptedRows* run = job.adapted; run < job.adapted + job.num_adapted; ++run) {
    (run->weights->type == kFloat32 ? expand_panel<Float32Steps> : expand_panel<MixedSteps>)(*run, job.first_half + panel * 2, row, end, sums);
  }
}
