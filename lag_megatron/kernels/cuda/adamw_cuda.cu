// The one-pass AdamW in CUDA C++, for machines without Triton: the twin of adamw_triton.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // elements of a thread: 16 bytes of fp32, 8 of bf16

struct Rates {
  float decay, beta1, beta2, eps;
};

template <typename T>
struct alignas(kWidth * sizeof(T)) Pack {
  T values[kWidth];
};

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void narrow(float value, float* out) { *out = value; }
__device__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// numbers: scale of the gradient, lr / (1 - beta1^t), sqrt(1 - beta2^t).
template <typename G>
__device__ void update(float& master, float& exp_avg, float& exp_avg_sq, G gradient,
                       const float* numbers, const Rates& rates) {
  const float g = widen(gradient) * numbers[0];
  exp_avg = rates.beta1 * exp_avg + (1.0f - rates.beta1) * g;
  exp_avg_sq = rates.beta2 * exp_avg_sq + (1.0f - rates.beta2) * g * g;
  master -= rates.decay * master;
  master -= numbers[1] * exp_avg / (sqrtf(exp_avg_sq) / numbers[2] + rates.eps);
}

template <typename G, typename W>
__global__ void adamw(float* master, float* exp_avg, float* exp_avg_sq, const G* gradient,
                      W* weights, const float* numbers, long length, long gradient_length,
                      Rates rates, bool aligned) {
  if (!isfinite(numbers[0])) return;
  const long first = kWidth * (blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x);
  if (aligned && first + kWidth <= length && first + kWidth <= gradient_length) {
    auto p = *reinterpret_cast<Pack<float>*>(master + first);
    auto m = *reinterpret_cast<Pack<float>*>(exp_avg + first);
    auto v = *reinterpret_cast<Pack<float>*>(exp_avg_sq + first);
    const auto g = *reinterpret_cast<const Pack<G>*>(gradient + first);
    Pack<W> w;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      update(p.values[i], m.values[i], v.values[i], g.values[i], numbers, rates);
      narrow(p.values[i], &w.values[i]);
    }
    *reinterpret_cast<Pack<float>*>(master + first) = p;
    *reinterpret_cast<Pack<float>*>(exp_avg + first) = m;
    *reinterpret_cast<Pack<float>*>(exp_avg_sq + first) = v;
    *reinterpret_cast<Pack<W>*>(weights + first) = w;
    return;
  }
  for (long i = first; i < first + kWidth && i < length; ++i) {
    const G g = i < gradient_length ? gradient[i] : G(0.0f);
    update(master[i], exp_avg[i], exp_avg_sq[i], g, numbers, rates);
    narrow(master[i], weights + i);
  }
}

template <typename T>
bool fits(const void* pointer) {
  return reinterpret_cast<size_t>(pointer) % sizeof(Pack<T>) == 0;
}

template <typename G, typename W>
int launch(float* master, float* exp_avg, float* exp_avg_sq, const void* gradient, void* weights,
           const float* numbers, long length, long gradient_length, Rates rates,
           cudaStream_t stream) {
  const long per_block = kThreads * kWidth;
  const long blocks = (length + per_block - 1) / per_block;
  if (blocks == 0) return 0;
  // DeepSpeed aligns a partition to two elements a rank, no more.
  const bool aligned =
      fits<float>(master) && fits<float>(exp_avg) && fits<float>(exp_avg_sq) &&
      fits<G>(gradient) && fits<W>(weights);
  adamw<G, W><<<blocks, kThreads, 0, stream>>>(
      master, exp_avg, exp_avg_sq, static_cast<const G*>(gradient), static_cast<W*>(weights),
      numbers, length, gradient_length, rates, aligned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

// All pointers are on the device.  Returns 0, or CUDA's error.
extern "C" int lag_adamw(float* master, float* exp_avg, float* exp_avg_sq, const void* gradient,
                         int gradient_is_bf16, void* weights, int weights_are_bf16,
                         const float* numbers, long length, long gradient_length, float decay,
                         float beta1, float beta2, float eps, void* stream) {
  const Rates rates{decay, beta1, beta2, eps};
  const auto on = static_cast<cudaStream_t>(stream);
  auto run = gradient_is_bf16
                 ? (weights_are_bf16 ? launch<__nv_bfloat16, __nv_bfloat16> : launch<__nv_bfloat16, float>)
                 : (weights_are_bf16 ? launch<float, __nv_bfloat16> : launch<float, float>);
  return run(master, exp_avg, exp_avg_sq, gradient, weights, numbers, length, gradient_length,
             rates, on);
}
