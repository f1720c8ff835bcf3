// With bfloat16 products. Included after vector_avx512.h.

struct Vec : Vec512 {
  static constexpr bool kBfloat16Dot = true;
  static constexpr bool kWidensX = false;
  static F dot(F sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Two int8 a lane, as bfloat16, which holds them exactly.
  using Pairs = Words;
  static Pairs pairs(const int8_t* p) {
    const auto floats = [](const int8_t* q) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
    };
    return reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(floats(p + kLanes), floats(p)));
  }
  // Input 2 J of each lane, and 2 J + 1, as a pair of bfloat16.
  template <int J>
  static Words nibble_words(Nibbles n) {
    // By the lowest five bits of each half lane; the fifth belongs to a neighbour and must not matter.
    alignas(64) static constexpr uint16_t kTable[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    return _mm512_permutexvar_epi16(J == 0 ? n : _mm512_srli_epi16(n, 4 * J), _mm512_load_si512(kTable));
  }
  static void store_words(char* p, Words w) { _mm512_storeu_si512(p, w); }
  using Vec512::store;
  static void store(uint16_t* p, F x) { store(p, x, 16); }
  static void store(uint16_t* p, F x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
};
