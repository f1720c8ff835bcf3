// What adapters add to products: for some rows h = x · downᵀ and then h · upᵀ, with an adapter of each run of rows.
//
// Both matrices lie in half panels of 16 columns. As in product.h, every output is one chain of multiply-adds over the inputs in
// their order, whatever stands beside it. Few rows have few chains, and a processor waits for each link of a chain: so half panels of
// several adapters are taken together.

// Rows of x times half a panel.
template <class Steps>
struct HalfProduct {
  const typename Steps::X* x;
  int64_t x_stride;
  int64_t num_rows;
  int64_t num_steps;
  const char* weights;
  float* out;

  bool is_like(const HalfProduct& other) const {
    return num_rows == other.num_rows && num_steps == other.num_steps && x_stride == other.x_stride;
  }
};

// What a product of half panels does with its sums: h is written, and what `up` gives is added to the sums of a panel.
enum class HalfSums { kWritten, kAdded };

constexpr int64_t kAheadBytesOfDown = 1024;

// R rows, from `row` on, of H products that are alike.
template <class Steps, HalfSums kSums, int R, int H>
void multiply_halves(const HalfProduct<Steps>* halves, int64_t row, int64_t out_stride) {
  constexpr int kStepBytes = kHalf * Steps::kColumnBytes;
  const int64_t num_steps = halves->num_steps, x_stride = halves->x_stride;
  // What is fetched from memory meanwhile: in `down` what comes next; in `up` the same half of the next panel, which lies behind both
  // halves of this one.
  const int64_t ahead_bytes = kSums == HalfSums::kAdded ? 2 * num_steps * kStepBytes : kAheadBytesOfDown;
  const typename Steps::X* x[H];
  for (int h = 0; h < H; ++h) x[h] = halves[h].x + row * x_stride;
  for (int column = 0; column < kHalf; column += Vec::kLanes) {
    const char* weights[H];
    for (int h = 0; h < H; ++h) weights[h] = halves[h].weights + column * Steps::kColumnBytes;
    Vec::F sum[R][H];
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < H; ++h) sum[r][h] = Vec::set(0.0f);
    }
    for (int64_t step = 0; step < num_steps; ++step) {
      const int64_t at = step * kStepBytes, soon = at + ahead_bytes;
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        __builtin_prefetch(weights[h] + soon, 0, 2);
        const auto step_weights = Steps::weights(weights[h] + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r][h] = Steps::add(sum[r][h], Steps::broadcast(x[h] + r * x_stride + step * Steps::kInputs), step_weights);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < H; ++h) {
        float* to = halves[h].out + (row + r) * out_stride + column;
        Vec::store(to, kSums == HalfSums::kAdded ? Vec::add(Vec::load(to), sum[r][h]) : sum[r][h]);
      }
    }
  }
}

template <class Steps, HalfSums kSums, int H, int R>
void multiply_rows_of_halves(const HalfProduct<Steps>* halves, int64_t row, int64_t out_stride) {
  for (; row + R <= halves->num_rows; row += R) multiply_halves<Steps, kSums, R, H>(halves, row, out_stride);
  if constexpr (R > 1) {
    if (row < halves->num_rows) multiply_rows_of_halves<Steps, kSums, H, R / 2>(halves, row, out_stride);
  }
}

// Eight chains at a time, where so many products are alike.
template <HalfSums kSums, class Steps>
void multiply_halves(const HalfProduct<Steps>* halves, int64_t count, int64_t out_stride) {
  while (count > 0) {
    const int64_t most = smaller(count, halves->num_rows < 4 ? 4 : 2);
    int64_t num_alike = 1;
    while (num_alike < most && halves[num_alike].is_like(*halves)) ++num_alike;
    if (num_alike == 4) {
      multiply_rows_of_halves<Steps, kSums, 4, 2>(halves, 0, out_stride);
    } else if (num_alike > 1) {
      num_alike = 2;
      multiply_rows_of_halves<Steps, kSums, 2, 4>(halves, 0, out_stride);
    } else {
      multiply_rows_of_halves<Steps, kSums, 1, 4>(halves, 0, out_stride);
    }
    halves += num_alike;
    count -= num_alike;
  }
}

constexpr int64_t kHalvesAtOnce = 16;

// Half panels first … last − 1 of h of all runs, counted from the first run's first. An odd number of inputs was packed with a zero,
// and x is read as far as its rows go.
template <class Steps>
void shrink_halves(const Shrink* run, int64_t first, int64_t last) {
  using X = typename Steps::X;
  const int64_t num_inputs = run->weights->num_inputs;
  const int64_t num_steps = num_inputs / Steps::kInputs, rest = num_inputs % Steps::kInputs;
  const int64_t bytes = num_steps * kHalf * Steps::kColumnBytes, stride = bytes + (rest ? kHalf * Steps::kColumnBytes : 0);
  for (; first >= run->weights->num_halves; ++run) first -= run->weights->num_halves, last -= run->weights->num_halves;
  while (first < last) {
    HalfProduct<Steps> halves[kHalvesAtOnce];
    int64_t count = 0;
    const int64_t h_stride = run->weights->num_halves * kHalf;
    do {
      const LowRank& weights = *run->weights;
      halves[count++] = {static_cast<const X*>(run->x), num_inputs, run->num_rows, num_steps, weights.down + first * stride,
                         run->h + first * kHalf};
      if (++first == weights.num_halves) first = 0, last -= weights.num_halves, ++run;
    } while (first < last && count < kHalvesAtOnce && run->weights->num_halves * kHalf == h_stride);
    multiply_halves<HalfSums::kWritten>(halves, count, h_stride);
    if (rest == 0) continue;
    for (const HalfProduct<Steps>* half = halves; half < halves + count; ++half) {  // the last input, by itself
      for (int64_t row = 0; row < half->num_rows; ++row) {
        const auto last_x = Steps::broadcast_last(half->x + (row + 1) * num_inputs - 1);
        for (int column = 0; column < kHalf; column += Vec::kLanes) {
          float* to = half->out + row * h_stride + column;
          const auto weights = Steps::weights(half->weights + bytes + column * Steps::kColumnBytes);
          Vec::store(to, Steps::add(Vec::load(to), last_x, weights));
        }
      }
    }
  }
}

// Adds h · upᵀ to the sums of one panel's columns, of rows `row` … `end` − 1 of the step.
template <class Steps>
void expand_panel(const Product& job, int64_t panel, int64_t row, int64_t end, float* sums) {
  HalfProduct<Steps> halves[kHalvesAtOnce];
  int64_t count = 0;
  for (const AdaptedRows* run = job.adapted; run < job.adapted + job.num_adapted; ++run) {
    const int64_t first = run->first_row > row ? run->first_row : row;
    const int64_t last = smaller(run->first_row + run->num_rows, end);
    if (first >= last) continue;
    const LowRank& weights = *run->weights;
    const int64_t h_stride = weights.num_halves * kHalf;
    const float* h = run->h + (first - run->first_row) * h_stride;
    for (int i = 0; i < 2; ++i) {
      const HalfPanel& half = weights.up_halves[job.first_half + panel * 2 + i];
      if (half.num_inputs == 0) continue;
      halves[count++] = {h + half.first_input, h_stride, last - first, half.num_inputs / Steps::kInputs, weights.up + half.offset,
                         sums + (first - row) * kPanel + i * kHalf};
    }
    if (count + 2 > kHalvesAtOnce) {
      multiply_halves<HalfSums::kAdded>(halves, count, kPanel);
      count = 0;
    }
  }
  multiply_halves<HalfSums::kAdded>(halves, count, kPanel);
}

inline void expand(const Product& job, int64_t panel, int64_t row, int64_t end, float* sums) {
  if (job.num_adapted == 0) return;
  (job.adapted->weights->type == kFloat32 ? expand_panel<Float32Steps> : expand_panel<MixedSteps>)(job, panel, row, end, sums);
}
