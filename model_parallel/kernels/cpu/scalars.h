// Single elements of the stored types. Like all headers of the kernels proper it is included inside a namespace of each
// isa_*.cpp, so that no instruction set's code is ever linked in another's place.

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }

inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = to_bfloat16(x); }

// The word at p, or of the lone bfloat16 that an odd row ends with.
inline uint32_t word_at(const void* p) {
  uint32_t word;
  memcpy(&word, p, sizeof word);
  return word;
}
inline uint32_t half_word_at(const void* p) {
  uint16_t half;
  memcpy(&half, p, sizeof half);
  return half;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
