// The arithmetic of gates and activations, on the device and in the emulation. Each function keeps NaN.
#pragma once

#include <cmath>

#include "../common/activations.h"
#include "portable.h"

namespace visattn::cuda {

VF_DEVICE float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// For the elements of maps, of which there are many: exact to some units in the last place.
VF_DEVICE float quick_sigmoid(float v) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, 1.0f + __expf(-v));
#else
  return sigmoid(v);
#endif
}

VF_DEVICE float activate(float v, int activation) {
  if (activation == kRelu) return v < 0.0f ? 0.0f : v;
  if (activation == kSilu) return v * quick_sigmoid(v);
  return v;
}

// g * act'(v)
VF_DEVICE float activate_grad(float g, float v, int activation) {
  if (activation == kRelu) return v <= 0.0f ? 0.0f : g;
  if (activation == kSilu) {
    const float s = quick_sigmoid(v);
    return g * (s * (1.0f + v * (1.0f - s)));
  }
  return g;
}

// The same for V elements, with one branch.
template <int V>
VF_DEVICE void activate(float (&v)[V], int activation) {
  if (activation == kRelu) {
    VF_UNROLL
    for (int j = 0; j < V; ++j) v[j] = activate(v[j], kRelu);
  } else if (activation == kSilu) {
    VF_UNROLL
    for (int j = 0; j < V; ++j) v[j] = activate(v[j], kSilu);
  }
}
template <int V>
VF_DEVICE void activate_grad(float (&g)[V], const float (&v)[V], int activation) {
  if (activation == kRelu) {
    VF_UNROLL
    for (int j = 0; j < V; ++j) g[j] = activate_grad(g[j], v[j], kRelu);
  } else if (activation == kSilu) {
    VF_UNROLL
    for (int j = 0; j < V; ++j) g[j] = activate_grad(g[j], v[j], kSilu);
  }
}

VF_DEVICE float gate_of(float v, int gate_activation) {
  if (gate_activation == kSigmoid) return sigmoid(v);
  const float shifted = v + 3.0f;
  return (shifted < 0.0f ? 0.0f : shifted > 6.0f ? 6.0f : shifted) / 6.0f;
}

// d times the derivative of the gate's activation, computed from the gate.
VF_DEVICE float gate_grad(float d, float gate, int gate_activation) {
  if (gate_activation == kSigmoid) return d * gate * (1.0f - gate);
  return gate > 0.0f && gate < 1.0f ? d / 6.0f : 0.0f;
}

}  // namespace visattn::cuda
