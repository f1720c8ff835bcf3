// Single elements of the stored types. Like all headers of the kernels proper it is included inside an unnamed namespace, after
// the instruction set has been chosen.

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

// Of IEEE float16. Its exponent and mantissa, moved, are a float32 that is 2^-112 times the value.
inline float half_to_float(uint16_t half) {
  const uint32_t rest = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float value, scale;
  const uint32_t power = 0x77800000;
  memcpy(&value, &rest, sizeof value);
  memcpy(&scale, &power, sizeof scale);
  value *= scale;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (rest > 0x0f7fffff) bits = rest | 0x7f800000;  // infinite, or NaN
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
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
