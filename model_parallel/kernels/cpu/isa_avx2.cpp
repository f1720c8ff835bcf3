#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "operations.h"
#pragma GCC target("avx2,fma,f16c")
namespace packtrain {
namespace {
#include "scalars.h"
#include "vector_avx2.h"
#include "softmax.h"
#include "product.h"
#include "group_product.h"
#include "norm.h"
#include "attention.h"
}  // namespace
const Isa kAvx2 = make_isa("avx2");
}  // namespace packtrain
#endif
