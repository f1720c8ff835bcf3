// Sixteen lanes with AVX-512. Included under `#pragma GCC target`, after <immintrin.h>; vector_avx512_bf16.h and
// vector_avx512_plain.h add what depends on bfloat16 products.
// A "word" is what one lane of a stored matrix holds: a float32, or a pair of bfloat16.

struct Vec512 {
  static constexpr int kLanes = 16;
  static constexpr int kProductRows = 12;   // rows × 2 accumulators
  static constexpr int kAttentionRows = 6;  // rows × 4 accumulators
  static constexpr int kGroupRows = 6;      // rows × 4 accumulators
  static constexpr int kGroupChains = 2;
  using F = __m512;
  using Words = __m512i;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F keep(F x, int64_t n, float rest) { return _mm512_mask_blend_ps(first(n), set(rest), x); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b when either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power_of_2(F x, F n) { return _mm512_scalef_ps(x, n); }

  static Words words(const void* p) { return _mm512_loadu_si512(p); }
  static Words words(const void* p, int64_t n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static Words set_word(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static F as_floats(Words w) { return _mm512_castsi512_ps(w); }
  static F even(Words w) { return as_floats(_mm512_slli_epi32(w, 16)); }
  static F odd(Words w) { return as_floats(_mm512_and_si512(w, set_word(0xffff0000))); }
  static F load(const uint16_t* p) {
    return even(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static F load(const uint16_t* p, int64_t n) {
    return even(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)));
  }
  // Of IEEE float16.
  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_unsigned(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_signed(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Eight whole numbers of four bits a lane: even inputs 0 2 4 6 and then odd ones.
  using Nibbles = Words;
  static Nibbles nibbles(const void* p) { return words(p); }
  static F whole_numbers(Words low_bits) {  // of the lowest four bits of each lane
    const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(low_bits, table);
  }
  template <int J>
  static F even_nibble(Nibbles n) {
    return whole_numbers(J == 0 ? n : _mm512_srli_epi32(n, 4 * J));
  }
  template <int J>
  static F odd_nibble(Nibbles n) {
    return whole_numbers(_mm512_srli_epi32(n, 16 + 4 * J));
  }
};
