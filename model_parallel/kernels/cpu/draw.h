// Which tokens may have the highest sum of value and Gumbel noise (kernels/randomness.py).
//
// The noise −log(−log(u)) of a token is a function of a hash of its id, and grows with it. A token whose value is d below the best sum
// that is known needs noise of d at least, thus a hash of some size at least: so hashes alone rule out nearly all tokens, and
// logarithms are taken of a few.

inline uint64_t hash_of(uint64_t key, int64_t token_id) {
  uint64_t z = key + (static_cast<uint64_t>(token_id) + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return (z ^ z >> 31) >> 12;
}

inline double noise_of(uint64_t hash) {
  return -__builtin_log(-__builtin_log((static_cast<double>(hash) + 0.5) * 0x1p-52));
}

// Tokens that may have the highest sum, with their sums.
struct Survivors {
  double best = -__builtin_inf();
  int64_t count = 0;
  int64_t places[kMostDraws];
  double sums[kMostDraws];

  // What is computed here and what decides in the end may differ in their last digits.
  double least() const { return best - 1e-6 - 1e-9 * __builtin_fabs(best); }
  void drop_lower() {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (sums[i] >= least()) places[kept] = places[i], sums[kept++] = sums[i];
    }
    count = kept;
  }
  // False when there are too many.
  bool add(int64_t place, double sum) {
    if (!(sum >= least())) return true;
    if (sum > best) best = sum;
    if (count == kMostDraws) drop_lower();
    if (count == kMostDraws) return false;
    places[count] = place, sums[count++] = sum;
    return true;
  }
};

template <class T>
T largest_of(const T* values, int64_t count) {
  constexpr int kChains = 32;  // a processor does not wait for one of them
  T largest[kChains];
  for (T& chain : largest) chain = values[0];
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int c = 0; c < kChains; ++c) largest[c] = values[i + c] > largest[c] ? values[i + c] : largest[c];
  }
  for (; i < count; ++i) largest[0] = values[i] > largest[0] ? values[i] : largest[0];
  for (const T chain : largest) largest[0] = chain > largest[0] ? chain : largest[0];
  return largest[0];
}

template <class T>
void draw_from(const Draw& job, const int64_t* least_hashes, const T* values) {
  constexpr int64_t kBlock = 256;
  const double bins = kDrawBins / job.temperature;
  const T largest = largest_of(values, job.num_values);
  int64_t top = 0;
  while (top < job.num_values - 1 && values[top] != largest) ++top;
  Survivors survivors;
  const auto sum_of = [&](int64_t place, uint64_t hash) {
    return static_cast<double>(values[place]) / job.temperature + noise_of(hash);
  };
  survivors.best = sum_of(top, hash_of(job.key, job.first_id + top));
  for (int64_t begin = 0; begin < job.num_values; begin += kBlock) {
    const int64_t size = smaller(kBlock, job.num_values - begin);
    const T* block = values + begin;
    const double best = survivors.best * kDrawBins;
    int64_t hashes[kBlock];
    for (int64_t i = 0; i < size; ++i) hashes[i] = static_cast<int64_t>(hash_of(job.key, job.first_id + begin + i));
    const auto may_win = [&](int64_t i) {
      double missing = best - static_cast<double>(block[i]) * bins;
      missing = missing < kDrawBins * kMostNoise ? missing : kDrawBins * kMostNoise;  // and where it is not a number
      missing = missing > 0.0 ? missing : 0.0;
      return hashes[i] >= least_hashes[static_cast<int32_t>(missing)];
    };
    int64_t num_left = 0;
    for (int64_t i = 0; i < size; ++i) num_left += may_win(i);
    for (int64_t i = 0; num_left > 0; ++i) {
      if (!may_win(i)) continue;
      --num_left;
      if (!survivors.add(begin + i, sum_of(begin + i, static_cast<uint64_t>(hashes[i])))) {
        job.found[0] = 0;
        return;
      }
    }
  }
  survivors.drop_lower();
  job.found[0] = survivors.count;
  for (int64_t i = 0; i < survivors.count; ++i) job.found[1 + i] = survivors.places[i];
}

template <class T>
void draw_of(const Draw& job, const int64_t* least_hashes, T* scratch) {
  const auto* values = static_cast<const T*>(job.values);
  if (job.forbidden != nullptr) {
    for (int64_t i = 0; i < job.num_values; ++i) scratch[i] = job.forbidden[i] ? -__builtin_inff() : values[i];
    values = scratch;
  }
  draw_from(job, least_hashes, values);
}

void draw(const Draw& job, const int64_t* least_hashes, char* scratch) {
  if (job.is_double) return draw_of(job, least_hashes, reinterpret_cast<double*>(scratch));
  draw_of(job, least_hashes, reinterpret_cast<float*>(scratch));
}
