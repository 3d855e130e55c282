// Fixed-width vectors and the choice of instruction set at run time.
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

#if defined(__x86_64__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef double W __attribute__((vector_size(2 * kVectorBytes)));
  using Index = int32_t;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef V W;
  using Index = int64_t;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using Wide = typename Simd<A>::W;  // as many doubles
template <class A>
using IVec = typename Simd<A>::I;
template <class A>
using Index = typename Simd<A>::Index;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// Accumulation type of an element type.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many lanes a load or store touches: all of them, or the `n` that a row's end leaves.
struct Full {};
struct Tail {
  int n;
};

// As Tail, where memory goes on behind the row's end: the rest is read, and made zeros.
struct Masked {
  int n;
};

// All lanes equal. GCC writes a constructor of a vector wider than the base instruction set as a chain of
// inserts, even where the function ends up in a wider one; a shuffle stays a broadcast.
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
  } else if constexpr (kLanes<A> == 4) {
    return IVec<A>{0, 1, 2, 3};
  } else {
    return IVec<A>{0, 1};
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

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

VF_INLINE inline Vec<float> load(const BFloat16* p, Full = {}) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Words) << 16);
}

VF_INLINE inline void store(BFloat16* p, Vec<float> v, Full = {}) {
  const Words bits = (Words)v;
  const Words nearest_even = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const Words quiet_nan = Words{} + 0x7fc0u;
  const Halves half = __builtin_convertvector((v == v) ? nearest_even : quiet_nan, Halves);
  std::memcpy(p, &half, sizeof(half));
}

// The first n < kLanes elements, in pieces of known sizes: of a loop GCC makes a call of memcpy, around which
// every register is saved.
template <class T>
VF_INLINE inline void copy_tail(T* to, const T* from, int n) {
  int done = 0;
  const auto piece = [&](auto size) VF_INLINE {
    constexpr int kSize = decltype(size)::value;
    if (!(n & kSize)) return;
    std::memcpy(to + done, from + done, kSize * sizeof(T));
    done += kSize;
  };
  if constexpr (kLanes<Acc<T>> > 4) piece(std::integral_constant<int, 4>{});
  if constexpr (kLanes<Acc<T>> > 2) piece(std::integral_constant<int, 2>{});
  piece(std::integral_constant<int, 1>{});
}

template <class T>
VF_INLINE inline Vec<Acc<T>> load(const T* p, Tail tail) {
  T lanes[kLanes<Acc<T>>] = {};
  copy_tail(lanes, p, tail.n);
  return load(lanes, Full{});
}

template <class T>
VF_INLINE inline Vec<Acc<T>> load(const T* p, Masked part) {
  using A = Acc<T>;
  return iota<A>() < set1_index<A>(part.n) ? load(p) : Vec<A>{};
}

template <class T>
VF_INLINE inline void store(T* p, Vec<Acc<T>> v, Tail tail) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, v, Full{});
  copy_tail(p, lanes, tail.n);
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

// As for_vectors, for an f that may do a column again: the last vector then lies within the row, and is
// whole.
template <class A, class F>
VF_INLINE inline void cover_vectors(int64_t count, const F& f) {
  if (count < kLanes<A>) return for_vectors<A>(count, f);
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) f(c, Full{});
  if (c < count) f(count - kLanes<A>, Full{});
}

// Lanes of a and b by constant indices, those of b counted on from a's.
#ifdef __clang__
#define VF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a == a){__VA_ARGS__})
#endif

// Rows become columns, in place.
template <class V>
VF_INLINE inline void transpose(V (&v)[8]) {
  V t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = VF_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = VF_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = VF_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = VF_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = VF_SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = VF_SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <class V>
VF_INLINE inline void transpose(V (&v)[4]) {
  V t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = VF_SHUFFLE(v[i], v[i + 1], 0, 4, 2, 6);
    t[i + 1] = VF_SHUFFLE(v[i], v[i + 1], 1, 5, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = VF_SHUFFLE(t[i], t[i + 2], 0, 1, 4, 5);
    v[i + 2] = VF_SHUFFLE(t[i], t[i + 2], 2, 3, 6, 7);
  }
}

template <class V>
VF_INLINE inline void transpose(V (&v)[2]) {
  const V first = VF_SHUFFLE(v[0], v[1], 0, 2);
  v[1] = VF_SHUFFLE(v[0], v[1], 1, 3);
  v[0] = first;
}

// Two vectors taken as one run of elements: those at even and those at odd places.
template <class V>
VF_INLINE inline void unzip(V low, V high, V& even, V& odd) {
  constexpr int lanes = sizeof(V) / sizeof(low[0]);
  if constexpr (lanes == 8) {
    even = VF_SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = VF_SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (lanes == 4) {
    even = VF_SHUFFLE(low, high, 0, 2, 4, 6);
    odd = VF_SHUFFLE(low, high, 1, 3, 5, 7);
  } else {
    even = VF_SHUFFLE(low, high, 0, 2);
    odd = VF_SHUFFLE(low, high, 1, 3);
  }
}

// The inverse of unzip.
template <class V>
VF_INLINE inline void zip(V even, V odd, V& low, V& high) {
  constexpr int lanes = sizeof(V) / sizeof(even[0]);
  if constexpr (lanes == 8) {
    low = VF_SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    high = VF_SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (lanes == 4) {
    low = VF_SHUFFLE(even, odd, 0, 4, 1, 5);
    high = VF_SHUFFLE(even, odd, 2, 6, 3, 7);
  } else {
    low = VF_SHUFFLE(even, odd, 0, 2);
    high = VF_SHUFFLE(even, odd, 1, 3);
  }
}

// The lanes moved by half, quarter, ... of the vector: after log2(lanes) steps each lane has met every other.
template <int step, class V>
VF_INLINE inline V rotate(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  constexpr auto at = [](int j) { return (j + step) % lanes; };
  if constexpr (lanes == 8) {
    return VF_SHUFFLE(v, v, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  } else if constexpr (lanes == 4) {
    return VF_SHUFFLE(v, v, at(0), at(1), at(2), at(3));
  } else {
    return VF_SHUFFLE(v, v, at(0), at(1));
  }
}

template <class V, class F>
VF_INLINE inline auto reduce_lanes(V v, const F& f) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 8) v = f(v, rotate<4>(v));
  if constexpr (lanes >= 4) v = f(v, rotate<2>(v));
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

// The value, as one that the compiler knows nothing of: GCC makes min and max of a comparison only if it does
// not see through one of its sides.
VF_INLINE inline float opaque(float v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// exp by range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial, 1-2 ulp; inf above 88.7, 0 below -88,
// NaN kept. The bounds lie where the exponent's bits themselves become those of inf and of 0. What bounds the
// speed is the length of the chain of dependent steps: hence the polynomial in pairs.
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
