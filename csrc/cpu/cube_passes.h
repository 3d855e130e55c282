// Passes over a cube with a gate for each of its faces: y, the gates' gradients, and dx.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cube.h"
#include "elementwise.h"
#include "matrix.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace visattn {

// The values of one image's faces, padded: each face divided by a number of its own, zeros for one left out.
template <class V>
struct FaceValues {
  Buffer<V> ab, ad, bd;

  explicit FaceValues(int64_t A, int64_t B, int64_t D) : ab(A * B), ad(A * D), bd(B * D) {}

  template <class From>
  void set(const Faces& f, const From* values, int64_t A, int64_t B, int64_t D, int64_t by_ab = 1,
           int64_t by_ad = 1, int64_t by_bd = 1) {
    const auto copy = [&](Buffer<V>& to, int64_t begin, int64_t count, int64_t by) {
      for (int64_t i = 0; begin >= 0 && i < count; ++i) {
        to[i] = static_cast<V>(values[begin + i]) / static_cast<V>(by);
      }
    };
    copy(ab, f.ab, A * B, by_ab);
    copy(ad, f.ad, A * D, by_ad);
    copy(bd, f.bd, B * D, by_bd);
  }
};

// The gates of one image, each divided by the number of gates that are averaged.
template <class T>
struct Gates : FaceValues<Acc<T>> {
  using FaceValues<Acc<T>>::FaceValues;
  void set(const Faces& f, const Acc<T>* gates, const Cube<const T>& q) {
    FaceValues<Acc<T>>::set(f, gates, q.A, q.B, q.D, f.count(), f.count(), f.count());
  }
};

// Calls f(b0, b1) for a plane's rows, as many at a time as stay in the L1 cache.
template <class F>
VF_INLINE inline void for_rows(int64_t B, int64_t D, const F& f) {
  const int64_t rows = std::max<int64_t>(1, 2048 / D);
  for (int64_t b = 0; b < B; b += rows) f(b, b + rows < B ? b + rows : B);
}

// Calls f(i, at, lanes) for the vectors of rows [b0, b1): i and at are the offsets from the plane's element
// [b0, 0] in dense memory and in the cube.
template <class A, class T, class F>
VF_INLINE inline void for_elements(const Cube<T>& q, int64_t b0, int64_t b1, const F& f) {
  const int64_t width = q.flat() ? (b1 - b0) * q.D : q.D;
  for (int64_t b = b0; b < b1; b += q.flat() ? b1 - b0 : 1) {
    const int64_t row = b - b0;
    cover_vectors<A>(width,
                     [&](int64_t d, auto lanes) VF_INLINE { f(row * q.D + d, row * q.stride_b + d, lanes); });
  }
}

// out[b, d] = rows[b] + columns[d] for `count` dense rows. A row's last vector may write past its end; the
// next row overwrites that, or it is padding.
template <class A>
VF_INLINE inline void outer_sum(const A* rows, const A* columns, int64_t count, int64_t D, A* out) {
  for (int64_t b = 0; b < count; ++b) {
    const Vec<A> row = set1<A>(rows[b]);
    for (int64_t d = 0; d < D; d += kLanes<A>) store(out + b * D + d, row + load(columns + d));
  }
}

// y = act(x * gate + residual), or with kGrad y = grad * act'(x * gate + residual), for planes [a0, a1). All
// maps but x are dense.
template <class T, int kAct, bool kGrad>
void scale_planes(const Cube<const T>& q, const Gates<T>& gates, const T* grad, const T* residual, T* y,
                  int64_t a0, int64_t a1) {
  using A = Acc<T>;
  Buffer<A> factors(std::max<int64_t>(2048, q.D));
  A* factor = factors.get();
  const A *ab = gates.ab.get(), *ad = gates.ad.get(), *bd = gates.bd.get();
  simd([=]() VF_INLINE {
    for (int64_t a = a0; a < a1; ++a) {
      for_rows(q.B, q.D, [&](int64_t b0, int64_t b1) VF_INLINE {
        outer_sum(ab + a * q.B + b0, ad + a * q.D, b1 - b0, q.D, factor);
        const int64_t skip = (a * q.B + b0) * q.D;
        const T* from = q.plane(a).row(b0);
        for_elements<A>(q, b0, b1, [&](int64_t i, int64_t at, auto lanes) VF_INLINE {
          Vec<A> v = load(from + at, lanes) * (load(factor + i) + load(bd + b0 * q.D + i));
          if (residual) v = v + load(residual + skip + i, lanes);
          if constexpr (kGrad) {
            store(y + skip + i, activate_grad<kAct>(load(grad + skip + i, lanes), v), lanes);
          } else {
            store(y + skip + i, activate<kAct>(v), lanes);
          }
        });
      });
    }
  });
}

// The gates' gradients, sums of g x over each axis, for planes [a0, a1): faces [A, B] and [A, D] to `out`,
// their share of face [B, D] added to `across` [pieces, pitch].
template <class T>
void sum_planes(const Cube<const T>& q, const Cube<const T>& g, const Faces& f, int64_t a0, int64_t a1,
                Acc<T>* across, int64_t pitch, Acc<T>* out) {
  using A = Acc<T>;
  Buffer<A> rows(q.B), columns(q.D);
  const A share = A(1) / static_cast<A>(f.count());
  for (int64_t a = a0; a < a1; ++a) {
    if (f.ab >= 0) {
      products<T, true, true>(q.plane(a), g.plane(a), nullptr, nullptr, rows.get(), columns.get());
      for (int64_t b = 0; b < q.B; ++b) out[f.ab + a * q.B + b] = rows[b] * share;
    } else {
      products<T, false, true>(q.plane(a), g.plane(a), nullptr, nullptr, nullptr, columns.get());
    }
    for (int64_t d = 0; d < q.D; ++d) out[f.ad + a * q.D + d] = columns[d] * share;
  }
  if (f.bd < 0) return;
  simd([=]() VF_INLINE {
    for (int64_t b = 0; b < q.pieces(); ++b) {
      const Matrix<const T> xs = q.piece(b), gs{g.p + b * g.stride_b, g.stride_a, g.A, xs.cols};
      A* to = across + b * pitch;
      int64_t a = a0;
      for (; a + 4 <= a1; a += 4) products_group<T, false, true, 4>(xs, gs, a, nullptr, nullptr, nullptr, to);
      for (; a < a1; ++a) products_group<T, false, true, 1>(xs, gs, a, nullptr, nullptr, nullptr, to);
    }
  });
}

// The gradients of one image's pooled faces: the means' for each element, the maxima's, and the maxima's
// indices.
template <class A>
struct PooledGrad {
  FaceValues<A> mean, max;
  FaceValues<Index<A>> at;

  PooledGrad(int64_t A_, int64_t B, int64_t D) : mean(A_, B, D), max(A_, B, D), at(A_, B, D) {}

  void set(const Faces& f, const A* dpooled, const int32_t* index, int64_t A_, int64_t B, int64_t D) {
    max.set(f, dpooled, A_, B, D);
    mean.set(f, dpooled + f.size, A_, B, D, D, B, A_);
    at.set(f, index, A_, B, D);
  }
};

// dx = g * gate + the gradients of the pooled faces, for planes [a0, a1).
template <class T>
void input_grad_planes(const Cube<const T>& g, const Gates<T>& gates, const PooledGrad<Acc<T>>& pooled, T* dx,
                       int64_t a0, int64_t a1) {
  using A = Acc<T>;
  const int64_t most = std::max<int64_t>(2048, g.D);
  Buffer<A> factors(most), shifts(most);
  A *factor = factors.get(), *shift = shifts.get();
  const A *ab = gates.ab.get(), *ad = gates.ad.get(), *bd = gates.bd.get();
  const A *mean_ab = pooled.mean.ab.get(), *mean_ad = pooled.mean.ad.get(), *mean_bd = pooled.mean.bd.get();
  const A *max_ab = pooled.max.ab.get(), *max_ad = pooled.max.ad.get(), *max_bd = pooled.max.bd.get();
  const Index<A>*at_ab = pooled.at.ab.get(), *at_ad = pooled.at.ad.get(), *at_bd = pooled.at.bd.get();
  simd([=]() VF_INLINE {
    const Vec<A> none = set1<A>(0);
    for (int64_t a = a0; a < a1; ++a) {
      for_rows(g.B, g.D, [&](int64_t b0, int64_t b1) VF_INLINE {
        outer_sum(ab + a * g.B + b0, ad + a * g.D, b1 - b0, g.D, factor);
        for (int64_t b = b0; b < b1; ++b) {  // as outer_sum, with the maxima of this plane
          const int64_t row = a * g.B + b;
          const Vec<A> mean = set1<A>(mean_ab[row]), max = set1<A>(max_ab[row]);
          const IVec<A> here = set1_index<A>(b), at = set1_index<A>(at_ab[row]);
          for (int64_t d = 0; d < g.D; d += kLanes<A>) {
            const int64_t column = a * g.D + d;
            Vec<A> v = mean + load(mean_ad + column);
            v += iota<A>() + set1_index<A>(d) == at ? max : none;
            v += load_index<A>(at_ad + column) == here ? load(max_ad + column) : none;
            store(shift + (b - b0) * g.D + d, v);
          }
        }
        const IVec<A> here = set1_index<A>(a);
        const int64_t skip = (a * g.B + b0) * g.D, in_plane = b0 * g.D;
        for_elements<A>(g, b0, b1, [&](int64_t i, int64_t, auto lanes) VF_INLINE {
          const int64_t p = in_plane + i;
          Vec<A> v = load(shift + i) + load(mean_bd + p);
          v += load_index<A>(at_bd + p) == here ? load(max_bd + p) : none;
          v += load(g.p + skip + i, lanes) * (load(factor + i) + load(bd + p));
          store(dx + skip + i, v, lanes);
        });
      });
    }
  });
}

}  // namespace visattn
