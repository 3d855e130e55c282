// Fixed-width vectors, and the choice of an instruction set at run time.
//
// Kernels are written once, with GCC vector extensions in always-inline functions. `simd(f)` runs f in a copy
// compiled for the best instruction set of this machine. Every function called inside must be VF_INLINE.
// VISATTN_PORTABLE compiles the code of all other processors on x86, for tests.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#if defined(__x86_64__) && !defined(VISATTN_PORTABLE)
#define VF_X86 1
#endif
#define VF_INLINE __attribute__((always_inline))

namespace visattn {

using BFloat16 = c10::BFloat16;

#ifdef VF_X86
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

// The accumulation type of an element type.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `count` rounded up to whole vectors.
template <class A>
VF_INLINE constexpr int64_t whole_vectors(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Lanes that a load or store touches: all of them, or the first `n` at the end of a row.
struct Full {};
struct Tail {
  int n;
};

// Like Tail, for memory that continues past the end of the row: all lanes are read, and those past the end
// become zero.
struct Masked {
  int n;
};

// A vector of equal lanes. GCC writes the constructor of a vector wider than the base instruction set as a
// chain of inserts, even in a function of a wider set; a shuffle stays a broadcast.
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

// Copies the first n < kLanes elements in pieces of constant size. GCC turns a loop into a call of memcpy,
// and saves every register around it.
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

// Calls f(column, Full or Tail) for the vectors of [0, count).
template <class A, class F>
VF_INLINE inline void for_vectors(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) f(c, Full{});
  if (c < count) f(c, Tail{static_cast<int>(count - c)});
}

// Like for_vectors, for an f that may process a column twice: the last vector ends at the end of the row, and
// is whole.
template <class A, class F>
VF_INLINE inline void cover_vectors(int64_t count, const F& f) {
  if (count < kLanes<A>) return for_vectors<A>(count, f);
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) f(c, Full{});
  if (c < count) f(count - kLanes<A>, Full{});
}

#ifdef VF_X86
template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=256"),
               noinline)) void simd_v4(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx2,fma"), noinline)) void simd_v3(const F& f) {
  f();
}

// The level of x86-64 to run: 2, 3 (AVX2) or 4 (AVX-512). ATEN_CPU_CAPABILITY limits it, as it limits PyTorch's kernels.
inline int instruction_set() {
  static const int level = [] {
    const char* set = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = set ? set : "";
    __builtin_cpu_init();
    if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 2;
    if (limit == "avx2") return 3;
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
