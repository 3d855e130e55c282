// Gates that scale whole channels (SE, ECA, ...): y = act(x * gate[c] + residual) and its backward. A module
// supplies the mathematics from pooled means to gates and back.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "../common/activations.h"
#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {

// y = act(x * gate + residual) of one image. gate [C] is padded; residual may be null.
template <class T>
void scale_image(const Matrix<const T>& x, const Split& parts, const Workers& workers, bool nhwc,
                 const Acc<T>* gate, const T* residual, T* y, int64_t dense_ld, int64_t activation) {
  workers.each(parts.count, [&](int64_t b, int64_t e) {
    const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1), skip = r0 * dense_ld;
    apply_gate<T>(rows_of(x, r0, r1), channel_factor(nhwc, gate, r0), residual ? residual + skip : nullptr,
                  y + skip, dense_ld, activation);
  });
}

// y = act(x * scale + shift + residual) of one image; scale and shift [C] are padded.
template <class T>
void affine_image(const Matrix<const T>& x, const Split& parts, const Workers& workers, bool nhwc,
                  Affine<Acc<T>> by, const T* residual, T* y, int64_t dense_ld, int64_t activation) {
  workers.each(parts.count, [&](int64_t b, int64_t e) {
    const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1), skip = r0 * dense_ld, c0 = nhwc ? 0 : r0;
    apply_affine<T>(rows_of(x, r0, r1), !nhwc, {by.scale + c0, by.shift + c0},
                    residual ? residual + skip : nullptr, y + skip, dense_ld, activation);
  });
}

// dots = the sum over the pixels of g x of one image, where g = grad * act'(x * gate + residual). With an
// activation, g is kept.
template <class T>
void dot_image(const Matrix<const T>& x, const T* grad, const Split& parts, const Workers& workers, bool nhwc,
               const Acc<T>* gate, const T* residual, T* kept, int64_t dense_ld, int64_t activation,
               ChannelPartials<Acc<T>>& dots) {
  const Matrix<const T> upstream{kept ? kept : grad, dense_ld, x.rows, x.cols};
  workers.each(parts.count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t r0 = parts.begin(i), r1 = parts.end(i), skip = r0 * dense_ld;
      const auto xs = rows_of(x, r0, r1), gs = rows_of(upstream, r0, r1);
      if (kept) {
        gate_grad<T>(xs, channel_factor(nhwc, gate, r0), grad + skip, residual ? residual + skip : nullptr,
                     kept + skip, dense_ld, activation);
      }
      if (nhwc) {
        products<T, false, true>(xs, gs, nullptr, nullptr, nullptr, dots.part(i));
      } else {
        products<T, true, false>(xs, gs, nullptr, nullptr, dots.part(0) + r0, nullptr);
      }
    }
  });
}

// dx = grad * gate + shift of one image; gate and shift [C] are padded.
template <class T>
void input_grad_image(const Matrix<const T>& grad, const Split& parts, const Workers& workers, bool nhwc,
                      const Acc<T>* gate, const Acc<T>* shift, T* dx) {
  workers.each(parts.count, [&](int64_t b, int64_t e) {
    const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1);
    const auto gs = rows_of(grad, r0, r1);
    if (nhwc) {
      affine<T, false>(gs, gate, shift, dx + r0 * grad.ld);
    } else {
      affine<T, true>(gs, gate + r0, shift + r0, dx + r0 * grad.ld);
    }
  });
}

// A batch norm by its running statistics: (z - mean) * gain + bias.
template <class A>
struct Norm {
  Buffer<A> gain, bias, mean;

  Norm(int64_t C, const Tensor& weight, const Tensor& offset, const Tensor& running_mean,
       const Tensor& running_var, double eps)
      : gain(C), bias(C), mean(C) {
    const Tensor w = weight_as(weight, kDtype<A>), b = weight_as(offset, kDtype<A>),
                 m = weight_as(running_mean, kDtype<A>), v = weight_as(running_var, kDtype<A>);
    for (int64_t c = 0; c < C; ++c) {
      gain[c] = data<A>(w)[c] / std::sqrt(data<A>(v)[c] + static_cast<A>(eps));
    }
    std::copy_n(data<A>(b), C, bias.get());
    std::copy_n(data<A>(m), C, mean.get());
  }
};

// gate_of(n, mean [C], gate [C]) computes the gate of image n. mean and gate are [N, C]. With a norm, x is
// the norm's input, and its output is what is gated.
template <class T, class GateOf>
Tensor scale_channels_fwd(const FeatureMap& x, const Shape& s, const std::optional<Tensor>& residual,
                          int64_t activation, Acc<T>* mean, Acc<T>* gate, const GateOf& gate_of,
                          const Norm<Acc<T>>* norm = nullptr) {
  using A = Acc<T>;
  const auto res = optional_map(residual, s, x.nhwc);
  Tensor y = empty_map(s, x.nhwc, x.tensor.scalar_type());
  T* py = data<T>(y);
  const int64_t dense_ld = x.nhwc ? s.C : s.P;
  const A *gain = norm ? norm->gain.get() : nullptr, *bias = norm ? norm->bias.get() : nullptr,
          *middle = norm ? norm->mean.get() : nullptr;
  for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
    ChannelPool<T, false> pool(s, x.nhwc);
    Buffer<A> padded(s.C), shift(norm ? s.C : 0);
    const Split parts = row_parts<T>(s, x.nhwc);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, x.nhwc, x.ld);
      A *mu = mean + n * s.C, *factor = gate + n * s.C;
      const T* pr = image_or_null<T>(res, n);
      pool.run(in, workers, mu);
      for (int64_t c = 0; norm && c < s.C; ++c) mu[c] = (mu[c] - middle[c]) * gain[c] + bias[c];
      gate_of(n, mu, factor);
      std::copy_n(factor, s.C, padded.get());
      if (!norm) {
        scale_image(in, parts, workers, x.nhwc, padded.get(), pr, py + n * s.C * s.P, dense_ld, activation);
        continue;
      }
      for (int64_t c = 0; c < s.C; ++c) {
        padded[c] *= gain[c];  // rounded before it enters the shift: so a mean far from zero cancels
        shift[c] = bias[c] * factor[c] - middle[c] * padded[c];
      }
      affine_image<T>(in, parts, workers, x.nhwc, {padded.get(), shift.get()}, pr, py + n * s.C * s.P,
                      dense_ld, activation);
    }
  });
  return y;
}

// dmean_of(n, dgate [C], dmean [C]) turns the gate's gradient into the gradient of the channel means.
template <class T, class DmeanOf>
MapGrads scale_channels_bwd(const Tensor& grad, const FeatureMap& x, const Shape& s,
                            const std::optional<Tensor>& residual, const Acc<T>* gate, int64_t activation,
                            const DmeanOf& dmean_of) {
  using A = Acc<T>;
  const auto dtype = x.tensor.scalar_type();
  const bool nhwc = x.nhwc, act = activation != kNone;
  const FeatureMap g = dense_map(grad, s, nhwc);
  const auto res = act ? optional_map(residual, s, nhwc) : std::nullopt;
  MapGrads out{empty_map(s, nhwc, dtype), empty_residual_grad(s, nhwc, dtype, act)};
  const int64_t image = s.C * s.P;
  for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
    const Split parts = row_parts<T>(s, nhwc);
    ChannelPartials<A> dots(s.C, nhwc ? parts.count : 1);
    Buffer<A> dgate(s.C), dmean(s.C), scale(s.C);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, nhwc, x.ld);
      std::copy_n(gate + n * s.C, s.C, scale.get());
      T* kept = act ? data<T>(out.dresidual) + n * image : nullptr;
      dot_image(in, g.image<T>(n), parts, workers, nhwc, scale.get(), image_or_null<T>(res, n), kept, g.ld,
                activation, dots);
      dots.sum(dgate.get());
      dmean_of(n, dgate.get(), dmean.get());
      for (int64_t c = 0; c < s.C; ++c) dmean[c] /= static_cast<A>(s.P);
      const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
      input_grad_image(upstream, parts, workers, nhwc, scale.get(), dmean.get(), data<T>(out.dx) + n * image);
    }
  });
  return out;
}

}  // namespace visattn
