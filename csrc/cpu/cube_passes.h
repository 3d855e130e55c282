// Passes over the images of a map along each of their axes, and over their faces.
//
// An image is a cube [A, B, D] whose last axis is dense: [C, H, W] in nchw, [H, W, C] in nhwc. Each axis is
// pooled to a face of the other two: over D to [A, B], over B to [A, D], over A to [B, D]. Faces [F] of an
// image follow each other in a fixed order: C and W, H and C, H and W. A face lies as the cube does.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "column_stats.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "products.h"
#include "row_stats.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {

constexpr int64_t kPlanes = 8;  // planes [B, D] that are added to the face [B, D] at a time

// An image of x, of which planes and rows may lie apart; and an image of a dense map.
template <class T>
struct Cube {
  T* p;
  int64_t A, B, D, stride_a, stride_b;

  Matrix<T> plane(int64_t a) const { return {p + a * stride_a, stride_b, B, D}; }
  // Element [b, d] of all planes, as a matrix with a row for each plane, from b on: of a whole plane if its
  // rows follow each other, else of one row of it.
  bool flat() const { return stride_b == D; }
  int64_t pieces() const { return flat() ? 1 : B; }
  Matrix<T> piece(int64_t b) const { return {p + b * stride_b, stride_a, A, flat() ? B * D : D}; }
};

template <class T>
Cube<const T> cube_of(const T* image, const Shape& s, bool nhwc, int64_t ld) {
  if (nhwc) return {image, s.H, s.W, s.C, s.W * ld, ld};
  return {image, s.C, s.H, s.W, ld, s.W};
}

// Where the faces of an image begin; -1: left out.
struct Faces {
  int64_t ab, ad, bd, size;
  int64_t count() const { return 1 + (ab >= 0) + (bd >= 0); }
};

inline Faces faces_of(const Shape& s, bool nhwc, bool spatial) {
  const int64_t hc = s.C * s.W, hw = hc + s.H * s.C, end = hw + (spatial ? s.P : 0);
  if (nhwc) return {spatial ? hw : -1, hc, 0, end};
  return {hc, 0, spatial ? hw : -1, end};
}

// The faces that gates [N, F] have.
inline Faces faces_of(const Shape& s, bool nhwc, const Tensor& gates) {
  const Faces all = faces_of(s, nhwc, true), two = faces_of(s, nhwc, false);
  const int64_t size = gates.dim() ? gates.size(gates.dim() - 1) : 0;
  STD_TORCH_CHECK(size == all.size || size == two.size, "gates must have ", all.size, " or ", two.size,
                  " values an image, got ", size);
  return size == all.size ? all : two;
}

// Planes in at most four parts, whose sums over the planes are added in order.
inline Split plane_parts(int64_t planes) {
  return Split(planes, ((planes + 3) / 4 + kPlanes - 1) / kPlanes * kPlanes);
}

// Planes in pieces of about 64 KB, which share nothing.
template <class T>
Split plane_pieces(const Cube<const T>& q) {
  return Split(q.A, (int64_t{1} << 16) / static_cast<int64_t>(sizeof(T) * q.B * q.D));
}

// ---- maximum and mean over each axis

// One part's sums and maxima over its planes, [B, D], rows padded to whole vectors if they lie apart.
template <class A>
struct Pooled {
  int64_t pitch, size;
  Buffer<A> sum, max;
  Buffer<Index<A>> at;

  Pooled(int64_t B, int64_t D, bool flat)
      : pitch(flat ? D : (D + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        size(B * pitch),
        sum(size),
        max(size),
        at(size) {}
};

// Adds planes [a0, a1) to the part.
template <class T>
void pool_planes(const Cube<const T>& q, int64_t a0, int64_t a1, bool first, Pooled<Acc<T>>& out) {
  using A = Acc<T>;
  A *sum = out.sum.get(), *max = out.max.get();
  Index<A>* at = out.at.get();
  const int64_t size = out.size, pitch = out.pitch;
  simd([=]() VF_INLINE {
    for (int64_t i = 0; first && i < size; i += kLanes<A>) {
      store(sum + i, set1<A>(0));
      store(max + i, set1<A>(-std::numeric_limits<A>::infinity()));
      store_index<A>(at + i, IVec<A>{});
    }
    for (int64_t b = 0; b < q.pieces(); ++b) {
      const int64_t i = b * pitch;
      int64_t a = a0;
      for (; a + kPlanes <= a1; a += kPlanes) {
        column_stats_group<T, true, false, kPlanes>(q.piece(b), a, nullptr, sum + i, max + i, at + i);
      }
      for (; a < a1; ++a) {
        column_stats_group<T, true, false, 1>(q.piece(b), a, nullptr, sum + i, max + i, at + i);
      }
    }
  });
}

// into += from: parts in order, so that the first of equal maxima stays.
template <class A>
void merge(Pooled<A>& into, const Pooled<A>& from) {
  A *sum = into.sum.get(), *max = into.max.get();
  Index<A>* at = into.at.get();
  const A *more = from.sum.get(), *other = from.max.get();
  const Index<A>* others = from.at.get();
  const int64_t size = into.size;
  simd([=]() VF_INLINE {
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Vec<A> a = load(max + i), b = load(other + i);
      store(sum + i, load(sum + i) + load(more + i));
      store_index<A>(at + i, b > a ? load_index<A>(others + i) : load_index<A>(at + i));
      store(max + i, b > a ? b : a);
    }
  });
}

// Where the results of one image go: its maxima and means [F] each, and the maxima's indices.
template <class A>
struct PooledFaces {
  A *max, *mean;
  int32_t* at;

  void put(int64_t to, int64_t count, const A* sum, const A* top, const Index<A>* where, int64_t by) const {
    for (int64_t i = 0; i < count; ++i) {
      max[to + i] = top[i];
      mean[to + i] = sum[i] / static_cast<A>(by);
      at[to + i] = static_cast<int32_t>(where[i]);
    }
  }
};

// Faces [A, B] and [A, D] of planes [a0, a1), whose elements are in cache for the third one.
template <class T>
void pool_inside(const Cube<const T>& q, const Faces& f, int64_t a0, int64_t a1,
                 const PooledFaces<Acc<T>>& out) {
  using A = Acc<T>;
  const int64_t rows = (a1 - a0) * q.B, most = std::max(rows, q.D);
  Buffer<A> sum(most), max(most);
  Buffer<Index<A>> at(most);
  if (f.ab >= 0) {
    const bool together = q.stride_a == q.B * q.stride_b;  // rows of all planes, one matrix
    for (int64_t a = a0; a < a1; a += together ? a1 - a0 : 1) {
      const int64_t count = together ? rows : q.B, r = (a - a0) * q.B;
      row_stats<T, true, false>(Matrix<const T>{q.p + a * q.stride_a, q.stride_b, count, q.D}, nullptr,
                                &sum[r], &max[r], &at[r]);
    }
    out.put(f.ab + a0 * q.B, rows, sum.get(), max.get(), at.get(), q.D);
  }
  for (int64_t a = a0; a < a1; ++a) {
    column_stats<T, true, false>(q.plane(a), nullptr, sum.get(), max.get(), at.get());
    out.put(f.ad + a * q.D, q.D, sum.get(), max.get(), at.get(), q.B);
  }
}

// The face [B, D] of all parts. A NaN wins the maximum, the first one of several.
template <class T>
void pool_across(const Cube<const T>& q, const Faces& f, Pooled<Acc<T>>& all,
                 const PooledFaces<Acc<T>>& out) {
  using A = Acc<T>;
  for (int64_t b = 0; b < q.B; ++b) {
    A *sum = &all.sum[b * all.pitch], *max = &all.max[b * all.pitch];
    Index<A>* at = &all.at[b * all.pitch];
    for (int64_t d = 0; d < q.D; ++d) {
      for (int64_t a = 0; sum[d] != sum[d] && a < q.A; ++a) {
        const A v = static_cast<A>(q.plane(a).row(b)[d]);
        if (v == v) continue;
        max[d] = v, at[d] = static_cast<Index<A>>(a);
        break;
      }
    }
    out.put(f.bd + b * q.D, q.D, sum, max, at, q.A);
  }
}

// ---- element by element

// Values of one image's faces, each divided by its own number; zeros for a face that is left out. Padded.
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

// The gates of one image, each a share of their mean.
template <class T>
struct Gates : FaceValues<Acc<T>> {
  using FaceValues<Acc<T>>::FaceValues;
  void set(const Faces& f, const Acc<T>* gates, const Cube<const T>& q) {
    FaceValues<Acc<T>>::set(f, gates, q.A, q.B, q.D, f.count(), f.count(), f.count());
  }
};

// Calls f(b0, b1) over a plane's rows, as many at a time as stay in the L1 cache.
template <class F>
VF_INLINE inline void for_rows(int64_t B, int64_t D, const F& f) {
  const int64_t rows = std::max<int64_t>(1, 2048 / D);
  for (int64_t b = 0; b < B; b += rows) f(b, b + rows < B ? b + rows : B);
}

// Calls f(offset from the plane's element [b0, 0] in dense memory, in the cube, lanes) over rows [b0, b1).
template <class A, class T, class F>
VF_INLINE inline void for_elements(const Cube<T>& q, int64_t b0, int64_t b1, const F& f) {
  const int64_t width = q.flat() ? (b1 - b0) * q.D : q.D;
  for (int64_t b = b0; b < b1; b += q.flat() ? b1 - b0 : 1) {
    const int64_t row = b - b0;
    cover_vectors<A>(width,
                     [&](int64_t d, auto lanes) VF_INLINE { f(row * q.D + d, row * q.stride_b + d, lanes); });
  }
}

// out[b, d] = rows[b] + columns[d] of `count` rows, dense. What a row's last vector writes behind its end the
// next row overwrites, or it is padding.
template <class A>
VF_INLINE inline void outer_sum(const A* rows, const A* columns, int64_t count, int64_t D, A* out) {
  for (int64_t b = 0; b < count; ++b) {
    const Vec<A> row = set1<A>(rows[b]);
    for (int64_t d = 0; d < D; d += kLanes<A>) store(out + b * D + d, row + load(columns + d));
  }
}

// y = act(x * gate + residual), or with kGrad y = grad * act'(x * gate + residual), of planes [a0, a1). All
// but x are dense.
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

// ---- the gates' gradients: sums of g x over each axis

// The faces of planes [a0, a1) but for [B, D], of which their share is added to `across`, [pieces, pitch].
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

// ---- dx

// What the pooled faces of one image get: the means' gradients for each element, the maxima's, and where they
// go.
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

// dx = g * gate + the gradients of the pooled faces, of planes [a0, a1).
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
