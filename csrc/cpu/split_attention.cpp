// S2-MLPv2's split attention. One map u [N, 3C, H, W] holds three branches; the first two are shifted by a
// pixel as they are read. A pixel at the border keeps its own value.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "../common/activations.h"
#include "branches.h"
#include "channel_pool.h"
#include "image_matrix.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"
#include "wide_sums.h"

namespace visattn {
namespace {

constexpr int K = 3;

// The direction that a channel's values come from.
enum From : int { kAbove = 0, kBelow = 1, kLeft = 2, kRight = 3 };

// Quarter q of branch 0 comes from direction q, that of branch 1 from the corresponding direction of the
// other axis.
VF_INLINE inline int direction(int branch, int64_t quarter) {
  return static_cast<int>((quarter + 2 * branch) % 4);
}

template <class T>
struct Shifted {
  Shape s;  // of one branch
  FeatureMap u;
  bool nhwc;
  int64_t quarter;
  Split parts;

  explicit Shifted(const Tensor& map)
      : s(branch_shape(map)),
        u(feature_map(map)),
        nhwc(u.nhwc),
        quarter(s.C / 4),
        parts(row_parts<T>(s, nhwc)) {}

  static Shape branch_shape(const Tensor& map) {
    Shape s = shape_of(map);
    s.C /= K;
    return s;
  }
  int64_t dense_ld() const { return nhwc ? s.C : s.P; }
  int64_t quarter_of(int64_t c) const { return quarter ? std::min<int64_t>(c / quarter, 3) : 3; }
  int64_t quarter_end(int64_t q) const { return q == 3 ? s.C : (q + 1) * quarter; }

  // The pixel whose value moves to p.
  int64_t source(int64_t p, int from) const {
    const int64_t h = p / s.W, w = p % s.W;
    if (from == kAbove) return h > 0 ? p - s.W : p;
    if (from == kBelow) return h + 1 < s.H ? p + s.W : p;
    if (from == kLeft) return w > 0 ? p - 1 : p;
    return w + 1 < s.W ? p + 1 : p;
  }

  // The pixels that p's value moves to: the next one, and p itself at the border; -1 for none.
  void targets(int64_t p, int from, int64_t (&to)[2]) const {
    const int opposite = from ^ 1;
    const int64_t next = source(p, opposite);
    to[0] = next != p ? next : -1;
    to[1] = source(p, from) == p ? p : -1;
  }

  // Calls f(first channel, end, rows) for each quarter of pixel p's channels (nhwc); the rows begin at that
  // channel.
  template <class F>
  VF_INLINE void each_quarter(int64_t n, int64_t p, const F& f) const {
    const T* image = u.image<T>(n);
    for (int64_t q = quarter ? 0 : 3; q < 4; ++q) {
      const int64_t c = q * quarter;
      f(c, quarter_end(q),
        Rows<const T, K>{{image + source(p, direction(0, q)) * u.ld + c,
                          image + source(p, direction(1, q)) * u.ld + s.C + c,
                          image + p * u.ld + 2 * s.C + c}});
    }
  }

  // Channel c of the three branches (nchw); `planes` [2, P] receives the shifted ones.
  Rows<const T, K> shifted_planes(int64_t n, int64_t c, T* planes) const {
    for (int k = 0; k < 2; ++k) shift_plane(channel(n, k, c), direction(k, quarter_of(c)), planes + k * s.P);
    return {{planes, planes + s.P, channel(n, 2, c)}};
  }

  const T* channel(int64_t n, int k, int64_t c) const { return u.image<T>(n) + (k * s.C + c) * u.ld; }

 private:
  void shift_plane(const T* in, int from, T* out) const {
    const int64_t W = s.W, rest = s.P - W;
    if (from == kAbove) {
      std::copy_n(in, W, out), std::copy_n(in, rest, out + W);
    } else if (from == kBelow) {
      std::copy_n(in + W, rest, out), std::copy_n(in + rest, W, out + rest);
    } else {
      const int64_t kept = from == kLeft ? 0 : W - 1, left = from == kLeft ? 1 : 0, right = 1 - left;
      for (int64_t h = 0; h < s.H; ++h) {
        const T* row = in + h * W;
        std::copy_n(row + right, W - 1, out + h * W + left);
        out[h * W + kept] = row[kept];
      }
    }
  }
};

// out = the sum of v * gate + shift over those of a and b that are not null, 0 for none.
template <class T, bool kPerRow>
VF_INLINE inline void gather_row(const T* a, const T* b, const Factor<Acc<T>, kPerRow>& gate,
                                 const Factor<Acc<T>, kPerRow>& shift, T* out, int64_t cols) {
  for_vectors<Acc<T>>(cols, [&](int64_t c, auto lanes) VF_INLINE {
    Vec<Acc<T>> v = set1<Acc<T>>(0);
    if (a) v = load(a + c, lanes) * gate.at(c) + shift.at(c);
    if (b) v += load(b + c, lanes) * gate.at(c) + shift.at(c);
    store(out + c, v, lanes);
  });
}

Tensor shift_total(Tensor u) {
  return dispatch(u, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shifted<T> in(u);
    const Shape& s = in.s;
    Tensor total = empty({s.N, s.C}, kDtype<A>);
    for_images(s.N, K * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      ChannelPartials<A> sums(s.C, in.nhwc ? in.parts.count : 1);
      for (int64_t n = begin; n < end; ++n) {
        workers.each(in.parts.count, [&](int64_t b, int64_t e) {
          Buffer<T> planes(in.nhwc ? 0 : 2 * s.P);
          for (int64_t i = b; i < e; ++i) {
            A* sum = sums.part(in.nhwc ? i : 0);
            const int64_t first = in.parts.begin(i), last = in.parts.end(i);
            if (in.nhwc) std::fill_n(sum, s.C, A(0));
            ColumnTotals<A> totals(in.nhwc ? last - first : 0, s.C);
            A* const sums_of_part[] = {sum};
            double* const wide[] = {totals.of(0)};
            simd([&]() VF_INLINE {
              for (int64_t r = first; !in.nhwc && r < last; ++r) {
                sum[r] = row_total<T, kNone, K>(in.shifted_planes(n, r, planes.get()), s.P);
              }
              if (!in.nhwc) return;
              add_in_chunks(last - first, s.C, sums_of_part, wide, [&](int64_t r, int64_t end) VF_INLINE {
                for (; r < end; ++r) {
                  in.each_quarter(n, first + r,
                                  [&](int64_t c, int64_t c1, const Rows<const T, K>& x)
                                      VF_INLINE { add_rows<T, kNone, K>(x, c1 - c, sum + c); });
                }
              });
            });
          }
        });
        sums.sum(data<A>(total) + n * s.C);
      }
    });
    return total;
  });
}

Tensor shift_sum(Tensor u, Tensor gate) {
  return dispatch(u, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shifted<T> in(u);
    const Shape& s = in.s;
    Tensor y = empty_map(s, in.nhwc, u.scalar_type());
    for_images(s.N, K * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> g(K * s.C);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(gate) + n * K * s.C, K * s.C, g.get());
        T* out = data<T>(y) + n * s.C * s.P;
        workers.each(in.parts.count, [&](int64_t b, int64_t e) {
          Buffer<T> planes(in.nhwc ? 0 : 2 * s.P);
          const int64_t r0 = in.parts.begin(b), r1 = in.parts.end(e - 1);
          simd([&]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              T* row = out + r * in.dense_ld();
              if (in.nhwc) {
                in.each_quarter(n, r, [&](int64_t c, int64_t c1, const Rows<const T, K>& x) VF_INLINE {
                  using F = Factor<A, false>;
                  const F gates[K] = {F(g.get() + c), F(g.get() + s.C + c), F(g.get() + 2 * s.C + c)};
                  weigh_rows<T, kNone, false, K>(x, gates, row + c, c1 - c);
                });
              } else {
                using F = Factor<A, true>;
                const F gates[K] = {F(g.get() + r), F(g.get() + s.C + r), F(g.get() + 2 * s.C + r)};
                weigh_rows<T, kNone, true, K>(in.shifted_planes(n, r, planes.get()), gates, row, s.P);
              }
            }
          });
        });
      }
    });
    return y;
  });
}

Tensor shift_dot(Tensor grad, Tensor u) {
  return dispatch(u, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shifted<T> in(u);
    const Shape& s = in.s;
    const FeatureMap g = dense_map(grad, s, in.nhwc);
    Tensor dgate = empty({s.N, K, s.C}, kDtype<A>);
    for_images(s.N, (K + 1) * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const int64_t count = in.nhwc ? in.parts.count : 1;
      ChannelPartials<A> dots[K] = {{s.C, count}, {s.C, count}, {s.C, count}};
      for (int64_t n = begin; n < end; ++n) {
        workers.each(in.parts.count, [&](int64_t b, int64_t e) {
          Buffer<T> planes(in.nhwc ? 0 : 2 * s.P);
          for (int64_t i = b; i < e; ++i) {
            Rows<A, K> dot;
            for (int k = 0; k < K; ++k) {
              dot.p[k] = dots[k].part(in.nhwc ? i : 0);
              if (in.nhwc) std::fill_n(dot.p[k], s.C, A(0));
            }
            const int64_t first = in.parts.begin(i), last = in.parts.end(i);
            ColumnTotals<A> totals(in.nhwc ? last - first : 0, s.C, K);
            double* const wide[K] = {totals.of(0), totals.of(1), totals.of(2)};
            const T* pg = g.image<T>(n);
            simd([&]() VF_INLINE {
              for (int64_t r = first; !in.nhwc && r < last; ++r) {
                A total[K];
                row_dots<T, kNone, K>(pg + r * g.ld, in.shifted_planes(n, r, planes.get()), s.P, total);
                for (int k = 0; k < K; ++k) dot.p[k][r] = total[k];
              }
              if (!in.nhwc) return;
              add_in_chunks(last - first, s.C, dot.p, wide, [&](int64_t b1, int64_t e1) VF_INLINE {
                for (int64_t r = first + b1; r < first + e1; ++r) {
                  in.each_quarter(n, r, [&](int64_t c, int64_t c1, const Rows<const T, K>& x) VF_INLINE {
                    const Rows<A, K> to = {{dot.p[0] + c, dot.p[1] + c, dot.p[2] + c}};
                    add_dots<T, kNone, K>(pg + r * g.ld + c, x, c1 - c, to);
                  });
                }
              });
            });
          }
        });
        for (int k = 0; k < K; ++k) dots[k].sum(data<A>(dgate) + (n * K + k) * s.C);
      }
    });
    return dgate;
  });
}

// One channel of a branch's gradient (nchw): the gradients of the pixels that its values moved to, row by
// row.
template <class T>
VF_INLINE inline void gather_plane(const Shifted<T>& in, const T* grad, int from, Acc<T> gate, Acc<T> shift,
                                   T* out) {
  using F = Factor<Acc<T>, true>;
  const int64_t W = in.s.W;
  const F scale(&gate), add(&shift);
  for (int64_t h = 0; h < in.s.H; ++h) {
    const T* row = grad + h * W;
    T* to = out + h * W;
    if (from == kAbove || from == kBelow) {
      int64_t p[2];
      in.targets(h * W, from, p);
      gather_row<T, true>(p[0] < 0 ? nullptr : grad + p[0], p[1] < 0 ? nullptr : grad + p[1], scale, add, to,
                          W);
    } else {
      const int64_t left = from == kLeft ? 1 : 0, kept = left ? 0 : W - 1, lost = W - 1 - kept;
      gather_row<T, true>(row + left, nullptr, scale, add, to + 1 - left, W - 1);
      if (W > 1) to[lost] = T(Acc<T>(0));
      Acc<T> v = static_cast<Acc<T>>(row[kept]) * gate + shift;
      if (W > 1) v += static_cast<Acc<T>>(row[left ? 1 : W - 2]) * gate + shift;
      to[kept] = static_cast<T>(v);
    }
  }
}

Tensor shift_grad(Tensor grad, Tensor u, Tensor gate, Tensor dtotal) {
  return dispatch(u, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shifted<T> in(u);
    const Shape& s = in.s;
    const Shape whole = shape_of(u);
    const FeatureMap g = dense_map(grad, s, in.nhwc);
    Tensor du = empty_map(whole, in.nhwc, u.scalar_type());
    for_images(s.N, (K + 1) * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> gates(K * s.C), shift(s.C);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(gate) + n * K * s.C, K * s.C, gates.get());
        std::copy_n(data<A>(dtotal) + n * s.C, s.C, shift.get());
        const T* pg = g.image<T>(n);
        T* out = data<T>(du) + n * whole.C * s.P;
        workers.each(in.parts.count, [&](int64_t b, int64_t e) {
          const int64_t r0 = in.parts.begin(b), r1 = in.parts.end(e - 1);
          simd([&]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              for (int k = 0; k < K && !in.nhwc; ++k) {
                const A scale = gates[k * s.C + r], add = shift[r];
                T* plane = out + (k * s.C + r) * s.P;
                if (k < 2) {
                  gather_plane<T>(in, pg + r * s.P, direction(k, in.quarter_of(r)), scale, add, plane);
                } else {
                  using F = Factor<A, true>;
                  gather_row<T, true>(pg + r * s.P, nullptr, F(&scale), F(&add), plane, s.P);
                }
              }
              for (int k = 0; k < K && in.nhwc; ++k) {
                for (int64_t q = in.quarter ? 0 : 3; q < 4; ++q) {
                  const int64_t c = q * in.quarter;
                  int64_t p[2] = {r, -1};
                  if (k < 2) in.targets(r, direction(k, q), p);
                  using F = Factor<A, false>;
                  gather_row<T, false>(p[0] < 0 ? nullptr : pg + p[0] * s.C + c,
                                       p[1] < 0 ? nullptr : pg + p[1] * s.C + c, F(gates.get() + k * s.C + c),
                                       F(shift.get() + c), out + r * whole.C + k * s.C + c,
                                       in.quarter_end(q) - c);
                }
              }
            }
          });
        });
      }
    });
    return du;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::shift_total>(m, "shift_total");
  visattn::implement<visattn::shift_sum>(m, "shift_sum");
  visattn::implement<visattn::shift_dot>(m, "shift_dot");
  visattn::implement<visattn::shift_grad>(m, "shift_grad");
}
