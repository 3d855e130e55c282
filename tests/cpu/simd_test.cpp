// Compares the vectors of csrc/cpu and the passes over matrices that need no tensors with plain loops. Any processor
// that GCC knows can run it. Prints how many values it compared; exits with 1 at the first wrong one.
#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "../../csrc/cpu/column_stats.h"
#include "../../csrc/cpu/elementwise.h"
#include "../../csrc/cpu/gemm.h"
#include "../../csrc/cpu/row_stats.h"
#include "../../csrc/cpu/simd_lanes.h"
#include "../../csrc/cpu/simd_math.h"
#include "../../csrc/cpu/ties.h"

namespace visattn {
namespace {

int64_t compared = 0;

// Exits unless `found` equals `wanted`; NaN equals NaN.
template <class V>
void expect(V found, V wanted, const char* what, int64_t at) {
  ++compared;
  if (found == wanted || (found != found && wanted != wanted)) return;
  std::printf("%s, element %lld: %.17g, not %.17g\n", what, static_cast<long long>(at),
              static_cast<double>(found), static_cast<double>(wanted));
  std::exit(1);
}

void expect_close(double found, double wanted, double error, const char* what, int64_t at) {
  if (!(std::abs(found - wanted) <= error)) expect(found, wanted, what, at);
  ++compared;
}

// Small integers in a fixed order, so that sums are exact and values repeat.
float value(int64_t i) { return static_cast<float>((i * 37 + 11) % 17 - 8); }

// `count` values in a block of exactly that size, so that AddressSanitizer and Valgrind see each access past its end.
template <class T>
std::vector<T> values(int64_t count) {
  std::vector<T> v(count);
  for (int64_t i = 0; i < count; ++i) v[i] = static_cast<T>(value(i));
  return v;
}

template <class T>
void loads_and_stores() {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const std::vector<T> from = values<T>(L);
  for (int n = 1; n <= L; ++n) {
    A lanes[L], masked[L];
    std::vector<T> to(L + 1, static_cast<T>(99.0f));
    simd([&]() VF_INLINE {
      const Vec<A> v = n == L ? load(from.data()) : load(from.data(), Tail{n});
      store(lanes, v);
      store(masked, load(from.data(), Masked{n}));
      if (n == L) {
        store(to.data(), v);
      } else {
        store(to.data(), v, Tail{n});
      }
    });
    for (int i = 0; i < L; ++i) {
      const A wanted = i < n ? static_cast<A>(from[i]) : A(0);
      expect(lanes[i], wanted, "load", i);
      expect(masked[i], wanted, "masked load", i);
    }
    for (int i = 0; i <= L; ++i) {
      expect(static_cast<A>(to[i]), i < n ? static_cast<A>(from[i]) : A(99), "store", i);
    }
  }
}

// A store rounds to the nearest bfloat16, ties to even, and keeps NaN, as PyTorch's conversion does.
void rounding_to_bfloat16() {
  constexpr int L = kLanes<float>;
  const uint32_t fractions[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : fractions) {
      const uint32_t bits = high << 16 | low;
      float number;
      std::memcpy(&number, &bits, sizeof(number));
      BFloat16 stored[L];
      simd([&]() VF_INLINE { store(stored, set1(number)); });
      expect(static_cast<float>(stored[L - 1]), static_cast<float>(BFloat16(number)), "bfloat16", bits);
    }
  }
}

template <class A>
void lanes() {
  constexpr int L = kLanes<A>;
  A rows[L][L], even[L], odd[L], low[L], high[L], turned[L];
  Index<A> numbers[L], places[L];
  A sum, top;
  int64_t place, none;
  const std::vector<A> flat = values<A>(L * L);
  simd([&]() VF_INLINE {
    Vec<A> v[L];
    for (int i = 0; i < L; ++i) v[i] = load(flat.data() + i * L);
    Vec<A> e, o, l, h;
    unzip(v[0], v[1], e, o);
    zip(e, o, l, h);
    store(even, e), store(odd, o), store(low, l), store(high, h);
    store(turned, rotate<1>(v[0]));
    sum = sum_lanes<A>(v[0]);
    max_lanes<A>(greater(v[0], v[1]), iota<A>(), &top, &place);
    Vec<A> equal = set1<A>(2);
    A unused;
    max_lanes<A>(equal, iota<A>() + 5, &unused, &none);
    store_index<A>(numbers, iota<A>());
    store_index<A>(places, set1_index<A>(7));
    transpose(v);
    for (int i = 0; i < L; ++i) store(rows[i], v[i]);
  });
  A total = 0, greatest = -99;
  int64_t first = 0;
  for (int i = 0; i < L; ++i) {
    total += flat[i];
    const A here = flat[i] > flat[L + i] ? flat[i] : flat[L + i];
    if (here > greatest) greatest = here, first = i;
  }
  expect(sum, total, "sum_lanes", 0);
  expect(top, greatest, "max_lanes", 0);
  expect<double>(place, first, "index of max_lanes", 0);
  expect<double>(none, 5, "first of equal lanes", 0);
  for (int i = 0; i < L; ++i) {
    expect<double>(numbers[i], i, "iota", i);
    expect<double>(places[i], 7, "set1_index", i);
    expect(even[i], flat[2 * i], "unzip", i);
    expect(odd[i], flat[2 * i + 1], "unzip", i);
    expect(low[i], flat[i], "zip", i);
    expect(high[i], flat[L + i], "zip", i);
    expect(turned[i], flat[(i + 1) % L], "rotate", i);
    for (int j = 0; j < L; ++j) expect(rows[i][j], flat[j * L + i], "transpose", i * L + j);
  }
}

template <class A>
void loops() {
  for (int64_t count = 0; count < 40; ++count) {
    std::vector<A> once(count), covered(count);
    simd([&]() VF_INLINE {
      for_vectors<A>(count, [&](int64_t c, auto part)
                                VF_INLINE { store(once.data() + c, load(once.data() + c, part) + 1, part); });
      cover_vectors<A>(count,
                       [&](int64_t c, auto part) VF_INLINE { store(covered.data() + c, set1<A>(1), part); });
    });
    for (int64_t c = 0; c < count; ++c) {
      expect(once[c], A(1), "for_vectors", c);
      expect(covered[c], A(1), "cover_vectors", c);
    }
  }
}

template <class A>
void functions() {
  constexpr int L = kLanes<A>;
  const double ulp = std::numeric_limits<A>::epsilon();
  for (int i = -8700; i <= 8800; i += 7) {
    A e[L], s[L];
    const A x = static_cast<A>(i) / 100;
    simd([&]() VF_INLINE { store(e, exp_lanes(set1(x))), store(s, sigmoid_lanes(set1(x))); });
    const double exact = std::exp(static_cast<double>(x));
    expect_close(e[L - 1], exact, 2 * ulp * exact, "exp", i);
    expect_close(s[L - 1], exact / (1 + exact), 4 * ulp, "sigmoid", i);
  }
  const A infinity = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  for (const A x : {infinity, -infinity, nan}) {
    A e[L];
    simd([&]() VF_INLINE { store(e, exp_lanes(set1(x))); });
    expect(e[0], std::exp(x), "exp of no number", 0);
  }
}

// An array of whole vectors, as the passes want for results of columns.
template <class A>
std::vector<A> padded(int64_t count) {
  return std::vector<A>(count + 64);
}

// Sums, maxima, their first indices and the number of equal maxima, by rows and by columns, with NaN in one row.
template <class T>
void statistics() {
  using A = Acc<T>;
  for (const int64_t rows : {1, 3, 8, 21}) {
    for (const int64_t cols : {1, 2, 5, 16, 33, 70, 600}) {
      std::vector<T> x = values<T>(rows * cols);
      if (rows == 21) x[7 * cols + cols / 2] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
      const std::vector<A> scale = values<A>(rows + cols + 64);
      const Matrix<const T> m{x.data(), cols, rows, cols};
      for (const bool down : {false, true}) {
        const int64_t count = down ? cols : rows, length = down ? rows : cols;
        auto sum = padded<A>(count), max = padded<A>(count);
        auto at = padded<Index<A>>(count), equal = padded<Index<A>>(count);
        if (down) {
          column_stats<T, true, true>(m, scale.data(), sum.data(), max.data(), at.data());
          count_in_columns<T, true>(m, scale.data(), max.data(), equal.data());
        } else {
          row_stats<T, true, true>(m, scale.data(), sum.data(), max.data(), at.data());
          count_in_rows<T, true>(m, scale.data(), max.data(), equal.data());
        }
        for (int64_t i = 0; i < count; ++i) {
          A total = 0, top = -std::numeric_limits<A>::infinity();
          int64_t first = 0, ties = 0;
          for (int64_t j = 0; j < length; ++j) {
            const A v = static_cast<A>(x[down ? j * cols + i : i * cols + j]) * scale[j];
            total += v;
            if (v > top || (v != v && top == top)) top = v, first = j, ties = 0;
            ties += v == top;
          }
          expect(sum[i], total, down ? "column sum" : "row sum", i);
          expect(max[i], top, down ? "column maximum" : "row maximum", i);
          expect<double>(at[i], first, "index of a maximum", i);
          expect<double>(equal[i], ties, "equal maxima", i);
        }
      }
    }
  }
}

template <class T>
void gates() {
  using A = Acc<T>;
  for (const int64_t cols : {1, 3, 8, 29, 64}) {
    const int64_t rows = 5;
    const std::vector<T> x = values<T>(rows * cols), residual(x.rbegin(), x.rend());
    const std::vector<A> factor = values<A>(rows), columns = values<A>(cols + 64);
    std::vector<T> y(rows * cols);
    const Matrix<const T> m{x.data(), cols, rows, cols};
    apply_gate<T>(m, {factor.data(), columns.data()}, residual.data(), y.data(), cols, kRelu);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const A sum = static_cast<A>(x[i]) * factor[i / cols] * columns[i % cols] + static_cast<A>(residual[i]);
      expect(static_cast<A>(y[i]), static_cast<A>(static_cast<T>(sum < 0 ? A(0) : sum)), "apply_gate", i);
    }
  }
}

template <class A>
void products() {
  const int64_t rows = 11, depth = 7;
  for (const int64_t cols : {1, 4, 9, 16, 37}) {
    const std::vector<A> a = values<A>(rows * depth), b = values<A>(depth * cols);
    std::vector<A> c(rows * cols);
    simd([&]() VF_INLINE {
      gemm<A>(Broadcast<A>{const_cast<A*>(a.data()), depth, 1}, b.data(), cols, rows, cols, depth, 6,
              [&](int64_t i, int64_t j, Vec<A> v, auto part)
                  VF_INLINE { store(c.data() + i * cols + j, v, part); });
    });
    for (int64_t i = 0; i < rows * cols; ++i) {
      A total = 0;
      for (int64_t k = 0; k < depth; ++k) total += a[i / cols * depth + k] * b[k * cols + i % cols];
      expect(c[i], total, "gemm", i);
    }
  }
}

template <class... T>
void test_all() {
  (loads_and_stores<T>(), ...);
  (statistics<T>(), ...);
  (gates<T>(), ...);
}

}  // namespace
}  // namespace visattn

int main() {
  using namespace visattn;
  test_all<float, double, BFloat16>();
  rounding_to_bfloat16();
  lanes<float>(), lanes<double>();
  loops<float>(), loops<double>();
  functions<float>(), functions<double>();
  products<float>(), products<double>();
#ifdef VF_X86
  const int level = instruction_set();
#else
  const int level = 0;
#endif
  std::printf("%lld values, level %d, vectors of %d bytes\n", static_cast<long long>(compared), level,
              kVectorBytes);
}
