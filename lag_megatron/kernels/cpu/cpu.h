// What the kernels for a CPU share: fp32 and bf16 in memory, threads, an exponential.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace lag {

inline float widen(float value) { return value; }

inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline void narrow(float value, float* out) { *out = value; }

// The nearest bf16, ties to even.
inline void narrow(float value, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  *out = value == value ? static_cast<uint16_t>(rounded) : 0x7FC0;
}

// Runs task(first, last) on parts of 0..total, none smaller than grain.
template <typename Task>
void share(long total, long grain, int threads, Task task) {
  const long parts = std::max(1L, std::min<long>(threads, total / grain));
  std::vector<std::thread> helpers;
  for (long t = 1; t < parts; ++t)
    helpers.emplace_back(task, total * t / parts, total * (t + 1) / parts);
  task(0, total / parts);
  for (auto& helper : helpers) helper.join();
}

// e^x to two ulp, in a form that compilers vectorise; what is below fp32's normal range becomes 0.
// x = n ln 2 + r with |r| <= ln 2 / 2, and the series of e^r up to r^7 / 7!.
inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  constexpr float kLow = -87.0f, kHigh = 88.3f;
  const float inside = x < kLow ? kLow : x > kHigh ? kHigh : x;  // NaN stays
  const float shifted = std::fma(inside, 1.44269504f, kMagic), n = shifted - kMagic;
  float r = std::fma(n, -0.693145752f, inside);  // ln 2 in two parts, the first of few bits
  r = std::fma(n, -1.42860677e-6f, r);
  float series = 1.0f / 5040;
  series = std::fma(series, r, 1.0f / 720);
  series = std::fma(series, r, 1.0f / 120);
  series = std::fma(series, r, 1.0f / 24);
  series = std::fma(series, r, 1.0f / 6);
  series = std::fma(series, r, 0.5f);
  series = std::fma(series, r, 1.0f);
  series = std::fma(series, r, 1.0f);
  uint32_t power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power + 127) << 23;  // the integer lies in the low bits
  float scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < kLow ? 0.0f : series * scale;
}

}  // namespace lag
