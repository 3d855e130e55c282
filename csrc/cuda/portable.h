// What kernels are written in, on the device and in the emulation on a CPU (csrc/cuda/emulation): packs of
// elements, access to memory, and the arithmetic of gates. A kernel touches memory through get and put alone,
// which the emulation overloads for pointers that check each access.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define VF_DEVICE __device__ __forceinline__
#define VF_UNROLL _Pragma("unroll")
#else
#define VF_DEVICE inline
#define VF_UNROLL
#endif

namespace visattn::cuda {

using c10::BFloat16;
using c10::Half;

constexpr int kWarp = 32;

// A maximum and where it is. NaN beats all else, and of equal ones the first does.
struct Peak {
  float value = -INFINITY;
  int at = 0x7fffffff;
};

VF_DEVICE bool beats(const Peak& a, const Peak& b) {
  if (a.value != a.value) return b.value == b.value || a.at < b.at;
  return a.value > b.value || (a.value == b.value && a.at < b.at);
}

// V elements that are read or written at once, 16 bytes at most.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

#ifdef __CUDACC__
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

template <class T>
VF_DEVICE T get(const T* p, int64_t i) {
  return p[i];
}

template <class T>
VF_DEVICE void put(T* p, int64_t i, T value) {
  p[i] = value;
}

template <int V, class T>
VF_DEVICE Pack<T, V> get_pack(const T* p, int64_t i) {
  using Bits = typename BitsOf<sizeof(T) * V>::type;
  const Bits bits = *reinterpret_cast<const Bits*>(p + i);
  Pack<T, V> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

template <class T, int V>
VF_DEVICE void put_pack(T* p, int64_t i, const Pack<T, V>& pack) {
  using Bits = typename BitsOf<sizeof(T) * V>::type;
  Bits bits;
  memcpy(&bits, &pack, sizeof(bits));
  *reinterpret_cast<Bits*>(p + i) = bits;
}

// Into a map in global memory, and whole: a plain store may be taken apart. Streaming: nobody reads it soon.
template <bool kStreaming, class T, int V>
VF_DEVICE void put_map(T* p, int64_t i, const Pack<T, V>& pack) {
  using Bits = typename BitsOf<sizeof(T) * V>::type;
  Bits bits;
  memcpy(&bits, &pack, sizeof(bits));
  kStreaming ? __stcs(reinterpret_cast<Bits*>(p + i), bits) : __stcg(reinterpret_cast<Bits*>(p + i), bits);
}

template <class U>
VF_DEVICE const U* cast(const char* p) {
  return reinterpret_cast<const U*>(p);
}
#endif  // __CUDACC__

// v, of which the compiler does not know that it is the same in every turn of a loop: what follows from it
// (a divisor's reciprocal, say) is not kept in registers over all turns.
VF_DEVICE int opaque(int v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// How pointers into global memory look: plain here, checked in the emulation.
struct PlainMemory {
  template <class T>
  using Global = T*;
};

// ---- weights, which come in any dtype ----

enum WeightType : int { kFloatWeight = 0, kHalfWeight = 1, kBFloat16Weight = 2 };

template <class Memory>
struct Weight {
  typename Memory::template Global<const char> p;  // null if there is none
  int type;
};

template <class Memory>
VF_DEVICE float get(const Weight<Memory>& w, int64_t i) {
  if (w.type == kHalfWeight) return get(cast<Half>(w.p), i);
  if (w.type == kBFloat16Weight) return get(cast<BFloat16>(w.p), i);
  return get(cast<float>(w.p), i);
}

// ---- activations; the codes are the ops' ----

enum Activation : int { kNone = 0, kRelu = 1, kSilu = 2 };
enum GateActivation : int { kSigmoid = 0, kHardSigmoid = 1 };

VF_DEVICE float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// NaN stays NaN, as in all of these.
VF_DEVICE float activate(float v, int activation) {
  if (activation == kRelu) return v < 0.0f ? 0.0f : v;
  if (activation == kSilu) return v * sigmoid(v);
  return v;
}

// g * act'(v)
VF_DEVICE float activate_grad(float g, float v, int activation) {
  if (activation == kRelu) return v <= 0.0f ? 0.0f : g;
  if (activation == kSilu) {
    const float s = sigmoid(v);
    return g * (s * (1.0f + v * (1.0f - s)));
  }
  return g;
}

VF_DEVICE float gate_of(float v, int gate_activation) {
  if (gate_activation == kSigmoid) return sigmoid(v);
  const float shifted = v + 3.0f;
  return (shifted < 0.0f ? 0.0f : shifted > 6.0f ? 6.0f : shifted) / 6.0f;
}

// The derivative of a gate's activation, from its value, times d.
VF_DEVICE float gate_grad(float d, float gate, int gate_activation) {
  if (gate_activation == kSigmoid) return d * gate * (1.0f - gate);
  return gate <= 0.0f || gate >= 1.0f ? 0.0f : d / 6.0f;
}

}  // namespace visattn::cuda
