// Eight lanes with AVX2 and FMA. Included under `#pragma GCC target`, after <immintrin.h>. See vector_avx512.h.

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kProductRows = 5;
  static constexpr int kAttentionRows = 2;
  static constexpr int kGroupRows = 4;
  static constexpr int kGroupChains = 1;
  static constexpr bool kBfloat16Dot = false;
  static constexpr bool kWidensX = true;
  using F = __m256;
  using Words = __m256i;

  static __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? static_cast<int>(n) : 8), lane);
  }

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F keep(F x, int64_t n, float rest) { return _mm256_blendv_ps(set(rest), x, _mm256_castsi256_ps(first(n))); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power_of_2(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  static Words words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Words words(const void* p, int64_t n) { return _mm256_maskload_epi32(static_cast<const int*>(p), first(n)); }
  static Words set_word(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static F as_floats(Words w) { return _mm256_castsi256_ps(w); }
  static F even(Words w) { return as_floats(_mm256_slli_epi32(w, 16)); }
  static F odd(Words w) { return as_floats(_mm256_and_si256(w, set_word(0xffff0000))); }
  static F dot(F sum, Words a, Words b) { return fma(odd(a), odd(b), fma(even(a), even(b), sum)); }
  // Two int8 a lane.
  struct Pairs {
    F even, odd;
  };
  static Pairs pairs(const int8_t* p) {
    const __m256i both = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i first = _mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24), second = _mm256_srai_epi32(both, 8);
    return {_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second)};
  }
  static F even(const Pairs& pairs) { return pairs.even; }
  static F odd(const Pairs& pairs) { return pairs.odd; }
  static F dot(F sum, Words a, const Pairs& b) { return fma(odd(a), b.odd, fma(even(a), b.even, sum)); }
  static F load(const uint16_t* p) {
    return even(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load(const uint16_t* p, int64_t n) {
    uint16_t lanes[8] = {};
    memcpy(lanes, p, (n < 8 ? n : 8) * sizeof(uint16_t));
    return load(lanes);
  }
  static void store(uint16_t* p, F x) { store(p, x, 8); }
  static void store(uint16_t* p, F x, int64_t n) {
    float lanes[8];
    uint16_t rounded[8];
    store(lanes, x);
    for (int i = 0; i < 8; ++i) rounded[i] = to_bfloat16(lanes[i]);
    memcpy(p, rounded, (n < 8 ? n : 8) * sizeof(uint16_t));
  }
  // Of IEEE float16.
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_unsigned(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_signed(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Eight whole numbers of four bits a lane, even inputs 0 2 4 6 and then odd ones: apart, in the lower four bits of bytes.
  struct Nibbles {
    Words lower, upper;
  };
  static Nibbles nibbles(const void* p) {
    const Words both = words(p), mask = set_word(0x0f0f0f0f);
    return {_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi32(both, 4), mask)};
  }
  template <int kByte>
  static F byte_of(Words w) {  // of each lane, as a whole number
    if constexpr (kByte == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(w, 24));
    constexpr auto at = [](int lane) { return static_cast<int>(0x80808000u) + kByte + 4 * lane; };
    const Words places = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(0), at(1), at(2), at(3));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(w, places));
  }
  template <int J>
  static F even_nibble(const Nibbles& n) {
    return byte_of<J / 2>(J % 2 ? n.upper : n.lower);
  }
  template <int J>
  static F odd_nibble(const Nibbles& n) {
    return byte_of<2 + J / 2>(J % 2 ? n.upper : n.lower);
  }
};
