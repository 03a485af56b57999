// An activation with the bias before it, and with the product after it where it gates.
#include "cpu.h"

namespace {

using namespace lag;

constexpr long kGrain = 1L << 16;  // elements that are worth a thread

struct Point {
  float value, slope;
};

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

struct GeluTanh {  // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  static Point at(float x) {
    const float square = x * x;
    const float s = sigmoid(x * std::fma(square, 0.0713548163f, 1.59576912f));
    const float twice_slope = std::fma(square, 0.214064449f, 1.59576912f);
    return {x * s, std::fma(x * s * (1.0f - s), twice_slope, s)};
  }
};

struct GeluExact {  // x Phi(x)
  // Phi(-|x|) = exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.26 |x|): P is fitted to scipy's erfcx,
  // with a relative error of 3e-8 for |x| up to 14.
  static Point at(float x) {
    const float t = 1.0f / std::fma(0.26f, std::fabs(x), 1.0f), density = exponential(-0.5f * x * x);
    float p = 0.030505985f;
    p = std::fma(p, t, -0.152834088f);
    p = std::fma(p, t, 0.251502007f);
    p = std::fma(p, t, -0.150961041f);
    p = std::fma(p, t, 0.1609561f);
    p = std::fma(p, t, 0.0510242060f);
    p = std::fma(p, t, 0.103031136f);
    p = std::fma(p, t, 0.10301663f);
    p = std::fma(p, t, 0.103759065f);
    const float tail = density * t * p, below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, std::fma(0.398942280f * x, density, below)};
  }
};

struct Silu {
  static Point at(float x) {
    const float s = sigmoid(x);
    return {x * s, std::fma(x * s, 1.0f - s, s)};
  }
};

template <typename A, typename T>
void plain(const T* input, const T* bias, T* out, long rows, long columns, int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const T* x = input + r * columns;
      T* y = out + r * columns;
#pragma omp simd
      for (long i = 0; i < columns; ++i)
        narrow(A::at(widen(x[i]) + (bias ? widen(bias[i]) : 0.0f)).value, y + i);
    }
  });
}

// Threads share columns, so that the bias's sum over rows does not depend on their number.
template <typename A, typename T>
void plain_back(const T* grad, const T* input, const T* bias, T* of_input, float* of_bias,
                long rows, long columns, int threads) {
  share(columns, kGrain / rows + 64, threads, [=](long first, long last) {
    for (long r = 0; r < rows; ++r) {
      const T *x = input + r * columns, *g = grad + r * columns;
      T* d = of_input + r * columns;
#pragma omp simd
      for (long i = first; i < last; ++i) {
        const float slope = A::at(widen(x[i]) + (bias ? widen(bias[i]) : 0.0f)).slope;
        const float found = widen(g[i]) * slope;
        narrow(found, d + i);
        if (of_bias) of_bias[i] += found;
      }
    }
  });
}

// input is (rows, 2 columns): what is activated, and what it gates.
template <typename T>
void gated(const T* input, const T* bias, T* out, long rows, long columns, int threads) {
  share(rows, kGrain / columns + 1, threads, [=](long first, long last) {
    for (long r = first; r < last; ++r) {
      const T *x = input + 2 * r * columns, *u = x + columns;
      T* y = out + r * columns;
#pragma omp simd
      for (long i = 0; i < columns; ++i) {
        const float gate = widen(x[i]) + (bias ? widen(bias[i]) : 0.0f);
        const float linear = widen(u[i]) + (bias ? widen(bias[columns + i]) : 0.0f);
        narrow(Silu::at(gate).value * linear, y + i);
      }
    }
  });
}

template <typename T>
void gated_back(const T* grad, const T* input, const T* bias, T* of_input, float* of_bias,
                long rows, long columns, int threads) {
  share(columns, kGrain / rows + 64, threads, [=](long first, long last) {
    for (long r = 0; r < rows; ++r) {
      const T *x = input + 2 * r * columns, *u = x + columns, *g = grad + r * columns;
      T* d = of_input + 2 * r * columns;
#pragma omp simd
      for (long i = first; i < last; ++i) {
        const Point gate = Silu::at(widen(x[i]) + (bias ? widen(bias[i]) : 0.0f));
        const float linear = widen(u[i]) + (bias ? widen(bias[columns + i]) : 0.0f);
        const float of_gate = widen(g[i]) * linear * gate.slope, of_linear = widen(g[i]) * gate.value;
        narrow(of_gate, d + i);
        narrow(of_linear, d + columns + i);
        if (of_bias) {
          of_bias[i] += of_gate;
          of_bias[columns + i] += of_linear;
        }
      }
    }
  });
}

template <typename T>
void forward(int kind, const void* input, const void* bias, void* out, long rows, long columns,
             int threads) {
  const T *x = static_cast<const T*>(input), *b = static_cast<const T*>(bias);
  T* y = static_cast<T*>(out);
  if (kind == 0) plain<GeluTanh>(x, b, y, rows, columns, threads);
  if (kind == 1) plain<GeluExact>(x, b, y, rows, columns, threads);
  if (kind == 2) gated(x, b, y, rows, columns, threads);
}

template <typename T>
void backward(int kind, const void* grad, const void* input, const void* bias, void* of_input,
              float* of_bias, long rows, long columns, int threads) {
  const T *g = static_cast<const T*>(grad), *x = static_cast<const T*>(input);
  const T* b = static_cast<const T*>(bias);
  T* d = static_cast<T*>(of_input);
  if (kind == 0) plain_back<GeluTanh>(g, x, b, d, of_bias, rows, columns, threads);
  if (kind == 1) plain_back<GeluExact>(g, x, b, d, of_bias, rows, columns, threads);
  if (kind == 2) gated_back(g, x, b, d, of_bias, rows, columns, threads);
}

}  // namespace

// kind: 0 GELU by tanh, 1 exact GELU, 2 SwiGLU; bias may be null.
extern "C" void lag_activation(int kind, int is_bf16, const void* input, const void* bias,
                               void* out, long rows, long columns, int threads) {
  if (is_bf16)
    forward<uint16_t>(kind, input, bias, out, rows, columns, threads);
  else
    forward<float>(kind, input, bias, out, rows, columns, threads);
}

// of_bias holds zeros and becomes the sum over rows; null where there is no bias.
extern "C" void lag_activation_back(int kind, int is_bf16, const void* grad, const void* input,
                                    const void* bias, void* of_input, float* of_bias, long rows,
                                    long columns, int threads) {
  if (is_bf16)
    backward<uint16_t>(kind, grad, input, bias, of_input, of_bias, rows, columns, threads);
  else
    backward<float>(kind, grad, input, bias, of_input, of_bias, rows, columns, threads);
}
