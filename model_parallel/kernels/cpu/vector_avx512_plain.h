// On processors that have AVX-512 and no bfloat16 products. Included after vector_avx512.h.

struct Vec : Vec512 {
  static constexpr bool kBfloat16Dot = false;
  static constexpr bool kWidensX = true;
  static F dot(F sum, Words a, Words b) { return fma(odd(a), odd(b), fma(even(a), even(b), sum)); }
  // Two int8 a lane.
  struct Pairs {
    F even, odd;
  };
  static Pairs pairs(const int8_t* p) {
    const Words both = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const Words first = _mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24), second = _mm512_srai_epi32(both, 8);
    return {_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(second)};
  }
  using Vec512::even;
  using Vec512::odd;
  static F even(const Pairs& pairs) { return pairs.even; }
  static F odd(const Pairs& pairs) { return pairs.odd; }
  static F dot(F sum, Words a, const Pairs& b) { return fma(odd(a), b.odd, fma(even(a), b.even, sum)); }
  using Vec512::store;
  static void store(uint16_t* p, F x) { store(p, x, 16); }
  static void store(uint16_t* p, F x, int64_t n) {
    // To nearest, ties to even; NaN stays NaN.
    const Words bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_word(1));
    const Words rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, set_word(0x7fff))), 16);
    const Words quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), set_word(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet)));
  }
};
