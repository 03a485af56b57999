// The softmax of attention in place of its scores, and of its gradient in place of the weights'.
#include "cpu.h"

namespace {

using namespace lag;

constexpr long kGrain = 1L << 16;  // scores that are worth a thread

// Where the scores (batch, heads, length, columns) are hidden: bytes by strides, which may be 0, or
// null; if causal, also what comes after a row's own position.
struct Mask {
  const uint8_t* hidden;
  long of_batch, of_head, of_row, of_column;
  bool causal;
};

template <typename T>
void row_softmax(T* row, long seen, long columns, const uint8_t* hidden, long step, float scale) {
  float highest = -INFINITY;
  if (hidden)
    for (long i = 0; i < seen; ++i)
      if (hidden[i * step]) narrow(-INFINITY, row + i);
#pragma omp simd reduction(max : highest)
  for (long i = 0; i < seen; ++i) highest = std::max(highest, widen(row[i]));
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < seen; ++i) sum += exponential((widen(row[i]) - highest) * scale);
  const float share_of_one = 1.0f / sum;
#pragma omp simd
  for (long i = 0; i < seen; ++i)
    narrow(exponential((widen(row[i]) - highest) * scale) * share_of_one, row + i);
  for (long i = seen; i < columns; ++i) narrow(0.0f, row + i);
}

template <typename T>
void softmax(T* scores, long heads, long length, long columns, long rows, Mask mask, float scale,
             int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const long place = r % length, head = r / length % heads, batch = r / length / heads;
      const uint8_t* hidden = mask.hidden;
      if (hidden) hidden += batch * mask.of_batch + head * mask.of_head + place * mask.of_row;
      const long seen = mask.causal ? std::min(place + 1, columns) : columns;
      row_softmax(scores + r * columns, seen, columns, hidden, mask.of_column, scale);
    }
  });
}

template <typename T>
void softmax_back(const T* weights, T* grad, long columns, long rows, float scale, int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const T* w = weights + r * columns;
      T* g = grad + r * columns;
      float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
      for (long i = 0; i < columns; ++i) mean += widen(w[i]) * widen(g[i]);
#pragma omp simd
      for (long i = 0; i < columns; ++i)
        narrow(widen(w[i]) * (widen(g[i]) - mean) * scale, g + i);
    }
  });
}

}  // namespace

extern "C" void lag_attention_softmax(void* scores, int are_bf16, long heads, long length,
                                      long columns, long rows, const uint8_t* hidden,
                                      long of_batch, long of_head, long of_row, long of_column,
                                      int causal, float scale, int threads) {
  const Mask mask{hidden, of_batch, of_head, of_row, of_column, causal != 0};
  if (are_bf16)
    softmax(static_cast<uint16_t*>(scores), heads, length, columns, rows, mask, scale, threads);
  else
    softmax(static_cast<float*>(scores), heads, length, columns, rows, mask, scale, threads);
}

extern "C" void lag_attention_softmax_back(const void* weights, void* grad, int are_bf16,
                                           long columns, long rows, float scale, int threads) {
  if (are_bf16)
    softmax_back(static_cast<const uint16_t*>(weights), static_cast<uint16_t*>(grad), columns, rows,
                 scale, threads);
  else
    softmax_back(static_cast<const float*>(weights), static_cast<float*>(grad), columns, rows,
                 scale, threads);
}
