#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "operations.h"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
namespace packtrain {
namespace {
#include "scalars.h"
#include "vector_avx512.h"
#include "vector_avx512_plain.h"
#include "softmax.h"
#include "product.h"
#include "group_product.h"
#include "norm.h"
#include "attention.h"
}  // namespace
const Isa kAvx512 = make_isa("avx512");
}  // namespace packtrain
#endif
