// The exponential function, sums and maxima over lanes, and what a softmax over a row is made of.

// x = n · ln 2 + r, exp(r) by its Taylor polynomial of degree 7 for |r| ≤ ln 2 / 2: below one unit in the last place.
inline Vec::F exponential(Vec::F x) {
  x = Vec::max(Vec::set(-87.3f), Vec::min(Vec::set(88.0f), x));  // NaN passes
  const Vec::F n = Vec::round(Vec::mul(x, Vec::set(1.44269504f)));
  const Vec::F r = Vec::fma(n, Vec::set(2.12194440e-4f), Vec::fma(n, Vec::set(-0.693359375f), x));
  Vec::F p = Vec::set(1.0f / 5040);
  constexpr float kCoefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kCoefficients) p = Vec::fma(p, r, Vec::set(c));
  return Vec::times_power_of_2(p, n);
}

// Lanes are added in their order.
inline float sum_of_lanes(Vec::F x) {
  float lanes[Vec::kLanes], sum = 0.0f;
  Vec::store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

inline float largest_of_lanes(Vec::F x) {
  float lanes[Vec::kLanes];
  Vec::store(lanes, x);
  for (int width = Vec::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}
