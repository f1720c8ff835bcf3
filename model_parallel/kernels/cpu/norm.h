// RMSNorm with the addition before it.

template <class T>
void norm_row(const float* x, float* residual, const T* weight, T* out, int64_t n, float eps) {
  Vec::F squares = Vec::set(0.0f);
  for (int64_t c = 0; c < n; c += Vec::kLanes) {
    Vec::F value = Vec::load(x + c, n - c);
    if (residual != nullptr) {
      value = Vec::add(value, Vec::load(residual + c, n - c));
      Vec::store(residual + c, value, n - c);
    }
    squares = Vec::fma(value, value, squares);
  }
  const float* values = residual != nullptr ? residual : x;
  const Vec::F scale = Vec::set(1.0f / __builtin_sqrtf(sum_of_lanes(squares) / static_cast<float>(n) + eps));
  for (int64_t c = 0; c < n; c += Vec::kLanes) {
    const Vec::F scaled = Vec::mul(Vec::load(values + c, n - c), scale);
    Vec::store(out + c, Vec::mul(scaled, Vec::load(weight + c, n - c)), n - c);
  }
}

template <class T>
void norm_rows(const Norm& job, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t at = row * job.num_columns;
    float* residual = job.residual == nullptr ? nullptr : job.residual + at;
    T* out = static_cast<T*>(job.out) + at;
    norm_row(job.x + at, residual, static_cast<const T*>(job.weight), out, job.num_columns, job.eps);
  }
}
