// The softmax and the gradient of a cross-entropy in place of its logits; a row stays in the cache.
#include "cpu.h"

namespace {

using namespace lag;

constexpr long kGrain = 1L << 16;  // logits that are worth a thread
constexpr long kBlock = 1024;  // exponentials that are summed in fp32, then in fp64

template <typename T>
void row_statistics(const T* row, long columns, float* top, float* total, float* exponentials) {
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (long i = 0; i < columns; ++i) highest = std::max(highest, widen(row[i]));
  double sum = 0.0, sum_exp = 0.0;
  for (long from = 0; from < columns; from += kBlock) {
    const long to = std::min(from + kBlock, columns);
    float part = 0.0f, part_exp = 0.0f;
#pragma omp simd reduction(+ : part, part_exp)
    for (long i = from; i < to; ++i) {
      const float below = widen(row[i]) - highest;
      part += below;
      part_exp += exponential(below);
    }
    sum += part;
    sum_exp += part_exp;
  }
  *top = highest;
  *total = static_cast<float>(sum);
  *exponentials = static_cast<float>(sum_exp);
}

template <typename T>
void statistics(const T* logits, long stride, long rows, long columns, const int64_t* place,
                const bool* is_mine, float* found, int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const T* row = logits + r * stride;
      row_statistics(row, columns, found + r, found + 2 * rows + r, found + 3 * rows + r);
      found[rows + r] = is_mine[r] ? widen(row[place[r]]) - found[r] : 0.0f;
    }
  });
}

template <typename T>
void gradient(T* logits, long stride, long rows, long columns, const int64_t* place,
              const float* numbers, int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const float top = numbers[r], factor = numbers[rows + r], even = numbers[2 * rows + r];
      T* row = logits + r * stride;
      const float label = exponential(widen(row[place[r]]) - top) * factor - even;
#pragma omp simd
      for (long i = 0; i < columns; ++i)
        narrow(exponential(widen(row[i]) - top) * factor - even, row + i);
      narrow(label + numbers[3 * rows + r], row + place[r]);
    }
  });
}

}  // namespace

// found is (4, rows): the largest logit; relative to it the label's, or 0, the sum of all, and the
// sum of their exponentials.
extern "C" void lag_softmax_statistics(const void* logits, int are_bf16, long stride, long rows,
                                       long columns, const int64_t* place, const bool* is_mine,
                                       float* found, int threads) {
  if (are_bf16)
    statistics(static_cast<const uint16_t*>(logits), stride, rows, columns, place, is_mine, found,
               threads);
  else
    statistics(static_cast<const float*>(logits), stride, rows, columns, place, is_mine, found,
               threads);
}

// numbers is (4, rows): top, factor, even, taken.
extern "C" void lag_softmax_gradient(void* logits, int are_bf16, long stride, long rows,
                                     long columns, const int64_t* place, const float* numbers,
                                     int threads) {
  if (are_bf16)
    gradient(static_cast<uint16_t*>(logits), stride, rows, columns, place, numbers, threads);
  else
    gradient(static_cast<float*>(logits), stride, rows, columns, place, numbers, threads);
}
