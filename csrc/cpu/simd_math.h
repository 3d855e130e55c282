// exp and sigmoid of vectors.
#pragma once

#include <cmath>

#include "simd.h"

namespace visattn {

// Hides the value from the optimiser: GCC turns a comparison into min or max only if it does not see through
// one of its sides.
VF_INLINE inline float opaque(float v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// exp by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6: 1-2 ulp, inf above 88.7, 0 below
// -88, NaN kept. At the bounds of the clamp the bits of the exponent become those of inf and of 0. The chain
// of dependent steps bounds the speed, so the polynomial is evaluated in pairs.
VF_INLINE inline Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  using I = IVec<float>;
  const V low = set1(opaque(-88.3f)), high = set1(opaque(89.0f));
  V v = x < low ? low : x;
  v = v > high ? high : v;
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  const V rounded = v * 1.44269504088896341f + magic;
  const V n = rounded - magic;
  const V r = (v - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  const V r2 = r * r;
  const V top = (1.9875691500e-4f * r + 1.3981999507e-3f) * r2 + (8.3334519073e-3f * r + 4.1665795894e-2f);
  const V p = (top * r2 + (1.6666665459e-1f * r + 5.0000001201e-1f)) * r2 + r + 1.0f;
  return p * (V)(((I)rounded << 23) + 0x3f800000);
}

VF_INLINE inline Vec<double> exp_lanes(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::exp(x[j]);
  return x;
}

template <class V>
VF_INLINE inline V sigmoid_lanes(V x) {
  return 1 / (1 + exp_lanes(-x));
}

}  // namespace visattn
