// bfloat16 and float16 as storage types. All arithmetic happens in float; conversions round to
// nearest even and are written with integers so that every compiler gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace sorted_kernels {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

SK_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SK_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SK_INLINE float to_compute(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

SK_INLINE float to_compute(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponents differ by 112. Multiplying by 2^112 moves it there and normalises subnormals too.
  const float scaled = float_from_bits(magnitude << 13) * 5.192296858534828e33f;
  const uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(sign | bits_of(scaled) | infinite);
}

SK_INLINE float to_compute(float value) { return value; }
SK_INLINE double to_compute(double value) { return value; }

SK_INLINE void round_to(float value, BFloat16& result) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

SK_INLINE void round_to(float value, Float16& result) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lines its last bit up with float's last bit,
  // so that the addition itself rounds to nearest even.
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  result.bits = uint16_t(((bits >> 16) & 0x8000u) | half);
}

SK_INLINE void round_to(float value, float& result) { result = value; }
SK_INLINE void round_to(double value, double& result) { result = value; }

}  // namespace sorted_kernels
