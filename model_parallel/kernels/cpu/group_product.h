// Products with weights in groups (operations.h: GroupFormat), and which product a weight is for.
//
// Of every group the whole numbers q are multiplied with x in chains of multiply-adds that begin at zero; its scale times that
// sum, and its minimum times the sum of the group's x, are added to the output. Order and number of these operations are the same
// whatever the number of rows, which is the whole of batch invariance here too.

// Pairs of neighbouring inputs as float32.
struct GroupFloatSteps {
  using X = float;
  struct Pair {
    Vec::F even, odd;
  };
  using Broadcast = Pair;
  static constexpr int kPairBytes = 2 * sizeof(float);  // of a column, expanded
  template <int J>
  static Pair nibble_pair(const Vec::Nibbles& n) {
    return {Vec::template even_nibble<J>(n), Vec::template odd_nibble<J>(n)};
  }
  static Pair byte_pair(const int8_t* p) {
    const Vec::Pairs pairs = Vec::pairs(p);
    return {Vec::even(pairs), Vec::odd(pairs)};
  }
  static void store(char* p, const Pair& pair) {
    Vec::store(reinterpret_cast<float*>(p), pair.even);
    Vec::store(reinterpret_cast<float*>(p) + Vec::kLanes, pair.odd);
  }
  static Pair load(const char* p) {
    return {Vec::load(reinterpret_cast<const float*>(p)), Vec::load(reinterpret_cast<const float*>(p) + Vec::kLanes)};
  }
  static Broadcast broadcast(const X* x) { return {Vec::set(x[0]), Vec::set(x[1])}; }
  static Vec::F add(const Vec::F& sum, const Broadcast& x, const Pair& w) {
    return Vec::fma(x.odd, w.odd, Vec::fma(x.even, w.even, sum));
  }
};

// As bfloat16, which holds q exactly, where the machine multiplies pairs of them.
template <class V>
struct GroupBfloat16Steps {
  using X = uint16_t;
  using Pair = typename V::Words;
  using Broadcast = typename V::Words;
  static constexpr int kPairBytes = 2 * sizeof(uint16_t);
  template <int J>
  static Pair nibble_pair(const typename V::Nibbles& n) {
    return V::template nibble_words<J>(n);
  }
  static Pair byte_pair(const int8_t* p) { return V::pairs(p); }
  static void store(char* p, const Pair& pair) { V::store_words(p, pair); }
  static Pair load(const char* p) { return V::words(p); }
  static Broadcast broadcast(const X* x) { return V::set_word(word_at(x)); }
  static typename V::F add(const typename V::F& sum, const Broadcast& x, const Pair& w) { return V::dot(sum, x, w); }
};

#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

// Sums of R rows and V vectors of columns: each in kGroupChains chains that take turns at the pairs.
template <int R, int V>
struct GroupSums {
  Vec::F of[R][V][Vec::kGroupChains];
};

template <class Steps, int J, int R, int V>
ALWAYS_INLINE void add_pair(GroupSums<R, V>& sums, const typename Steps::X* x, int64_t x_stride,
                            const typename Steps::Pair (&weights)[V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto xr = Steps::broadcast(x + r * x_stride + 2 * J);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec::F& sum = sums.of[r][v][J % Vec::kGroupChains];
      sum = Steps::add(sum, xr, weights[v]);
    }
  }
}

// Where q of a step, which is eight inputs, comes from.
template <class Steps>
struct PackedNibbles {
  static constexpr int64_t kStepBytes = kPanel * 4;
  template <int V>
  struct Step {
    Vec::Nibbles words[V];
  };
  template <int V>
  static ALWAYS_INLINE Step<V> step(const char* p, int64_t column) {
    Step<V> result;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) result.words[v] = Vec::nibbles(p + (column + v * Vec::kLanes) * 4);
    return result;
  }
  template <int J, int V>
  static ALWAYS_INLINE void pair(const Step<V>& step, typename Steps::Pair (&out)[V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out[v] = Steps::template nibble_pair<J>(step.words[v]);
  }
};

// Pairs one after another: int8 as stored, or expanded.
template <int64_t kBytes>
struct PairSteps {
  static constexpr int64_t kStepBytes = 4 * kPanel * kBytes;
  template <int V>
  struct Step {
    const char* p;
  };
  template <int V>
  static ALWAYS_INLINE Step<V> step(const char* p, int64_t column) {
    return {p + column * kBytes};
  }
};

template <class Steps>
struct PackedBytes : PairSteps<2> {
  template <int J, int V>
  static ALWAYS_INLINE void pair(const Step<V>& step, typename Steps::Pair (&out)[V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      out[v] = Steps::byte_pair(reinterpret_cast<const int8_t*>(step.p) + (J * kPanel + v * Vec::kLanes) * 2);
    }
  }
};

template <class Steps>
struct Expanded : PairSteps<Steps::kPairBytes> {
  template <int V>
  using Step = typename PairSteps<Steps::kPairBytes>::template Step<V>;
  template <int J, int V>
  static ALWAYS_INLINE void pair(const Step<V>& step, typename Steps::Pair (&out)[V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out[v] = Steps::load(step.p + (J * kPanel + v * Vec::kLanes) * Steps::kPairBytes);
  }
};

// A group's scale and, negated, its minimum, of one vector of columns.
struct GroupScale {
  Vec::F scale, minus_minimum;
};

inline Vec::F load_scales(const char* p, int64_t column, Type type) {
  if (type == kFloat32) return Vec::load(reinterpret_cast<const float*>(p) + column);
  const auto* halves = reinterpret_cast<const uint16_t*>(p) + column;
  return type == kFloat16 ? Vec::load_half(halves) : Vec::load(halves);
}

inline GroupScale load_group_scale(const GroupFormat& format, const char* span, const char* codes, int64_t column) {
  const Vec::F scale = load_scales(span, column, format.scale_type);
  switch (format.kind) {
    case kMinimums: {
      const Vec::F minimum = load_scales(span + format.scale_bytes(), column, format.scale_type);
      return {scale, Vec::mul(minimum, Vec::set(-1.0f))};
    }
    case kMinimumCodes: {
      const auto* code = reinterpret_cast<const uint8_t*>(codes) + column;
      const Vec::F minimum = load_scales(span + format.scale_bytes(), column, format.scale_type);
      return {Vec::mul(scale, Vec::load_unsigned(code)),
              Vec::mul(Vec::mul(minimum, Vec::load_unsigned(code + kPanel)), Vec::set(-1.0f))};
    }
    case kScaleCodes: {
      const Vec::F both = Vec::mul(scale, Vec::load_signed(reinterpret_cast<const int8_t*>(codes) + column));
      return {both, Vec::mul(both, Vec::set(static_cast<float>(-format.zero)))};
    }
    case kZeros: {
      const auto* zeros = reinterpret_cast<const uint8_t*>(span + format.scale_bytes()) + column;
      const Vec::F zero = Vec::add(Vec::load_unsigned(zeros), Vec::set(static_cast<float>(format.zero)));
      return {scale, Vec::mul(Vec::mul(scale, zero), Vec::set(-1.0f))};
    }
    default:
      return {scale, Vec::mul(scale, Vec::set(static_cast<float>(-format.zero)))};
  }
}

constexpr int64_t kExpandedScaleBytes = 2 * kPanel * sizeof(float);

inline GroupScale expanded_scale(const char* p, int64_t column) {
  const auto* scales = reinterpret_cast<const float*>(p) + column;
  return {Vec::load(scales), Vec::load(scales + kPanel)};
}

// Where a group lies in a panel. `codes` is null where its scales have been expanded.
struct GroupPlace {
  const char* span;
  const char* codes;
  const char* weights;
};

// `visit(place)` for the groups of spans first … last − 1.
template <class Visit>
ALWAYS_INLINE void for_each_group(const GroupFormat& format, const char* panel, int64_t first, int64_t last,
                                  const Visit& visit) {
  const char* span = panel + first * format.span_bytes();
  const int64_t header_bytes = format.span_header_bytes(), code_bytes = format.code_bytes();
  const int64_t group_bytes = format.group_bytes(), span_bytes = format.span_bytes();
  for (int64_t index = first; index < last; ++index, span += span_bytes) {
    const char* codes = span + header_bytes;
    for (int64_t group = 0; group < format.groups_per_span; ++group, codes += group_bytes) {
      visit(GroupPlace{span, codes, codes + code_bytes});
    }
  }
}

// One group of R rows: `totals` [R][kPanel] += scale · (x · q) − minimum · sum of x, for V vectors of columns from `column` on.
template <class Steps, class Source, int R, int V>
ALWAYS_INLINE void multiply_group(const typename Steps::X* x, int64_t x_stride, const float* x_sums, int64_t sums_stride,
                                  const GroupFormat& format, const GroupPlace& place, int64_t ahead_bytes, int64_t column,
                                  float* totals) {
  const char* weights = place.weights;
  GroupSums<R, V> sums;
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      for (int c = 0; c < Vec::kGroupChains; ++c) sums.of[r][v][c] = Vec::set(0.0f);
    }
  }
  const int64_t num_steps = format.group_size / 8;
  for (int64_t step = 0; step < num_steps; ++step, weights += Source::kStepBytes, x += 8) {
    if (ahead_bytes != 0) {
      for (int64_t line = 0; line < Source::kStepBytes; line += 64) __builtin_prefetch(weights + ahead_bytes + line, 0, 2);
    }
    const auto words = Source::template step<V>(weights, column);
    typename Steps::Pair pair[V];
    Source::template pair<0>(words, pair);
    add_pair<Steps, 0, R, V>(sums, x, x_stride, pair);
    Source::template pair<1>(words, pair);
    add_pair<Steps, 1, R, V>(sums, x, x_stride, pair);
    Source::template pair<2>(words, pair);
    add_pair<Steps, 2, R, V>(sums, x, x_stride, pair);
    Source::template pair<3>(words, pair);
    add_pair<Steps, 3, R, V>(sums, x, x_stride, pair);
  }
  const bool subtracts = format.subtracts();
  for (int v = 0; v < V; ++v) {
    const GroupScale scale = place.codes != nullptr ? load_group_scale(format, place.span, place.codes, column + v * Vec::kLanes)
                                                    : expanded_scale(place.span, column + v * Vec::kLanes);
    for (int r = 0; r < R; ++r) {
      Vec::F sum = sums.of[r][v][0];
      for (int c = 1; c < Vec::kGroupChains; ++c) sum = Vec::add(sum, sums.of[r][v][c]);
      float* total = totals + r * kPanel + column + v * Vec::kLanes;
      Vec::F result = Vec::fma(scale.scale, sum, Vec::load(total));
      if (subtracts) result = Vec::fma(scale.minus_minimum, Vec::set(x_sums[r * sums_stride]), result);
      Vec::store(total, result);
    }
  }
}

// Spans first … last − 1 of one panel, of R rows. `expanded`: null, or scales and q of these spans, expanded.
template <class Steps, class Source, int R>
void multiply_spans(const Product& job, int64_t row, int64_t first, int64_t last, const char* panel, const char* expanded,
                     float* totals) {
  // One row: all columns at once, in as many chains. More: as many rows as there are registers for.
  constexpr int V = R == 1 ? kPanel / Vec::kLanes : 2;
  constexpr int64_t kAhead = 4096;
  const GroupFormat& format = job.weight.groups;
  const int64_t num_inputs = format.num_inputs(), first_group = first * format.groups_per_span;
  const auto* x = static_cast<const typename Steps::X*>(job.prepared_x) + row * num_inputs + first_group * format.group_size;
  const float* x_sums = job.group_sums + row * format.num_groups + first_group;
  const auto multiply = [&](const GroupPlace& place) ALWAYS_INLINE_LAMBDA {
    for (int64_t column = 0; column < kPanel; column += V * Vec::kLanes) {
      multiply_group<Steps, Source, R, V>(x, num_inputs, x_sums, format.num_groups, format, place,
                                          expanded == nullptr && column == 0 ? kAhead : 0, column, totals);
    }
    x += format.group_size;
    ++x_sums;
  };
  if (expanded == nullptr) return for_each_group(format, panel, first, last, multiply);
  const int64_t group_bytes = format.group_size / 8 * Source::kStepBytes;
  for (int64_t group = first_group; group < last * format.groups_per_span; ++group) {
    multiply(GroupPlace{expanded, nullptr, expanded + kExpandedScaleBytes});
    expanded += kExpandedScaleBytes + group_bytes;
  }
}

template <class Steps, class Source, int R = Vec::kGroupRows>
void multiply_group_rows(int num_rows, const Product& job, int64_t row, int64_t first, int64_t last, const char* panel,
                         const char* expanded, float* totals) {
  if constexpr (R == 1) {
    multiply_spans<Steps, Source, 1>(job, row, first, last, panel, expanded, totals);
  } else if (num_rows == R) {
    multiply_spans<Steps, Source, R>(job, row, first, last, panel, expanded, totals);
  } else {
    multiply_group_rows<Steps, Source, R - 1>(num_rows, job, row, first, last, panel, expanded, totals);
  }
}

// Group after group: scales of all columns, minimums, and pairs.
template <class Steps, class Source>
void expand_groups(const GroupFormat& format, int64_t first, int64_t last, const char* panel, char* out) {
  for_each_group(format, panel, first, last, [&](const GroupPlace& place) {
    for (int64_t column = 0; column < kPanel; column += Vec::kLanes) {
      const GroupScale scale = load_group_scale(format, place.span, place.codes, column);
      Vec::store(reinterpret_cast<float*>(out) + column, scale.scale);
      Vec::store(reinterpret_cast<float*>(out) + kPanel + column, scale.minus_minimum);
    }
    out += kExpandedScaleBytes;
    const char* weights = place.weights;
    for (int64_t step = 0; step < format.group_size / 8; ++step, weights += Source::kStepBytes) {
      for (int64_t column = 0; column < kPanel; column += Vec::kLanes) {
        const auto words = Source::template step<1>(weights, column);
        typename Steps::Pair pair[1];
        char* to = out + column * Steps::kPairBytes;
        constexpr int64_t kNext = kPanel * Steps::kPairBytes;
        Source::template pair<0>(words, pair);
        Steps::store(to, pair[0]);
        Source::template pair<1>(words, pair);
        Steps::store(to + kNext, pair[0]);
        Source::template pair<2>(words, pair);
        Steps::store(to + 2 * kNext, pair[0]);
        Source::template pair<3>(words, pair);
        Steps::store(to + 3 * kNext, pair[0]);
      }
      out += Expanded<Steps>::kStepBytes;
    }
  });
}

// Spans that are expanded at a time: what all rows then read stays in a core's own cache.
inline int64_t spans_at_once(const GroupFormat& format) {
  constexpr int64_t kInputs = 1024;
  const int64_t spans = kInputs / (format.groups_per_span * format.group_size);
  return spans > 0 ? smaller(spans, format.num_groups / format.groups_per_span) : 1;
}

template <class Steps, class Source>
void multiply_grouped_panels(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  const Linear& weight = job.weight;
  const GroupFormat& format = weight.groups;
  auto* totals = reinterpret_cast<float*>(scratch);
  char* expanded = scratch + job.num_rows * kPanel * sizeof(float);
  const int64_t num_tiles = (job.num_rows + Vec::kGroupRows - 1) / Vec::kGroupRows;
  const int64_t num_spans = format.num_groups / format.groups_per_span;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const char* data = weight.panels + panel * weight.panel_bytes();
    memset(totals, 0, job.num_rows * kPanel * sizeof(float));
    if (num_tiles == 1) {
      multiply_group_rows<Steps, Source>(static_cast<int>(job.num_rows), job, 0, 0, num_spans, data, nullptr, totals);
    } else {
      const int64_t at_once = spans_at_once(format);
      for (int64_t first = 0; first < num_spans; first += at_once) {
        const int64_t last = smaller(first + at_once, num_spans);
        expand_groups<Steps, Source>(format, first, last, data, expanded);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          const int64_t row = job.num_rows * tile / num_tiles, end = job.num_rows * (tile + 1) / num_tiles;
          multiply_group_rows<Steps, Expanded<Steps>>(static_cast<int>(end - row), job, row, first, last, data, expanded,
                                                      totals + row * kPanel);
        }
      }
    }
    expand(job, panel, job.first_row, job.first_row + job.num_rows, totals);
    const int64_t first = panel * weight.outputs_per_panel(), num_outputs = weight.num_outputs - first;
    for (int64_t r = 0; r < job.num_rows; ++r) {
      const int64_t at = r * job.out_stride + first;
      if (job.out_type == kFloat32) {
        finish_row(totals + r * kPanel, weight.gated, static_cast<float*>(job.out) + at, num_outputs);
      } else {
        finish_row(totals + r * kPanel, weight.gated, static_cast<uint16_t*>(job.out) + at, num_outputs);
      }
    }
  }
}

template <class Steps>
void multiply_grouped(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  (job.weight.groups.bits == 4 ? multiply_grouped_panels<Steps, PackedNibbles<Steps>>
                               : multiply_grouped_panels<Steps, PackedBytes<Steps>>)(job, first_panel, last_panel, scratch);
}

template <class V>
void multiply_grouped_as(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  if constexpr (V::kBfloat16Dot) {
    if (job.x_type == kBfloat16) {
      return multiply_grouped<GroupBfloat16Steps<V>>(job, first_panel, last_panel, scratch);
    }
  }
  multiply_grouped<GroupFloatSteps>(job, first_panel, last_panel, scratch);
}

// One row of x as the groups have its inputs.
template <class From, class To, class Convert>
void arrange(const Linear& weight, const From* x, To* out, const Convert& convert) {
  const int64_t num_inputs = weight.groups.num_inputs();
  if (weight.order != nullptr) {
    for (int64_t i = 0; i < num_inputs; ++i) out[i] = weight.order[i] < 0 ? To{} : convert(x[weight.order[i]]);
    return;
  }
  const int64_t end = weight.num_before + weight.num_inputs;
  for (int64_t i = 0; i < weight.num_before; ++i) out[i] = To{};
  for (int64_t i = 0; i < weight.num_inputs; ++i) out[weight.num_before + i] = convert(x[i]);
  for (int64_t i = end; i < num_inputs; ++i) out[i] = To{};
}

template <class X>
void sum_groups(const GroupFormat& format, const X* x, float* sums) {
  for (int64_t group = 0; group < format.num_groups; ++group, x += format.group_size) {
    float lanes[8] = {};
    for (int64_t i = 0; i < format.group_size; i += 8) {
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += to_float(x[i + lane]);
    }
    sums[group] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
}

inline bool multiplies_bfloat16(const Product& job) { return Vec::kBfloat16Dot && job.x_type == kBfloat16; }

#undef ALWAYS_INLINE
#undef ALWAYS_INLINE_LAMBDA
