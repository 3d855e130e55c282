// The passes over two branches, each after a ReLU, that a module weighs against each other (SK).
#include "branches.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../common/activations.h"
#include "channel_pool.h"
#include "image_matrix.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

constexpr int K = 2, kAct = kRelu;

// Both branches of an image in the same layout, and the parts of their rows that threads share.
template <class T>
struct Branches {
  Shape s;
  FeatureMap v1, v2;
  bool nhwc;
  Split parts;

  Branches(const Tensor& first, const Tensor& second)
      : s(shape_of(first)),
        v1(feature_map(first)),
        v2(dense_map(second, s, v1.nhwc)),
        nhwc(v1.nhwc),
        parts(row_parts<T>(s, nhwc)) {}

  int64_t dense_ld() const { return nhwc ? s.C : s.P; }

  Rows<const T, K> row(int64_t n, int64_t r) const {
    return {{v1.image<T>(n) + r * v1.ld, v2.image<T>(n) + r * v2.ld}};
  }

  // Calls f(first row, end, part) for all parts; each part has sums of its own.
  template <class F>
  void each_part(const Workers& workers, const F& f) const {
    workers.each(parts.count, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) f(parts.begin(i), parts.end(i), i);
    });
  }
};

Tensor branch_mean(Tensor v1, Tensor v2) {
  return dispatch(v1, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Branches<T> in(v1, v2);
    const Shape& s = in.s;
    Tensor mean = empty({s.N, s.C}, kDtype<A>);
    for_images(s.N, K * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      ChannelPartials<A> sums(s.C, in.nhwc ? in.parts.count : 1);
      for (int64_t n = begin; n < end; ++n) {
        in.each_part(workers, [&](int64_t r0, int64_t r1, int64_t i) {
          A* sum = sums.part(in.nhwc ? i : 0);
          if (in.nhwc) std::fill_n(sum, s.C, A(0));
          simd([&, sum]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              if (in.nhwc) {
                add_rows<T, kAct, K>(in.row(n, r), s.C, sum);
              } else {
                sum[r] = row_total<T, kAct, K>(in.row(n, r), s.P);
              }
            }
          });
        });
        A* out = data<A>(mean) + n * s.C;
        sums.sum(out);
        for (int64_t c = 0; c < s.C; ++c) out[c] /= static_cast<A>(s.P);
      }
    });
    return mean;
  });
}

Tensor branch_sum(Tensor v1, Tensor v2, Tensor gate) {
  return dispatch(v1, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Branches<T> in(v1, v2);
    const Shape& s = in.s;
    Tensor y = empty_map(s, in.nhwc, v1.scalar_type());
    for_images(s.N, K * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> g1(s.C), g2(s.C);
      for (int64_t n = begin; n < end; ++n) {
        const A* g = data<A>(gate) + n * K * s.C;
        std::copy_n(g, s.C, g1.get()), std::copy_n(g + s.C, s.C, g2.get());
        T* out = data<T>(y) + n * s.C * s.P;
        in.each_part(workers, [&](int64_t r0, int64_t r1, int64_t) {
          simd([&]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              T* row = out + r * in.dense_ld();
              if (in.nhwc) {
                const Factor<A, false> gates[K] = {Factor<A, false>(g1.get()), Factor<A, false>(g2.get())};
                weigh_rows<T, kAct, false, K>(in.row(n, r), gates, row, s.C);
              } else {
                const Factor<A, true> gates[K] = {Factor<A, true>(g1.get() + r),
                                                  Factor<A, true>(g2.get() + r)};
                weigh_rows<T, kAct, true, K>(in.row(n, r), gates, row, s.P);
              }
            }
          });
        });
      }
    });
    return y;
  });
}

Tensor branch_dot(Tensor grad, Tensor v1, Tensor v2) {
  return dispatch(v1, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Branches<T> in(v1, v2);
    const Shape& s = in.s;
    const FeatureMap g = dense_map(grad, s, in.nhwc);
    Tensor dgate = empty({s.N, K, s.C}, kDtype<A>);
    for_images(s.N, (K + 1) * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const int64_t count = in.nhwc ? in.parts.count : 1;
      ChannelPartials<A> first(s.C, count), second(s.C, count);
      for (int64_t n = begin; n < end; ++n) {
        in.each_part(workers, [&](int64_t r0, int64_t r1, int64_t i) {
          const Rows<A, K> dots = {{first.part(in.nhwc ? i : 0), second.part(in.nhwc ? i : 0)}};
          for (int k = 0; k < K && in.nhwc; ++k) std::fill_n(dots.p[k], s.C, A(0));
          simd([&, dots]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              const T* pg = g.image<T>(n) + r * g.ld;
              if (in.nhwc) {
                add_dots<T, kAct, K>(pg, in.row(n, r), s.C, dots);
              } else {
                A dot[K];
                row_dots<T, kAct, K>(pg, in.row(n, r), s.P, dot);
                dots.p[0][r] = dot[0], dots.p[1][r] = dot[1];
              }
            }
          });
        });
        A* out = data<A>(dgate) + n * K * s.C;
        first.sum(out), second.sum(out + s.C);
      }
    });
    return dgate;
  });
}

std::tuple<Tensor, Tensor> branch_grad(Tensor grad, Tensor v1, Tensor v2, Tensor gate, Tensor dmean) {
  return dispatch(v1, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Branches<T> in(v1, v2);
    const Shape& s = in.s;
    const FeatureMap g = dense_map(grad, s, in.nhwc);
    Tensor d1 = empty_map(s, in.nhwc, v1.scalar_type()), d2 = empty_map(s, in.nhwc, v1.scalar_type());
    for_images(s.N, (2 * K + 1) * s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> g1(s.C), g2(s.C), shift(s.C);
      for (int64_t n = begin; n < end; ++n) {
        const A *gates = data<A>(gate) + n * K * s.C, *dm = data<A>(dmean) + n * s.C;
        std::copy_n(gates, s.C, g1.get()), std::copy_n(gates + s.C, s.C, g2.get());
        for (int64_t c = 0; c < s.C; ++c) shift[c] = dm[c] / static_cast<A>(s.P);
        T *p1 = data<T>(d1) + n * s.C * s.P, *p2 = data<T>(d2) + n * s.C * s.P;
        in.each_part(workers, [&](int64_t r0, int64_t r1, int64_t) {
          simd([&]() VF_INLINE {
            for (int64_t r = r0; r < r1; ++r) {
              const T* pg = g.image<T>(n) + r * g.ld;
              const Rows<T, K> out = {{p1 + r * g.ld, p2 + r * g.ld}};
              if (in.nhwc) {
                const Factor<A, false> f[K] = {Factor<A, false>(g1.get()), Factor<A, false>(g2.get())};
                weigh_rows_grad<T, kAct, false, K>(pg, in.row(n, r), f, Factor<A, false>(shift.get()), out,
                                                   s.C);
              } else {
                const Factor<A, true> f[K] = {Factor<A, true>(g1.get() + r), Factor<A, true>(g2.get() + r)};
                weigh_rows_grad<T, kAct, true, K>(pg, in.row(n, r), f, Factor<A, true>(shift.get() + r), out,
                                                  s.P);
              }
            }
          });
        });
      }
    });
    return std::make_tuple(d1, d2);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::branch_mean>(m, "branch_mean");
  visattn::implement<visattn::branch_sum>(m, "branch_sum");
  visattn::implement<visattn::branch_dot>(m, "branch_dot");
  visattn::implement<visattn::branch_grad>(m, "branch_grad");
}
