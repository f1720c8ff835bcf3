// Rotary embedding, the paged cache, and attention over it.
//
// The cache is read once, from blocks that lie anywhere, so memory would be waited for at each. Hence every tile fetches what is
// read next, the piece's next tile or the first one of the next piece, line by line beside its own.
//
// Attention goes over the cached positions in tiles of a fixed number, with a running maximum and sum for every row (online
// softmax, Milakov & Gimelshein 2018; Dao et al. 2022). A row takes part in a tile only up to its own position, so what it
// computes does not depend on the rows that share the tile, and nothing after it in the cache is ever read into it.

template <class T>
constexpr int64_t kElementsPerWord = 4 / sizeof(T);

// The two halves of a head are the coordinates of D / 2 rotations.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t dim, T* out) {
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float first = to_float(x[d]), second = to_float(x[d + half]);
    put(out + d, first * cos[d] - second * sin[d]);
    put(out + d + half, second * cos[d + half] + first * sin[d + half]);
  }
}

template <class T>
void write_rows(const Attention& job, int64_t first_row, int64_t last_row) {
  const int64_t dim = job.head_dim, size = job.block_size, heads = job.num_kv_heads, part = job.part_elements();
  constexpr int64_t kPair = kElementsPerWord<T>;
  T* keys = static_cast<T*>(job.keys);
  T* values = static_cast<T*>(job.values);
  for (int64_t row = first_row; row < last_row; ++row) {
    const T* key = static_cast<const T*>(job.qkv) + row * job.row_width() + job.num_query_heads * dim;
    const T* value = key + heads * dim;
    const float *cos = job.cos + row * dim, *sin = job.sin + row * dim;
    const int64_t block = job.slots[row] / size, offset = job.slots[row] % size;
    for (int64_t h = 0; h < heads; ++h) {
      T* cached = keys + (block * heads + h) * part + offset * kPair;
      const T* x = key + h * dim;
      for (int64_t d = 0, half = dim / 2; d < half; ++d) {
        const float first = to_float(x[d]), second = to_float(x[d + half]);
        const int64_t e = d + half;
        put(cached + d / kPair * size * kPair + d % kPair, first * cos[d] - second * sin[d]);
        put(cached + e / kPair * size * kPair + e % kPair, second * cos[e] + first * sin[e]);
      }
      memcpy(values + (block * heads + h) * part + offset * dim, value + h * dim, dim * sizeof(T));
    }
  }
}

// Neighbouring cached positions of one block whose scores fill a vector.
struct KeyLanes {
  const char* keys;
  const char* next_keys;  // what is fetched meanwhile
  int64_t num_lanes;
  int64_t position;  // of the first, within the tile
};

// A row's softmax so far.
struct Running {
  float maximum;
  float sums[Vec::kLanes];  // of exp(score − maximum), by lane
};

// Memory of one piece, carved out of a thread's scratch.
template <class T>
struct PieceMemory {
  int64_t out_width, score_width;  // floats of a row
  Running* running;
  KeyLanes* lanes;
  const T **values, **next_values;  // by block of the tile
  float *out, *scores;
  T* queries;

  PieceMemory(const Attention& job, char* memory)
      : out_width((job.head_dim + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes), score_width(job.tile() + Vec::kLanes) {
    const int64_t lanes_per_block = (job.block_size + Vec::kLanes - 1) / Vec::kLanes;
    take(memory, running, kQueryRows);
    take(memory, lanes, job.blocks_per_tile() * lanes_per_block);
    take(memory, values, job.blocks_per_tile());
    take(memory, next_values, job.blocks_per_tile());
    take(memory, out, kQueryRows * out_width);
    take(memory, scores, kQueryRows * score_width);
    take(memory, queries, kQueryRows * job.head_dim);
  }

  template <class Element>
  static void take(char*& memory, Element*& part, int64_t count) {
    part = reinterpret_cast<Element*>(memory);
    memory += round_up(count * sizeof(Element));
  }
  static int64_t round_up(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }
};

inline Vec::F add_score(Vec::F sum, Vec::Words query, Vec::Words key, const uint16_t*) {
  return Vec::dot(sum, query, key);
}
inline Vec::F add_score(Vec::F sum, Vec::Words query, Vec::Words key, const float*) {
  return Vec::fma(Vec::as_floats(query), Vec::as_floats(key), sum);
}

// Scores of R rows, from `row` on, at N vectors of positions. What lies past a vector's lanes is overwritten by the next
// vector or not read.
template <class T, int R, int N>
void score(const Attention& job, const PieceMemory<T>& s, int64_t row, const KeyLanes* lanes) {
  const int64_t dim = job.head_dim;
  const T* queries = s.queries + row * dim;
  const Vec::F scale = Vec::set(1.0f / __builtin_sqrtf(static_cast<float>(dim)));
  Vec::F sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sum[r][n] = Vec::set(0.0f);
  }
  for (int64_t d = 0, at = 0; d < dim; d += kElementsPerWord<T>, at += job.block_size * 4) {
    Vec::Words key[N];
    for (int n = 0; n < N; ++n) key[n] = Vec::words(lanes[n].keys + at, lanes[n].num_lanes);
    for (int n = 0; n < N; ++n) __builtin_prefetch(lanes[n].next_keys + at, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec::Words query = Vec::set_word(word_at(queries + r * dim + d));
      for (int n = 0; n < N; ++n) sum[r][n] = add_score(sum[r][n], query, key[n], queries);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* scores = s.scores + (row + r) * s.score_width;
    for (int n = 0; n < N; ++n) Vec::store(scores + lanes[n].position, Vec::mul(sum[r][n], scale));
  }
}

template <class T, int R>
void score_rows(const Attention& job, const PieceMemory<T>& s, int64_t row, int64_t num_lanes) {
  int64_t n = 0;
  for (; n + 4 <= num_lanes; n += 4) score<T, R, 4>(job, s, row, s.lanes + n);
  for (; n < num_lanes; ++n) score<T, R, 1>(job, s, row, s.lanes + n);
}

// Adds to N vectors, from d on, of what R rows put out: their weights of positions begin … end − 1 times the values there.
template <class T, int R, int N>
void add_values(const Attention& job, const PieceMemory<T>& s, int64_t row, int64_t d, int64_t begin, int64_t end) {
  const int64_t dim = job.head_dim, size = job.block_size;
  const float* weights = s.scores + row * s.score_width;
  float* out = s.out + row * s.out_width + d;
  Vec::F sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sum[r][n] = Vec::load(out + r * s.out_width + n * Vec::kLanes);
  }
  for (int64_t j = begin; j < end;) {
    const T* value = s.values[j / size] + j % size * dim + d;
    const T* next_value = s.next_values[j / size] + j % size * dim + d;
    for (const int64_t stop = smaller(end, (j / size + 1) * size); j < stop; ++j, value += dim, next_value += dim) {
      for (int64_t line = 0; line < N * Vec::kLanes; line += 64 / sizeof(T)) __builtin_prefetch(next_value + line, 0, 2);
      Vec::F v[N];
      for (int n = 0; n < N; ++n) v[n] = N == 1 ? Vec::load(value, dim - d) : Vec::load(value + n * Vec::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec::F weight = Vec::set(weights[r * s.score_width + j]);
        for (int n = 0; n < N; ++n) sum[r][n] = Vec::fma(weight, v[n], sum[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) Vec::store(out + r * s.out_width + n * Vec::kLanes, sum[r][n]);
  }
}

template <class T, int R>
void add_values_to_rows(const Attention& job, const PieceMemory<T>& s, int64_t row, int64_t begin, int64_t end) {
  int64_t d = 0;
  for (; d + 4 * Vec::kLanes <= job.head_dim; d += 4 * Vec::kLanes) add_values<T, R, 4>(job, s, row, d, begin, end);
  for (; d < job.head_dim; d += Vec::kLanes) add_values<T, R, 1>(job, s, row, d, begin, end);
}

// The next n scores become exp(score − maximum); sums and `out` are corrected to the new maximum.
inline void soften(float* scores, int64_t n, Running& row, float* out, int64_t out_width) {
  constexpr float kLowest = -__builtin_inff();
  Vec::F largest = Vec::set(kLowest);
  for (int64_t c = 0; c < n; c += Vec::kLanes) {
    largest = Vec::max(largest, Vec::keep(Vec::load(scores + c), n - c, kLowest));
  }
  const float tile_maximum = largest_of_lanes(largest);
  const float maximum = tile_maximum > row.maximum ? tile_maximum : row.maximum;
  const Vec::F correction = exponential(Vec::set(row.maximum - maximum));
  Vec::F sums = Vec::mul(Vec::load(row.sums), correction);
  for (int64_t c = 0; c < n; c += Vec::kLanes) {
    const Vec::F weight = exponential(Vec::add(Vec::load(scores + c), Vec::set(-maximum)));
    Vec::store(scores + c, weight);
    sums = Vec::add(sums, Vec::keep(weight, n - c, 0.0f));
  }
  row.maximum = maximum;
  Vec::store(row.sums, sums);
  for (int64_t d = 0; d < out_width; d += Vec::kLanes) Vec::store(out + d, Vec::mul(Vec::load(out + d), correction));
}

// Rows first … last − 1 of a piece against one tile, R at a time, so that they share what is read. num_seen: how many of the
// tile's positions each row attends to; it never falls from row to row.
template <class T, int R>
void attend_rows(const Attention& job, const PieceMemory<T>& s, int64_t first, int64_t last, const int64_t* num_seen,
                 int64_t num_lanes) {
  int64_t row = first;
  for (; row + R <= last; row += R) {
    score_rows<T, R>(job, s, row, num_lanes);
    for (int64_t r = row; r < row + R; ++r) {
      soften(s.scores + r * s.score_width, num_seen[r], s.running[r], s.out + r * s.out_width, s.out_width);
    }
    add_values_to_rows<T, R>(job, s, row, 0, num_seen[row]);
    for (int64_t r = row + 1; r < row + R; ++r) add_values_to_rows<T, 1>(job, s, r, num_seen[row], num_seen[r]);
  }
  if constexpr (R > 1) {
    if (row < last) attend_rows<T, R - 1>(job, s, row, last, num_seen, num_lanes);
  }
}

// Elements before the keys of the piece's head in the block that holds position `start` of its run.
inline int64_t block_at(const Attention& job, const AttentionPiece& piece, int64_t start) {
  const int64_t block = job.blocks[piece.run.first_block + start / job.block_size];
  return (block * job.num_kv_heads + piece.kv_head) * job.part_elements();
}

inline int64_t context_of(const AttentionPiece& piece) { return piece.run.start + piece.first_token + piece.num_tokens; }

template <class T>
void attend_piece(const Attention& job, const AttentionPiece& piece, const AttentionPiece* next, char* memory) {
  PieceMemory<T> s(job, memory);
  const int64_t dim = job.head_dim, size = job.block_size, num_rows = piece.num_tokens * piece.num_heads;
  const int64_t first_row = piece.run.first_row + piece.first_token;
  const int64_t first_position = piece.run.start + piece.first_token;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t token = first_row + row / piece.num_heads, head = piece.heads[row % piece.num_heads];
    const T* query = static_cast<const T*>(job.qkv) + token * job.row_width() + head * dim;
    rotate(query, job.cos + token * dim, job.sin + token * dim, dim, s.queries + row * dim);
    s.running[row] = {-__builtin_inff(), {}};
  }
  memset(s.out, 0, num_rows * s.out_width * sizeof(float));

  const int64_t context = context_of(piece);
  for (int64_t start = 0; start < context; start += job.tile()) {
    const int64_t num_positions = smaller(job.tile(), context - start);
    int64_t num_lanes = 0;
    for (int64_t b = 0; b * size < num_positions; ++b) {
      const int64_t position = start + b * size, at = block_at(job, piece, position);
      int64_t next_at = at;
      if (position + job.tile() < context) {
        next_at = block_at(job, piece, position + job.tile());
      } else if (next != nullptr && b * size < context_of(*next)) {
        next_at = block_at(job, *next, b * size);
      }
      s.values[b] = static_cast<const T*>(job.values) + at;
      s.next_values[b] = static_cast<const T*>(job.values) + next_at;
      const char* keys = reinterpret_cast<const char*>(static_cast<const T*>(job.keys) + at);
      const char* next_keys = reinterpret_cast<const char*>(static_cast<const T*>(job.keys) + next_at);
      for (int64_t c = 0; c < smaller(size, num_positions - b * size); c += Vec::kLanes) {
        s.lanes[num_lanes++] = {keys + c * 4, next_keys + c * 4, smaller(Vec::kLanes, size - c), b * size + c};
      }
    }
    int64_t num_seen[kQueryRows];
    for (int64_t row = 0; row < num_rows; ++row) {
      num_seen[row] = smaller(num_positions, first_position + row / piece.num_heads - start + 1);
    }
    // Tokens that lie before this tile have done with it.
    const int64_t first = start > first_position ? (start - first_position) * piece.num_heads : 0;
    attend_rows<T, Vec::kAttentionRows>(job, s, first, num_rows, num_seen, num_lanes);
  }

  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t token = first_row + row / piece.num_heads, head = piece.heads[row % piece.num_heads];
    T* out = static_cast<T*>(job.out) + (token * job.num_query_heads + head) * dim;
    const Vec::F scale = Vec::set(1.0f / sum_of_lanes(Vec::load(s.running[row].sums)));
    for (int64_t d = 0; d < dim; d += Vec::kLanes) {
      Vec::store(out + d, Vec::mul(Vec::load(s.out + row * s.out_width + d), scale), dim - d);
    }
  }
}
