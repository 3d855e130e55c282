// Global response normalization: y = x (1 + weight n) + bias, where n is the norm of each channel beside the
// mean norm of all channels of the image.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "channel_scale.h"
#include "column_stats.h"
#include "image_matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "products.h"
#include "row_stats.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// The sums over the pixels of a b, for the rows of a part of an image.
template <class T>
void channel_products(const Matrix<const T>& a, const Matrix<const T>& b, const Split& parts, int64_t i,
                      bool nhwc, ChannelPartials<Acc<T>>& dots) {
  const int64_t r0 = parts.begin(i), r1 = parts.end(i);
  if (nhwc) {
    products<T, false, true>(rows_of(a, r0, r1), rows_of(b, r0, r1), nullptr, nullptr, nullptr, dots.part(i));
  } else {
    products<T, true, false>(rows_of(a, r0, r1), rows_of(b, r0, r1), nullptr, nullptr, dots.part(0) + r0,
                             nullptr);
  }
}

// The responses of an image's channels from their norms, and the factors of x. Returns mean(norm) + eps.
template <class A>
A responses(const A* norm, const A* weight, int64_t C, double eps, A* response, A* factor) {
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += norm[c];
  const A mean = static_cast<A>(sum / static_cast<double>(C) + eps);
  for (int64_t c = 0; c < C; ++c) {
    response[c] = norm[c] / mean;
    factor[c] = 1 + weight[c] * response[c];
  }
  return mean;
}

std::tuple<Tensor, Tensor> grn_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap in = feature_map(x);
    const Tensor w = weight_as(weight, kDtype<A>), b = weight_as(bias, kDtype<A>);
    Tensor y = empty_map(s, in.nhwc, x.scalar_type()), norms = empty({s.N, s.C}, kDtype<A>);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const Split parts = row_parts<T>(s, in.nhwc);
      ChannelPartials<A> squares(s.C, in.nhwc ? parts.count : 1);
      Buffer<A> response(s.C), factor(s.C), shift(s.C);
      std::copy_n(data<A>(b), s.C, shift.get());
      for (int64_t n = begin; n < end; ++n) {
        const auto image = matrix(in.image<T>(n), s, in.nhwc, in.ld);
        A* norm = data<A>(norms) + n * s.C;
        workers.each(parts.count, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) channel_products(image, image, parts, i, in.nhwc, squares);
        });
        squares.sum(norm);
        for (int64_t c = 0; c < s.C; ++c) norm[c] = std::sqrt(norm[c]);
        responses(norm, data<A>(w), s.C, eps, response.get(), factor.get());
        affine_image<T>(image, parts, workers, in.nhwc, {factor.get(), shift.get()}, nullptr,
                        data<T>(y) + n * s.C * s.P, in.nhwc ? s.C : s.P, kNone);
      }
    });
    return std::make_tuple(y, norms);
  });
}

// out = grad * factor + x * slope, with both numbers of each row, or of each column (padded).
template <class T, bool kPerRow>
void input_grad(Matrix<const T> grad, Matrix<const T> x, const Acc<T>* factor, const Acc<T>* slope, T* out) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t r = 0; r < x.rows; ++r) {
      const T *pg = grad.row(r), *px = x.row(r);
      T* po = out + r * grad.ld;
      const Vec<A> f = set1<A>(kPerRow ? factor[r] : A(0)), k = set1<A>(kPerRow ? slope[r] : A(0));
      cover_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> by = kPerRow ? f : load(factor + c), along = kPerRow ? k : load(slope + c);
        store(po + c, load(pg + c, lanes) * by + load(px + c, lanes) * along, lanes);
      });
    }
  });
}

// The gradient of an image's norms divided by the norms; 0 for a channel that is zero everywhere. dots: the
// sums of grad x.
template <class A>
void norm_slopes(const A* dots, const A* weight, const A* response, const A* norm, A mean, int64_t C,
                 A* slope) {
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += static_cast<double>(dots[c]) * weight[c] * response[c];
  const A shared = static_cast<A>(sum / static_cast<double>(C));
  for (int64_t c = 0; c < C; ++c) {
    slope[c] = norm[c] == 0 ? A(0) : (dots[c] * weight[c] - shared) / mean / norm[c];
  }
}

std::tuple<Tensor, Tensor, Tensor> grn_bwd(Tensor grad, Tensor x, Tensor weight, Tensor norm, double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap in = feature_map(x), g = dense_map(grad, s, in.nhwc);
    const Tensor w = weight_as(weight, kDtype<A>);
    Tensor dx = empty_map(s, in.nhwc, x.scalar_type());
    Buffer<A> dweights(s.N * s.C), dbiases(s.N * s.C);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const Split parts = row_parts<T>(s, in.nhwc);
      ChannelPartials<A> dots(s.C, in.nhwc ? parts.count : 1), sums(s.C, in.nhwc ? parts.count : 1);
      Buffer<A> response(s.C), factor(s.C), slope(s.C), dot(s.C);
      for (int64_t n = begin; n < end; ++n) {
        const auto image = matrix(in.image<T>(n), s, in.nhwc, in.ld);
        const auto upstream = matrix(g.image<T>(n), s, in.nhwc, g.ld);
        const A* norms = data<A>(norm) + n * s.C;
        workers.each(parts.count, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t r0 = parts.begin(i), r1 = parts.end(i);
            channel_products(upstream, image, parts, i, in.nhwc, dots);
            if (in.nhwc) {
              column_stats<T, false, false>(rows_of(upstream, r0, r1), nullptr, sums.part(i));
            } else {
              row_stats<T, false, false>(rows_of(upstream, r0, r1), nullptr, sums.part(0) + r0);
            }
          }
        });
        dots.sum(dot.get());
        sums.sum(&dbiases[n * s.C]);
        const A mean = responses(norms, data<A>(w), s.C, eps, response.get(), factor.get());
        for (int64_t c = 0; c < s.C; ++c) dweights[n * s.C + c] = dot[c] * response[c];
        norm_slopes(dot.get(), data<A>(w), response.get(), norms, mean, s.C, slope.get());
        T* out = data<T>(dx) + n * s.C * s.P;
        workers.each(parts.count, [&](int64_t first, int64_t last) {
          const int64_t r0 = parts.begin(first), r1 = parts.end(last - 1);
          const auto gs = rows_of(upstream, r0, r1), xs = rows_of(image, r0, r1);
          if (in.nhwc) {
            input_grad<T, false>(gs, xs, factor.get(), slope.get(), out + r0 * g.ld);
          } else {
            input_grad<T, true>(gs, xs, factor.get() + r0, slope.get() + r0, out + r0 * g.ld);
          }
        });
      }
    });
    Tensor dweight = empty_grad(weight, kDtype<A>), dbias = empty_grad(weight, kDtype<A>);
    batch_sum(s.N, dweights.get(), s.C, data<A>(dweight));
    batch_sum(s.N, dbiases.get(), s.C, data<A>(dbias));
    return std::make_tuple(dx, gradient_of(weight, dweight), gradient_of(weight, dbias));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::grn_fwd>(m, "grn_fwd");
  visattn::implement<visattn::grn_bwd>(m, "grn_bwd");
}
