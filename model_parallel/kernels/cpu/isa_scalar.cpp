#include <cstring>

#include "operations.h"
namespace packtrain {
namespace {
#include "scalars.h"
#include "vector_scalar.h"
#include "softmax.h"
#include "product.h"
#include "group_product.h"
#include "norm.h"
#include "attention.h"
}  // namespace
const Isa kScalar = make_isa("scalar");
}  // namespace packtrain
