// The vocabulary of the kernels, on the device and in the emulation on a CPU (csrc/cuda/emulation): packs of
// elements and access to memory. A kernel touches memory only through get and put, which the emulation
// overloads for pointers that check each access.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// A maximum and its index. NaN beats all other values, and the first of equal values wins.
struct Peak {
  float value = -INFINITY;
  int at = 0x7fffffff;
};

VF_DEVICE bool beats(const Peak& a, const Peak& b) {
  if (a.value != a.value) return b.value == b.value || a.at < b.at;
  return a.value > b.value || (a.value == b.value && a.at < b.at);
}

// The greater of two values, or NaN if one of them is.
VF_DEVICE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#else
  return a > b || a != a ? a : b;
#endif
}

// V elements that are read or written at once, at most 16 bytes.
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

// Stores a pack into a map in global memory with one instruction; the compiler may split a plain store.
// kStreaming: the pack is not read again soon.
template <bool kStreaming, class T, int V>
VF_DEVICE void put_map(T* p, int64_t i, const Pack<T, V>& pack) {
  using Bits = typename BitsOf<sizeof(T) * V>::type;
  Bits bits;
  memcpy(&bits, &pack, sizeof(bits));
  kStreaming ? __stcs(reinterpret_cast<Bits*>(p + i), bits) : __stcg(reinterpret_cast<Bits*>(p + i), bits);
}

// Loads a pack of a map in global memory that is read once.
template <int V, class T>
VF_DEVICE Pack<T, V> get_map(const T* p, int64_t i) {
  using Bits = typename BitsOf<sizeof(T) * V>::type;
  const Bits bits = __ldcs(reinterpret_cast<const Bits*>(p + i));
  Pack<T, V> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

template <class U>
VF_DEVICE const U* cast(const char* p) {
  return reinterpret_cast<const U*>(p);
}
VF_DEVICE const float* cast_floats(const int* p) { return reinterpret_cast<const float*>(p); }
#endif  // __CUDACC__

// v [W] = the floats from index i on, a multiple of W: 16 bytes at a time.
template <class Vector, int W>
VF_DEVICE void get_floats(const Vector& vector, int i, float (&v)[W]) {
  constexpr int kStep = W % 4 ? 1 : 4;
  VF_UNROLL
  for (int j = 0; j < W; j += kStep) {
    const auto pack = get_pack<kStep>(vector, i + j);
    VF_UNROLL
    for (int k = 0; k < kStep; ++k) v[j + k] = pack.v[k];
  }
}
template <class Vector, int W>
VF_DEVICE void put_floats(const Vector& vector, int i, const float (&v)[W]) {
  constexpr int kStep = W % 4 ? 1 : 4;
  VF_UNROLL
  for (int j = 0; j < W; j += kStep) {
    Pack<float, kStep> pack;
    VF_UNROLL
    for (int k = 0; k < kStep; ++k) pack.v[k] = v[j + k];
    put_pack(vector, i + j, pack);
  }
}

// One instruction for each element: a bfloat16 is the upper half of a float.
template <class T, int V>
VF_DEVICE void to_floats(const Pack<T, V>& pack, float (&v)[V]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    unsigned pairs[V / 2];
    memcpy(pairs, &pack, sizeof(pack));
    VF_UNROLL
    for (int j = 0; j < V; j += 2) {
      v[j] = __uint_as_float(pairs[j / 2] << 16);
      v[j + 1] = __uint_as_float(pairs[j / 2] & 0xffff0000u);
    }
  } else
#endif
  {
    VF_UNROLL
    for (int j = 0; j < V; ++j) v[j] = static_cast<float>(pack.v[j]);
  }
}

// Two elements of two bytes in one instruction.
template <class T, int V>
VF_DEVICE Pack<T, V> of_floats(const float (&v)[V]) {
  Pack<T, V> pack;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    VF_UNROLL
    for (int j = 0; j < V; j += 2) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(v[j], v[j + 1]);
        memcpy(&pack.v[j], &two, sizeof(two));
      } else {
        const __half2 two = __floats2half2_rn(v[j], v[j + 1]);
        memcpy(&pack.v[j], &two, sizeof(two));
      }
    }
  } else
#endif
  {
    VF_UNROLL
    for (int j = 0; j < V; ++j) pack.v[j] = static_cast<T>(v[j]);
  }
  return pack;
}

// Hides v from the optimiser, so that what is computed from it (the reciprocal of a divisor, say) is not kept
// in registers across all turns of a loop.
VF_DEVICE int opaque(int v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// The type of pointers into global memory: plain here, checked in the emulation.
struct PlainMemory {
  template <class T>
  using Global = T*;
};

// ---- weights, which come in any dtype ----

enum WeightType : int { kFloatWeight = 0, kHalfWeight = 1, kBFloat16Weight = 2 };

template <class Memory>
struct Weight {
  typename Memory::template Global<const char> p;  // null without the weight
  int type;
};

template <class Memory>
VF_DEVICE float get(const Weight<Memory>& w, int64_t i) {
  if (w.type == kHalfWeight) return get(cast<Half>(w.p), i);
  if (w.type == kBFloat16Weight) return get(cast<BFloat16>(w.p), i);
  return get(cast<float>(w.p), i);
}

// Calls f(elements) with a weight in its own dtype: one branch, and none inside f's loops.
template <class Memory, class F>
VF_DEVICE void with_elements(const Weight<Memory>& w, const F& f) {
  if (w.type == kHalfWeight) {
    f(cast<Half>(w.p));
  } else if (w.type == kBFloat16Weight) {
    f(cast<BFloat16>(w.p));
  } else {
    f(cast<float>(w.p));
  }
}

}  // namespace visattn::cuda
