// Writing a grown state in CUDA C++, for machines without Triton: the twin of grow_triton.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // elements of a thread's access: 16 bytes of fp32, 8 of 16 bits
constexpr long kAligned = 1, kKept = 2;

// A row of the table, as grow.py writes it.
struct Row {
  long target, source, weights, length, flags;
};

template <typename T>
struct alignas(kWidth * sizeof(T)) Pack {
  T values[kWidth];
};

__device__ void narrow(float value, float* out) { *out = value; }
__device__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }

// A block writes one row.
template <typename W>
__global__ void grow(const Row* rows, const float* scales) {
  const Row row = rows[blockIdx.x];
  const float scale = scales[blockIdx.x];
  const auto source = reinterpret_cast<const float*>(row.source);
  const auto target = reinterpret_cast<float*>(row.target);
  const auto weights = reinterpret_cast<W*>(row.weights);
  const bool kept = row.flags & kKept;
  if (row.flags & kAligned) {
    for (long i = threadIdx.x * kWidth; i < row.length; i += kThreads * kWidth) {
      Pack<float> value{{scale, scale, scale, scale}};
      if (source) {
        value = *reinterpret_cast<const Pack<float>*>(source + i);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) value.values[k] *= scale;
      }
      if (!kept) *reinterpret_cast<Pack<float>*>(target + i) = value;
      if (weights) {
        Pack<W> narrowed;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) narrow(value.values[k], &narrowed.values[k]);
        *reinterpret_cast<Pack<W>*>(weights + i) = narrowed;
      }
    }
    return;
  }
  for (long i = threadIdx.x; i < row.length; i += kThreads) {
    const float value = source ? source[i] * scale : scale;
    if (!kept) target[i] = value;
    if (weights) narrow(value, weights + i);
  }
}

}  // namespace

// Rows and scales are on the device; weights_kind: 0 fp32, 1 bf16, 2 fp16.  Returns 0, or CUDA's
// error.
extern "C" int lag_grow(const void* rows, const float* scales, long count, int weights_kind,
                        void* stream) {
  if (count == 0) return 0;
  auto run = weights_kind == 1 ? grow<__nv_bfloat16> : weights_kind == 2 ? grow<__half> : grow<float>;
  run<<<count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const Row*>(rows),
                                                               scales);
  return static_cast<int>(cudaGetLastError());
}
