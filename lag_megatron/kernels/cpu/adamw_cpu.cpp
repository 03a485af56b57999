// The one-pass AdamW and the norm before it on a CPU; loops are left for the compiler to vectorise.
#include "cpu.h"

namespace {

using namespace lag;

constexpr long kBlock = 4096;  // elements whose squares are summed in fp32, then in fp64

struct Rates {
  float keep, rest1, beta2, rest2, eps;
};

struct Scalars {
  float scale, step_size, correction;
};

// Products and sums in the order of torch's own vectorised kernel, which gives the same bits.
template <typename G, typename W>
void update(float* __restrict__ master, float* __restrict__ exp_avg,
            float* __restrict__ exp_avg_sq, const G* __restrict__ gradient,
            W* __restrict__ weights, long count, Scalars s, Rates r) {
#pragma omp simd
  for (long i = 0; i < count; ++i) {
    const float g = widen(gradient[i]) * s.scale;
    const float m = std::fma(r.rest1, g - exp_avg[i], exp_avg[i]);
    const float v = std::fma(r.rest2 * g, g, exp_avg_sq[i] * r.beta2);
    const float p = master[i] * r.keep - s.step_size * m / (std::sqrt(v) / s.correction + r.eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = p;
    narrow(p, weights + i);
  }
}

template <typename G>
double squares(const G* values, long count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < count; ++i) sum += widen(values[i]) * widen(values[i]);
  return sum;
}

template <typename G, typename W>
void run(float* master, float* exp_avg, float* exp_avg_sq, W* weights, const void** parts,
         const long* lengths, int count, Scalars s, Rates r, int threads) {
  long total = 0;
  for (int n = 0; n < count; ++n) total += lengths[n];
  share(total, 1L << 16, threads, [=](long first, long last) {
    long start = 0;
    for (int n = 0; n < count; start += lengths[n++]) {
      const long from = std::max(first, start), to = std::min(last, start + lengths[n]);
      if (from < to)
        update(master + from, exp_avg + from, exp_avg_sq + from,
               static_cast<const G*>(parts[n]) + (from - start), weights + from, to - from, s, r);
    }
  });
}

template <typename G>
double norm(const void** parts, const long* lengths, int count, int threads) {
  std::vector<std::pair<const G*, long>> blocks;
  for (int n = 0; n < count; ++n)
    for (long from = 0; from < lengths[n]; from += kBlock)
      blocks.emplace_back(static_cast<const G*>(parts[n]) + from,
                          std::min(kBlock, lengths[n] - from));
  std::vector<double> sums(blocks.size());
  share(blocks.size(), 16, threads, [&](long first, long last) {
    for (long b = first; b < last; ++b) sums[b] = squares(blocks[b].first, blocks[b].second);
  });
  double sum = 0.0;  // in this order whatever the number of threads
  for (double part : sums) sum += part;
  return sum;
}

}  // namespace

// parts are the gradient, one after the other, of fp32 or bf16; they cover the partition.
extern "C" void lag_adamw(float* master, float* exp_avg, float* exp_avg_sq, void* weights,
                          int weights_are_bf16, const void** parts, const long* lengths, int count,
                          int gradient_is_bf16, float scale, float step_size, float correction,
                          float keep, float rest1, float beta2, float rest2, float eps,
                          int threads) {
  const Scalars s{scale, step_size, correction};
  const Rates r{keep, rest1, beta2, rest2, eps};
  auto* narrow_weights = static_cast<uint16_t*>(weights);
  auto* wide_weights = static_cast<float*>(weights);
  if (gradient_is_bf16 && weights_are_bf16)
    run<uint16_t>(master, exp_avg, exp_avg_sq, narrow_weights, parts, lengths, count, s, r, threads);
  else if (gradient_is_bf16)
    run<uint16_t>(master, exp_avg, exp_avg_sq, wide_weights, parts, lengths, count, s, r, threads);
  else if (weights_are_bf16)
    run<float>(master, exp_avg, exp_avg_sq, narrow_weights, parts, lengths, count, s, r, threads);
  else
    run<float>(master, exp_avg, exp_avg_sq, wide_weights, parts, lengths, count, s, r, threads);
}

extern "C" double lag_squares(const void** parts, const long* lengths, int count, int are_bf16,
                              int threads) {
  return are_bf16 ? norm<uint16_t>(parts, lengths, count, threads)
                  : norm<float>(parts, lengths, count, threads);
}
