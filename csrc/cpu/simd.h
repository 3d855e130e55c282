// Fixed-width vectors (32 bytes) and the choice of instruction set at run time.
//
// Kernels are written once with GCC vector extensions in always-inline functions; `simd(f)` runs them in a
// copy compiled for the best instruction set of this machine. Everything called inside must be VF_INLINE.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define VF_INLINE __attribute__((always_inline))

namespace visattn {

using BFloat16 = c10::BFloat16;

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  using Index = int32_t;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  using Index = int64_t;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using IVec = typename Simd<A>::I;
template <class A>
using Index = typename Simd<A>::Index;
template <class A>
constexpr int kLanes = 32 / sizeof(A);

// Accumulation type of an element type.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many lanes a load or store touches: all of them, or the `n` that a row's end leaves.
struct Full {};
struct Tail {
  int n;
};

// All lanes equal. GCC writes a constructor of a vector wider than the base instruction set as a chain of inserts, even
// where the function ends up in a wider one; a shuffle stays a broadcast.
template <class V, class E>
VF_INLINE inline V broadcast(E value) {
  V v{};
#ifdef __clang__
  return v + value;
#else
  v[0] = value;
  return __builtin_shuffle(v, decltype(v == v){});
#endif
}

template <class A>
VF_INLINE inline Vec<A> set1(A value) {
  return broadcast<Vec<A>>(value);
}

template <class A>
VF_INLINE inline IVec<A> set1_index(int64_t value) {
  return broadcast<IVec<A>>(static_cast<Index<A>>(value));
}

template <class A>
VF_INLINE inline IVec<A> iota() {
  if constexpr (kLanes<A> == 8) {
    return IVec<A>{0, 1, 2, 3, 4, 5, 6, 7};
  } else {
    return IVec<A>{0, 1, 2, 3};
  }
}

template <class A>
VF_INLINE inline Vec<A> load(const A* p, Full = {}) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
VF_INLINE inline void store(A* p, Vec<A> v, Full = {}) {
  std::memcpy(p, &v, sizeof(v));
}

typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint32_t Word8 __attribute__((vector_size(32)));

VF_INLINE inline Vec<float> load(const BFloat16* p, Full = {}) {
  Half8 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Word8) << 16);
}

VF_INLINE inline void store(BFloat16* p, Vec<float> v, Full = {}) {
  const Word8 bits = (Word8)v;
  const Word8 nearest_even = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const Word8 quiet_nan = Word8{} + 0x7fc0u;
  const Half8 half = __builtin_convertvector((v == v) ? nearest_even : quiet_nan, Half8);
  std::memcpy(p, &half, sizeof(half));
}

template <class T>
VF_INLINE inline Vec<Acc<T>> load(const T* p, Tail tail) {
  T lanes[kLanes<Acc<T>>] = {};
  for (int j = 0; j < tail.n; ++j) lanes[j] = p[j];
  return load(lanes, Full{});
}

template <class T>
VF_INLINE inline void store(T* p, Vec<Acc<T>> v, Tail tail) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, v, Full{});
  for (int j = 0; j < tail.n; ++j) p[j] = lanes[j];
}

template <class A>
VF_INLINE inline IVec<A> load_index(const Index<A>* p) {
  IVec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
VF_INLINE inline void store_index(Index<A>* p, IVec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Calls f(column, Full or Tail) over [0, count).
template <class A, class F>
VF_INLINE inline void for_vectors(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) f(c, Full{});
  if (c < count) f(c, Tail{static_cast<int>(count - c)});
}

// Lanes rotated by half, quarter, ... of the vector: after log2(lanes) steps each lane has met every other.
template <int step, class V>
VF_INLINE inline V rotate(V v) {
#ifdef __clang__
  if constexpr (sizeof(v) / sizeof(v[0]) == 8) {
    return __builtin_shufflevector(v, v, step & 7, (step + 1) & 7, (step + 2) & 7, (step + 3) & 7,
                                   (step + 4) & 7, (step + 5) & 7, (step + 6) & 7, (step + 7) & 7);
  } else {
    return __builtin_shufflevector(v, v, step & 3, (step + 1) & 3, (step + 2) & 3, (step + 3) & 3);
  }
#else
  if constexpr (sizeof(v) / sizeof(v[0]) == 8) {
    return __builtin_shuffle(v, (iota<float>() + step) & 7);
  } else {
    return __builtin_shuffle(v, (iota<double>() + step) & 3);
  }
#endif
}

template <class V, class F>
VF_INLINE inline auto reduce_lanes(V v, const F& f) {
  if constexpr (sizeof(v) / sizeof(v[0]) == 8) v = f(v, rotate<4>(v));
  v = f(v, rotate<2>(v));
  v = f(v, rotate<1>(v));
  return v[0];
}

template <class V>
VF_INLINE inline V greater(V a, V b) {
  return a > b ? a : b;
}

template <class A>
VF_INLINE inline A sum_lanes(Vec<A> v) {
  return reduce_lanes(v, [](Vec<A> a, Vec<A> b) VF_INLINE { return a + b; });
}

// Greatest lane, and the least index among the lanes that hold it. NaN lanes are not looked for.
template <class A>
VF_INLINE inline void max_lanes(Vec<A> v, IVec<A> at, A* max, int64_t* index) {
  *max = reduce_lanes(v, [](Vec<A> a, Vec<A> b) VF_INLINE { return greater(a, b); });
  const IVec<A> none = set1_index<A>(std::numeric_limits<int32_t>::max());
  const IVec<A> mine = (v == set1<A>(*max)) ? at : none;
  *index = reduce_lanes(mine, [](IVec<A> a, IVec<A> b) VF_INLINE { return a < b ? a : b; });
}

// exp by range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial, 1-2 ulp; inf above 88, NaN kept.
VF_INLINE inline Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V low = set1(-87.0f), high = set1(88.0f);
  V v = x < low ? low : x;
  v = v > high ? high : v;
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (v * 1.44269504088896341f + magic) - magic;
  const V r = (v - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  V p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IVec<float> exponent = (__builtin_convertvector(n, IVec<float>) + 127) << 23;
  p = p * (V)exponent;
  p = x > high ? set1(std::numeric_limits<float>::infinity()) : p;
  return x == x ? p : x;
}

VF_INLINE inline Vec<double> exp_lanes(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::exp(x[j]);
  return x;
}

template <class V>
VF_INLINE inline V sigmoid_lanes(V x) {
  return 1 / (1 + exp_lanes(-x));
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=256"),
               noinline)) void simd_v4(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx2,fma"), noinline)) void simd_v3(const F& f) {
  f();
}

inline int instruction_set() {
  static const int level = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 2;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 4 : 3;
  }();
  return level;
}

// Runs f, a VF_INLINE lambda, compiled for this machine.
template <class F>
void simd(const F& f) {
  const int level = instruction_set();
  if (level == 4) {
    simd_v4(f);
  } else if (level == 3) {
    simd_v3(f);
  } else {
    f();
  }
}
#else
template <class F>
void simd(const F& f) {
  f();
}
#endif

}  // namespace visattn
