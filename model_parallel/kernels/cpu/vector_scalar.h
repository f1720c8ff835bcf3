// Four lanes in plain C++, which the compiler may put into whatever vectors the machine has. See vector_avx512.h.

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kProductRows = 2;
  static constexpr int kAttentionRows = 1;
  static constexpr int kGroupRows = 2;
  static constexpr int kGroupChains = 1;
  static constexpr bool kBfloat16Dot = false;
  static constexpr bool kWidensX = true;
  struct F {
    float lane[kLanes];
  };
  struct Words {
    uint32_t lane[kLanes];
  };

  template <class Function>
  static F each(Function value) {
    F result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = value(i);
    return result;
  }

  static F set(float x) { return each([=](int) { return x; }); }
  static F load(const float* p) { return load(p, kLanes); }
  static F load(const float* p, int64_t n) {
    return each([=](int i) { return i < n ? p[i] : 0.0f; });
  }
  static void store(float* p, const F& x) { store(p, x, kLanes); }
  static void store(float* p, const F& x, int64_t n) { memcpy(p, x.lane, (n < kLanes ? n : kLanes) * sizeof(float)); }
  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(const F& a, const F& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static F keep(const F& x, int64_t n, float rest) {
    return each([&](int i) { return i < n ? x.lane[i] : rest; });
  }
  static F max(const F& a, const F& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F min(const F& a, const F& b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F round(const F& x) {
    return each([&](int i) { return __builtin_rintf(x.lane[i]); });
  }
  static F times_power_of_2(const F& x, const F& n) {
    // A NaN among n has come from x, where it remains.
    return each([&](int i) { return x.lane[i] * power_of_2(n.lane[i] == n.lane[i] ? static_cast<int>(n.lane[i]) : 0); });
  }
  static float power_of_2(int n) {
    const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  static Words words(const void* p) { return words(p, kLanes); }
  static Words words(const void* p, int64_t n) {
    Words result{};
    memcpy(result.lane, p, (n < kLanes ? n : kLanes) * sizeof(uint32_t));
    return result;
  }
  static Words set_word(uint32_t w) { return {w, w, w, w}; }
  static F as_floats(const Words& w) {
    F result;
    memcpy(result.lane, w.lane, sizeof result);
    return result;
  }
  static F even(const Words& w) { return as_floats({w.lane[0] << 16, w.lane[1] << 16, w.lane[2] << 16, w.lane[3] << 16}); }
  static F odd(const Words& w) {
    constexpr uint32_t mask = 0xffff0000;
    return as_floats({w.lane[0] & mask, w.lane[1] & mask, w.lane[2] & mask, w.lane[3] & mask});
  }
  static F dot(const F& sum, const Words& a, const Words& b) { return fma(odd(a), odd(b), fma(even(a), even(b), sum)); }
  // Two int8 a lane.
  struct Pairs {
    F even, odd;
  };
  static Pairs pairs(const int8_t* p) {
    return {each([=](int i) { return static_cast<float>(p[2 * i]); }),
            each([=](int i) { return static_cast<float>(p[2 * i + 1]); })};
  }
  static F even(const Pairs& pairs) { return pairs.even; }
  static F odd(const Pairs& pairs) { return pairs.odd; }
  static F dot(const F& sum, const Words& a, const Pairs& b) { return fma(odd(a), b.odd, fma(even(a), b.even, sum)); }
  static F load(const uint16_t* p) { return load(p, kLanes); }
  static F load(const uint16_t* p, int64_t n) {
    return each([=](int i) { return i < n ? to_float(p[i]) : 0.0f; });
  }
  static void store(uint16_t* p, const F& x) { store(p, x, kLanes); }
  static void store(uint16_t* p, const F& x, int64_t n) {
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_bfloat16(x.lane[i]);
  }
  static F load_half(const uint16_t* p) {
    return each([=](int i) { return half_to_float(p[i]); });
  }
  static F load_unsigned(const uint8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
  }
  static F load_signed(const int8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
  }
  // Eight whole numbers of four bits a lane: even inputs 0 2 4 6 and then odd ones.
  using Nibbles = Words;
  static Nibbles nibbles(const void* p) { return words(p); }
  template <int J>
  static F even_nibble(const Nibbles& n) {
    return each([&](int i) { return static_cast<float>(n.lane[i] >> (4 * J) & 15); });
  }
  template <int J>
  static F odd_nibble(const Nibbles& n) {
    return each([&](int i) { return static_cast<float>(n.lane[i] >> (16 + 4 * J) & 15); });
  }
};
