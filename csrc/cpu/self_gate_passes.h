// The passes of gates that each element computes from itself and from its channel: see self_gate.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/activations.h"
#include "elementwise.h"
#include "matrix.h"
#include "self_gate_coefficients.h"
#include "simd.h"
#include "simd_lanes.h"
#include "simd_math.h"
#include "wide_sums.h"

namespace visattn {

// ---- vectors: of x at columns c and, if shuffled, half + c; of y side by side from 2 c on ----

template <class T, class V, class Lanes>
VF_INLINE inline void load_result(const T* p, int64_t c, Lanes lanes, V (&v)[1]) {
  v[0] = load(p + c, lanes);
}
template <class T, class V, class Lanes>
VF_INLINE inline void store_result(T* p, int64_t c, Lanes lanes, const V (&v)[1]) {
  store(p + c, v[0], lanes);
}
template <class T, class V>
VF_INLINE inline void load_result(const T* p, int64_t c, Full, V (&v)[2]) {
  unzip(load(p + 2 * c), load(p + 2 * c + kLanes<Acc<T>>), v[0], v[1]);
}
template <class T, class V>
VF_INLINE inline void store_result(T* p, int64_t c, Full, const V (&v)[2]) {
  V low, high;
  zip(v[0], v[1], low, high);
  store(p + 2 * c, low), store(p + 2 * c + kLanes<Acc<T>>, high);
}
template <class T, class V>
VF_INLINE inline void load_result(const T* p, int64_t c, Tail tail, V (&v)[2]) {
  T lanes[2 * kLanes<Acc<T>>] = {};
  for (int j = 0; j < 2 * tail.n; ++j) lanes[j] = p[2 * c + j];
  load_result(lanes, 0, Full{}, v);
}
template <class T, class V>
VF_INLINE inline void store_result(T* p, int64_t c, Tail tail, const V (&v)[2]) {
  T lanes[2 * kLanes<Acc<T>>];
  store_result(lanes, 0, Full{}, v);
  for (int j = 0; j < 2 * tail.n; ++j) p[2 * c + j] = lanes[j];
}

// The coefficients of a row, or of one vector of columns.
template <class Algebra, class A>
struct Lanes {
  Vec<A> m, k, b, u, v;

  VF_INLINE static Lanes of_row(const GateArrays<A>& of) {
    return {set1<A>(*of.m), set1<A>(*of.k), set1<A>(*of.b), set1<A>(*of.u), set1<A>(*of.v)};
  }
  template <class Count>
  VF_INLINE static Lanes of_columns(const GateArrays<A>& of, int64_t c, Count lanes) {
    return {load(of.m + c, lanes), load(of.k + c, lanes), load(of.b + c, lanes), load(of.u + c, lanes),
            load(of.v + c, lanes)};
  }
  VF_INLINE Vec<A> deviation(Vec<A> x) const {
    if constexpr (Algebra::kFlat) return (m == m) ? x - m : Vec<A>{};
    return x - m;
  }
  VF_INLINE Vec<A> sigmoid(Vec<A> d) const {
    return sigmoid_lanes((Algebra::kPower == 2 ? k * d * d : k * d) + b);
  }
};

// ---- passes. To the compiler a store may alias anything, so whatever a loop needs is copied to locals
// first. The matrices y, grad and residual are dense, with rows `ld` apart. ----

template <class Algebra, class T, int kAct, bool kResidual>
void self_gate_row(const T* x, const T* scaled, int64_t count, GateArrays<Acc<T>> k, const T* residual,
                   T* y) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    const auto gate = Lanes<Algebra, A>::of_row(k);
    const T *px = x, *pz = scaled, *pr = residual;
    T* py = y;
    for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
      const Vec<A> in = load(px + c, lanes);
      Vec<A> z = in;
      if constexpr (Algebra::kOther) z = load(pz + c, lanes);
      Vec<A> v = z * gate.sigmoid(gate.deviation(in));
      if constexpr (kResidual) v += load(pr + c, lanes);
      store(py + c, activate<kAct>(v), lanes);
    });
  });
}

template <class Algebra, class T, int kAct, bool kResidual>
void self_gate_columns(Matrix<const T> x, const T* scaled, GateArrays<Acc<T>> arrays, const T* residual, T* y,
                       int64_t ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    constexpr int K = Algebra::kShuffled ? 2 : 1;
    const int64_t count = x.cols / K;
    for_row_groups<true>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      const T *px[R], *pz[R], *pr[R];
      T* py[R];
      for (int r = 0; r < R; ++r) {
        px[r] = x.row(r0 + r);
        pz[r] = Algebra::kOther ? scaled + (r0 + r) * ld : nullptr;
        pr[r] = kResidual ? residual + (r0 + r) * ld : nullptr;
        py[r] = y + (r0 + r) * ld;
      }
      for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
        Lanes<Algebra, A> gate[K];
        for (int i = 0; i < K; ++i) gate[i] = Lanes<Algebra, A>::of_columns(k, i * count + c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec<A> v[K], res[K] = {};
          if constexpr (kResidual) load_result(pr[r], c, lanes, res);
          for (int i = 0; i < K; ++i) {
            const Vec<A> in = load(px[r] + i * count + c, lanes);
            v[i] = in;
            if constexpr (Algebra::kOther) v[i] = load(pz[r] + i * count + c, lanes);
            v[i] *= gate[i].sigmoid(gate[i].deviation(in));
            if constexpr (kResidual) v[i] += res[i];
            v[i] = activate<kAct>(v[i]);
          }
          store_result(py[r], c, lanes, v);
        }
      });
    });
  });
}

// The gradients of one vector: `scaled` belongs to the map that is scaled; `through` plus a line belongs to
// the map that the gate is computed from.
template <class A>
struct Terms {
  Vec<A> scaled, through;
};

// Adds r d^(p-1) and r d^p of one vector to `sum`, and turns g into g' = g act'(.). Returns g' s and r p k
// d^(p-1).
template <int kAct, class Algebra, class A>
VF_INLINE inline Terms<A> gradient_terms(const Lanes<Algebra, A>& gate, Vec<A> in, Vec<A> z, Vec<A>& g,
                                         Vec<A> residual, Vec<A> (&sum)[2]) {
  const Vec<A> d = gate.deviation(in), s = gate.sigmoid(d);
  if constexpr (kAct != kNone) g = activate_grad<kAct>(g, z * s + residual);
  const Vec<A> gs = g * s, r = gs * z * (1 - s), lower = Algebra::kPower == 2 ? r * d : r;
  sum[0] += lower, sum[1] += lower * d;
  return {gs, lower * (Algebra::kPower * gate.k)};
}

// Sums of a row. With an activation g' goes to `kept`. `base` receives dx without the line u d + v, and
// `dscaled` the gradient of the other map.
template <class Algebra, class T, int kAct>
Sums<double> self_gate_sums_row(const T* x, const T* scaled, int64_t count, GateArrays<Acc<T>> k,
                                const T* grad, const T* residual, T* kept, Acc<T>* base, T* dscaled) {
  using A = Acc<T>;
  Sums<double> out{};
  simd([=, &out]() VF_INLINE {
    const auto gate = Lanes<Algebra, A>::of_row(k);
    double total[2] = {};
    for (int64_t c0 = 0; c0 < count; c0 += kChunk * kLanes<A>) {
      const T *px = x + c0, *pg = grad + c0, *pr = residual ? residual + c0 : nullptr;
      const T* pz = Algebra::kOther ? scaled + c0 : nullptr;
      T *pk = kAct != kNone ? kept + c0 : nullptr, *po = Algebra::kOther ? dscaled + c0 : nullptr;
      A* pb = base + c0;
      Vec<A> part[2] = {};
      for_vectors<A>(std::min(count - c0, kChunk * kLanes<A>), [=, &part](int64_t c, auto lanes) VF_INLINE {
        Vec<A> g = load(pg + c, lanes), res = {};
        if (kAct != kNone && pr) res = load(pr + c, lanes);
        const Vec<A> in = load(px + c, lanes);
        Vec<A> z = in;
        if constexpr (Algebra::kOther) z = load(pz + c, lanes);
        const Terms<A> terms = gradient_terms<kAct>(gate, in, z, g, res, part);
        if constexpr (Algebra::kOther) store(po + c, terms.scaled, lanes);
        store(pb + c, Algebra::kOther ? terms.through : terms.scaled + terms.through, lanes);
        if constexpr (kAct != kNone) store(pk + c, g, lanes);
      });
      for (int t = 0; t < 2; ++t) total[t] += sum_lanes<A>(part[t]);
    }
    out = {total[0], total[1]};
  });
  return out;
}

// dx = base + u d + v; base may be dx.
template <class Algebra, class T>
void self_gate_grad_row(const T* x, int64_t count, GateArrays<Acc<T>> k, const Acc<T>* base, T* dx) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    const auto gate = Lanes<Algebra, A>::of_row(k);
    const T* px = x;
    const A* pb = base;
    T* po = dx;
    for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
      const Vec<A> d = gate.deviation(load(px + c, lanes));
      store(po + c, load(pb + c, lanes) + gate.u * d + gate.v, lanes);
    });
  });
}

// Sums of columns. It writes the same as for a row, with dx as `base`.
template <class Algebra, class T, int kAct>
void self_gate_sums_columns(Matrix<const T> x, const T* scaled, GateArrays<Acc<T>> arrays, const T* grad,
                            const T* residual, T* kept, T* dx, T* dscaled, int64_t ld, Acc<T>* lower,
                            Acc<T>* upper) {
  using A = Acc<T>;
  ColumnTotals<A> totals(x.rows, x.cols, 2);
  double* const total[] = {totals.of(0), totals.of(1)};
  simd([=]() VF_INLINE {
    constexpr int K = Algebra::kShuffled ? 2 : 1;
    const int64_t count = x.cols / K;
    for (int64_t c = 0; c < x.cols; ++c) lower[c] = upper[c] = 0;
    const auto add_group = [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      A* const out[2] = {lower, upper};
      const T *px[R], *pz[R], *pg[R], *pr[R];
      T *pk[R], *po[R], *pd[R];
      for (int r = 0; r < R; ++r) {
        px[r] = x.row(r0 + r), pg[r] = grad + (r0 + r) * ld;
        pz[r] = Algebra::kOther ? scaled + (r0 + r) * ld : nullptr;
        pr[r] = residual ? residual + (r0 + r) * ld : nullptr;
        pk[r] = kAct != kNone ? kept + (r0 + r) * ld : nullptr;
        po[r] = dx + (r0 + r) * ld, pd[r] = Algebra::kOther ? dscaled + (r0 + r) * ld : nullptr;
      }
      for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
        Lanes<Algebra, A> gate[K];
        Vec<A> sum[K][2] = {};
        for (int i = 0; i < K; ++i) gate[i] = Lanes<Algebra, A>::of_columns(k, i * count + c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec<A> g[K], res[K] = {};
          load_result(pg[r], c, lanes, g);
          if (kAct != kNone && pr[r]) load_result(pr[r], c, lanes, res);
          for (int i = 0; i < K; ++i) {
            const Vec<A> in = load(px[r] + i * count + c, lanes);
            Vec<A> z = in;
            if constexpr (Algebra::kOther) z = load(pz[r] + i * count + c, lanes);
            const Terms<A> terms = gradient_terms<kAct>(gate[i], in, z, g[i], res[i], sum[i]);
            if constexpr (Algebra::kOther) store(pd[r] + i * count + c, terms.scaled, lanes);
            store(po[r] + i * count + c, Algebra::kOther ? terms.through : terms.scaled + terms.through,
                  lanes);
          }
          if constexpr (kAct != kNone) store_result(pk[r], c, lanes, g);
        }
        for (int i = 0; i < K; ++i) {
          for (int t = 0; t < 2; ++t) {
            A* at = out[t] + i * count + c;
            store(at, load(at, lanes) + sum[i][t], lanes);
          }
        }
      });
    };
    A* const sums[] = {lower, upper};
    add_in_chunks(x.rows, x.cols, sums, total, [&](int64_t begin, int64_t end) VF_INLINE {
      const Matrix<const T> rows{x.row(begin), x.ld, end - begin, x.cols};
      for_row_groups<true>(rows, [&](int64_t r, auto group) VF_INLINE { add_group(begin + r, group); });
    });
  });
}

// dx += u d + v, for columns.
template <class Algebra, class T>
void self_gate_grad_columns(Matrix<const T> x, GateArrays<Acc<T>> arrays, T* dx, int64_t ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_row_groups<true>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      const T* px[R];
      T* po[R];
      for (int r = 0; r < R; ++r) px[r] = x.row(r0 + r), po[r] = dx + (r0 + r) * ld;
      for_vectors<A>(x.cols, [=](int64_t c, auto lanes) VF_INLINE {
        const auto gate = Lanes<Algebra, A>::of_columns(k, c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<A> d = gate.deviation(load(px[r] + c, lanes));
          store(po[r] + c, load(po[r] + c, lanes) + gate.u * d + gate.v, lanes);
        }
      });
    });
  });
}

}  // namespace visattn
