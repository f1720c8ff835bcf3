// The instruction set that a library of operations is compiled for: products.cpp, group_products.cpp and operations.cpp, which
// are compiled once for each (model_parallel/native.py). They are several files because each takes a core many seconds.
#pragma once

#include <cstring>

#if !defined(ISA_SCALAR)
#include <immintrin.h>
#endif

#include "operations.h"

#if defined(ISA_AVX2)
#pragma GCC target("avx2,fma,f16c")
#elif defined(ISA_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#elif defined(ISA_AVX512_BF16)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

namespace packtrain {
namespace {
#include "scalars.h"
#if defined(ISA_SCALAR)
#include "vector_scalar.h"
#elif defined(ISA_AVX2)
#include "vector_avx2.h"
#elif defined(ISA_AVX512)
#include "vector_avx512.h"
#include "vector_avx512_plain.h"
#elif defined(ISA_AVX512_BF16)
#include "vector_avx512.h"
#include "vector_avx512_bf16.h"
#endif
#include "softmax.h"
}  // namespace

// Panels first_panel … last_panel − 1 of a product; of weights in groups, and of all others.
void multiply_plain(const Product&, int64_t first_panel, int64_t last_panel, char* scratch);
void multiply_groups(const Product&, int64_t first_panel, int64_t last_panel, char* scratch);
int64_t plain_scratch_bytes(const Product&);
int64_t groups_scratch_bytes(const Product&);
// Into prepared_x.
void arrange_rows(const Product&, int64_t first_row, int64_t last_row);
void widen_rows(const Product&, int64_t first_row, int64_t last_row);
void shrink(const Shrink* runs, Type x_type, int64_t first_half, int64_t last_half);

}  // namespace packtrain
