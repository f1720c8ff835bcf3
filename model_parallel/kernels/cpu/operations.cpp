// Everything but products, and the table that api.cpp calls by.
#include "isa.h"

namespace packtrain {
namespace {
#include "norm.h"
#include "attention.h"
#include "draw.h"

void norm(const Norm& job, int64_t first_row, int64_t last_row) {
  if (job.type == kFloat32) return norm_rows<float>(job, first_row, last_row);
  norm_rows<uint16_t>(job, first_row, last_row);
}

// Sums of kChunk lanes' worth are made in float32 and added in float64.
void softmax_parts(const float* logits, int64_t n, double* parts) {
  constexpr float kLowest = -__builtin_inff();
  constexpr int64_t kChunk = 64 * Vec::kLanes;
  Vec::F largest = Vec::set(kLowest);
  for (int64_t c = 0; c < n; c += Vec::kLanes) {
    largest = Vec::max(largest, Vec::keep(Vec::load(logits + c, n - c), n - c, kLowest));
  }
  const float maximum = largest_of_lanes(largest);
  int64_t index = 0;
  while (index < n - 1 && logits[index] != maximum) ++index;
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    Vec::F sums = Vec::set(0.0f);
    for (int64_t c = begin; c < smaller(begin + kChunk, n); c += Vec::kLanes) {
      const Vec::F weight = exponential(Vec::add(Vec::load(logits + c, n - c), Vec::set(-maximum)));
      sums = Vec::add(sums, Vec::keep(weight, n - c, 0.0f));
    }
    total += sum_of_lanes(sums);
  }
  parts[0] = maximum;
  parts[1] = total;
  parts[2] = static_cast<double>(index);
}

void write_cache(const Attention& job, int64_t first_row, int64_t last_row) {
  if (job.type == kFloat32) return write_rows<float>(job, first_row, last_row);
  write_rows<uint16_t>(job, first_row, last_row);
}

void attend(const Attention& job, const AttentionPiece& piece, const AttentionPiece* next, char* scratch) {
  if (job.type == kFloat32) return attend_piece<float>(job, piece, next, scratch);
  attend_piece<uint16_t>(job, piece, next, scratch);
}

// At least what PieceMemory takes.
int64_t attend_scratch_bytes(const Attention& job) {
  const int64_t row = sizeof(Running) + (job.head_dim * 2 + job.tile() + 2 * Vec::kLanes) * sizeof(float);
  return kQueryRows * row + job.tile() * (sizeof(KeyLanes) + 2 * sizeof(void*)) + 7 * 64;
}

void product(const Product& job, int64_t first_panel, int64_t last_panel, char* scratch) {
  (job.weight.type == kGroups ? multiply_groups : multiply_plain)(job, first_panel, last_panel, scratch);
}

void prepare_rows(const Product& job, int64_t first_row, int64_t last_row) {
  (job.weight.type == kGroups ? arrange_rows : widen_rows)(job, first_row, last_row);
}

int64_t product_scratch_bytes(const Product& job) {
  return (job.weight.type == kGroups ? groups_scratch_bytes : plain_scratch_bytes)(job);
}

constexpr Isa kOperations = {Vec::kWidensX, product, product_scratch_bytes, prepare_rows, shrink,
                             norm,          softmax_parts, draw,            write_cache,  attend,
                             attend_scratch_bytes};
}  // namespace
}  // namespace packtrain

extern "C" __attribute__((visibility("default"))) const packtrain::Isa* packtrain_operations() {
  return &packtrain::kOperations;
}
