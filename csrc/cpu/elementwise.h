// Element-wise passes: gates with residual and activation, their derivatives, and the affine form of every
// dx.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/activations.h"
#include "matrix.h"
#include "simd.h"
#include "simd_math.h"

namespace visattn {

template <int kAct, class V>
VF_INLINE inline V activate(V v) {
  if constexpr (kAct == kRelu) return v < V{} ? V{} : v;
  if constexpr (kAct == kSilu) return v * sigmoid_lanes(v);
  return v;
}

// g * act'(v)
template <int kAct, class V>
VF_INLINE inline V activate_grad(V g, V v) {
  if constexpr (kAct == kRelu) return v <= V{} ? V{} : g;
  if constexpr (kAct == kSilu) {
    const V s = sigmoid_lanes(v);
    return g * (s * (1 + v * (1 - s)));
  }
  return g;
}

// A gate with one factor for each row and one for each column: their product, or with `sum` their sum. Either
// may be null, and is then left out. `column` is padded.
template <class A>
struct Gate {
  const A *row, *column;
  bool sum = false;
};

// A scale and a shift for each row, or for each column.
template <class A>
struct Affine {
  const A *scale, *shift;
};

template <bool kRow, bool kColumn, bool kSum, class V>
VF_INLINE inline V gated(V v, V row, V column) {
  if constexpr (kSum) return v * (row + column);
  if constexpr (kRow) v = v * row;
  if constexpr (kColumn) v = v * column;
  return v;
}

// Takes rows that are not adjacent in memory four at a time, so that the columns' factors are loaded once for
// all four.
template <bool kColumn, class T, class F>
VF_INLINE inline void for_row_groups(const Matrix<T>& m, const F& f) {
  int64_t r = 0;
  if (kColumn && m.ld != m.cols) {
    for (; r + 4 <= m.rows; r += 4) f(r, std::integral_constant<int, 4>{});
  }
  for (; r < m.rows; ++r) f(r, std::integral_constant<int, 1>{});
}

// With kShift there is a shift for each row or each column, as for the gate.
template <class T, int kAct, bool kResidual, bool kRow, bool kColumn, bool kSum, bool kShift = false>
void apply_gate_as(Matrix<const T> x, Gate<Acc<T>> gate, const T* residual, T* y, int64_t dense_ld,
                   const Acc<T>* shift = nullptr) {
  static_assert(!kShift || kRow != kColumn);
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_row_groups<kColumn>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const T *px[R], *pr[R];
      T* py[R];
      Vec<A> row[R], added[R];
      for (int r = 0; r < R; ++r) {
        px[r] = x.row(r0 + r);
        pr[r] = kResidual ? residual + (r0 + r) * dense_ld : nullptr;
        py[r] = y + (r0 + r) * dense_ld;
        row[r] = set1<A>(kRow ? gate.row[r0 + r] : A(1));
        added[r] = set1<A>(kShift && kRow ? shift[r0 + r] : A(0));
      }
      cover_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        Vec<A> column = row[0], along = added[0];
        if constexpr (kColumn) column = load(gate.column + c);
        if constexpr (kShift && kColumn) along = load(shift + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec<A> v = gated<kRow, kColumn, kSum>(load(px[r] + c, lanes), row[r], column);
          if constexpr (kShift) v = v + (kRow ? added[r] : along);
          if constexpr (kResidual) v = v + load(pr[r] + c, lanes);
          store(py[r] + c, activate<kAct>(v), lanes);
        }
      });
    });
  });
}

template <class T, int kAct, bool kRow, bool kColumn, bool kSum>
void gate_grad_as(Matrix<const T> x, Gate<Acc<T>> gate, const T* grad, const T* residual, T* out,
                  int64_t dense_ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t r = 0; r < x.rows; ++r) {
      const T *px = x.row(r), *pg = grad + r * dense_ld, *pr = residual ? residual + r * dense_ld : nullptr;
      T* po = out + r * dense_ld;
      const Vec<A> row = set1<A>(kRow ? gate.row[r] : A(1));
      cover_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        Vec<A> column = row;
        if constexpr (kColumn) column = load(gate.column + c);
        Vec<A> v = gated<kRow, kColumn, kSum>(load(px + c, lanes), row, column);
        if (pr) v = v + load(pr + c, lanes);
        store(po + c, activate_grad<kAct>(load(pg + c, lanes), v), lanes);
      });
    }
  });
}

// Calls f with compile-time constants: is there a row factor, is there a column factor, are they added.
template <class A, class F>
void with_factors(Gate<A> gate, const F& f) {
  const std::true_type yes;
  const std::false_type no;
  if (gate.sum) {
    f(yes, yes, yes);
  } else if (gate.row && gate.column) {
    f(yes, yes, no);
  } else if (gate.row) {
    f(yes, no, no);
  } else {
    f(no, yes, no);
  }
}

// Calls f with the activation as a compile-time constant.
template <class F>
auto with_activation(int64_t activation, const F& f) {
  if (activation == kRelu) return f(std::integral_constant<int, kRelu>{});
  if (activation == kSilu) return f(std::integral_constant<int, kSilu>{});
  return f(std::integral_constant<int, kNone>{});
}

// Calls f with compile-time constants: the activation, and whether there is a residual.
template <class F>
void with_epilogue(int64_t activation, bool residual, const F& f) {
  with_activation(activation, [&](auto act) {
    if (residual) {
      f(act, std::true_type{});
    } else {
      f(act, std::false_type{});
    }
  });
}

// y = act(x * gate + residual). residual (may be null) and y are dense: rows dense_ld apart.
template <class T>
void apply_gate(Matrix<const T> x, Gate<Acc<T>> gate, const T* residual, T* y, int64_t dense_ld,
                int64_t activation) {
  with_factors(gate, [&](auto row, auto column, auto sum) {
    with_epilogue(activation, residual, [&](auto act, auto added) {
      apply_gate_as<T, decltype(act)::value, decltype(added)::value, decltype(row)::value,
                    decltype(column)::value, decltype(sum)::value>(x, gate, residual, y, dense_ld);
    });
  });
}

// y = act(x * scale + shift + residual), with factors of the rows (per_row) or the columns (padded); y and
// residual as above.
template <class T>
void apply_affine(Matrix<const T> x, bool per_row, Affine<Acc<T>> by, const T* residual, T* y,
                  int64_t dense_ld, int64_t activation) {
  with_epilogue(activation, residual, [&](auto act, auto added) {
    constexpr int kAct = decltype(act)::value;
    constexpr bool kAdded = decltype(added)::value;
    if (per_row) {
      apply_gate_as<T, kAct, kAdded, true, false, false, true>(x, {by.scale, nullptr}, residual, y, dense_ld,
                                                               by.shift);
    } else {
      apply_gate_as<T, kAct, kAdded, false, true, false, true>(x, {nullptr, by.scale}, residual, y, dense_ld,
                                                               by.shift);
    }
  });
}

// out = grad * act'(x * gate + residual), for an activation other than kNone.
template <class T>
void gate_grad(Matrix<const T> x, Gate<Acc<T>> gate, const T* grad, const T* residual, T* out,
               int64_t dense_ld, int64_t activation) {
  with_factors(gate, [&](auto row, auto column, auto sum) {
    constexpr bool kRow = decltype(row)::value, kColumn = decltype(column)::value,
                   kSum = decltype(sum)::value;
    if (activation == kRelu) {
      gate_grad_as<T, kRelu, kRow, kColumn, kSum>(x, gate, grad, residual, out, dense_ld);
    } else {
      gate_grad_as<T, kSilu, kRow, kColumn, kSum>(x, gate, grad, residual, out, dense_ld);
    }
  });
}

// out = grad * scale + shift, with a scale and a shift for each row or each column (padded).
template <class T, bool kPerRow>
void affine(Matrix<const T> grad, const Acc<T>* scale, const Acc<T>* shift, T* out) {
  apply_gate_as<T, kNone, false, kPerRow, !kPerRow, false, true>(
      grad, {kPerRow ? scale : nullptr, kPerRow ? nullptr : scale}, nullptr, out, grad.ld, shift);
}

// out = (grad * row.scale + row.shift) * column.scale + column.shift; with kColumnInside the column's factors
// come first. The inner pair belongs to pixels, the outer one to channels.
template <class T, bool kColumnInside>
void affine_twice(Matrix<const T> grad, Affine<Acc<T>> row, Affine<Acc<T>> column, T* out) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_row_groups<true>(grad, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      Vec<A> a[R], b[R];
      const T* pg[R];
      T* po[R];
      for (int r = 0; r < R; ++r) {
        a[r] = set1<A>(row.scale[r0 + r]), b[r] = set1<A>(row.shift[r0 + r]);
        pg[r] = grad.row(r0 + r), po[r] = out + (r0 + r) * grad.ld;
      }
      cover_vectors<A>(grad.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> s = load(column.scale + c), t = load(column.shift + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<A> g = load(pg[r] + c, lanes);
          store(po[r] + c, kColumnInside ? (g * s + t) * a[r] + b[r] : (g * a[r] + b[r]) * s + t, lanes);
        }
      });
    });
  });
}

// out = grad * (row.scale + column.scale) + row.shift * column.shift + constant, with a constant for each row
// (kConstantPerRow) or each column (padded).
template <class T, bool kConstantPerRow>
void affine_sum(Matrix<const T> grad, Affine<Acc<T>> row, Affine<Acc<T>> column, const Acc<T>* constant,
                T* out) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_row_groups<true>(grad, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      Vec<A> a[R], b[R], fixed[R];
      const T* pg[R];
      T* po[R];
      for (int r = 0; r < R; ++r) {
        a[r] = set1<A>(row.scale[r0 + r]), b[r] = set1<A>(row.shift[r0 + r]);
        fixed[r] = set1<A>(kConstantPerRow ? constant[r0 + r] : A(0));
        pg[r] = grad.row(r0 + r), po[r] = out + (r0 + r) * grad.ld;
      }
      for_vectors<A>(grad.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> s = load(column.scale + c), t = load(column.shift + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<A> k = kConstantPerRow ? fixed[r] : load(constant + c);
          store(po[r] + c, load(pg[r] + c, lanes) * (a[r] + s) + (b[r] * t + k), lanes);
        }
      });
    });
  });
}

// out = value[r] (kPerRow) or value[c] (padded).
template <class T, bool kPerRow>
void fill(Matrix<T> out, const Acc<T>* value) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t r = 0; r < out.rows; ++r) {
      T* po = out.row(r);
      const Vec<A> v = set1<A>(kPerRow ? value[r] : A(0));
      for_vectors<A>(out.cols, [&](int64_t c, auto lanes)
                                   VF_INLINE { store(po + c, kPerRow ? v : load(value + c), lanes); });
    }
  });
}

}  // namespace visattn
