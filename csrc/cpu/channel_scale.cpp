// The passes over x of a channel gate whose mathematics is elsewhere: the mean, y = act(x * gate + residual),
// its gradient to the gate, and its gradient to x; and y = act(x * scale + shift + residual).
#include "channel_scale.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/activations.h"
#include "channel_pool.h"
#include "image_matrix.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

Tensor channel_mean(Tensor x) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap in = feature_map(x);
    Tensor out = empty({s.N, s.C}, kDtype<A>);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      ChannelPool<T, false> pool(s, in.nhwc);
      for (int64_t n = begin; n < end; ++n) {
        pool.run(matrix(in.image<T>(n), s, in.nhwc, in.ld), workers, data<A>(out) + n * s.C);
      }
    });
    return out;
  });
}

Tensor scaled(const Tensor& x, const Tensor& gate, const std::optional<Tensor>& shift,
              const std::optional<Tensor>& residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap in = feature_map(x);
    const auto res = optional_map(residual, s, in.nhwc);
    Tensor y = empty_map(s, in.nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> padded(s.C), added(shift ? s.C : 0);
      const Split parts = row_parts<T>(s, in.nhwc);
      const int64_t dense_ld = in.nhwc ? s.C : s.P;
      for (int64_t n = begin; n < end; ++n) {
        const auto image = matrix(in.image<T>(n), s, in.nhwc, in.ld);
        const T* pr = image_or_null<T>(res, n);
        T* py = data<T>(y) + n * s.C * s.P;
        std::copy_n(data<A>(gate) + n * s.C, s.C, padded.get());
        if (shift) {
          std::copy_n(data<A>(*shift) + n * s.C, s.C, added.get());
          affine_image<T>(image, parts, workers, in.nhwc, {padded.get(), added.get()}, pr, py, dense_ld,
                          activation);
        } else {
          scale_image(image, parts, workers, in.nhwc, padded.get(), pr, py, dense_ld, activation);
        }
      }
    });
    return y;
  });
}

Tensor channel_scale_fwd(Tensor x, Tensor gate, std::optional<Tensor> residual, int64_t activation) {
  return scaled(x, gate, std::nullopt, residual, activation);
}

Tensor channel_affine(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                      int64_t activation) {
  return scaled(x, scale, shift, residual, activation);
}

std::tuple<Tensor, Tensor> channel_scale_bwd(Tensor grad, Tensor x, Tensor gate,
                                             std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap in = feature_map(x), g = dense_map(grad, s, in.nhwc);
    const bool act = activation != kNone;
    const auto res = act ? optional_map(residual, s, in.nhwc) : std::nullopt;
    const int64_t image = s.C * s.P;
    Tensor dgate = empty({s.N, s.C}, kDtype<A>);
    Tensor dresidual = empty_residual_grad(s, in.nhwc, x.scalar_type(), act);
    for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> padded(s.C);
      const Split parts = row_parts<T>(s, in.nhwc);
      ChannelPartials<A> dots(s.C, in.nhwc ? parts.count : 1);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(gate) + n * s.C, s.C, padded.get());
        dot_image(matrix(in.image<T>(n), s, in.nhwc, in.ld), g.image<T>(n), parts, workers, in.nhwc,
                  padded.get(), image_or_null<T>(res, n), act ? data<T>(dresidual) + n * image : nullptr,
                  g.ld, activation, dots);
        dots.sum(data<A>(dgate) + n * s.C);
      }
    });
    return std::make_tuple(dgate, dresidual);
  });
}

Tensor channel_input_grad(Tensor grad, Tensor x, Tensor gate, std::optional<Tensor> dmean) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const FeatureMap g = dense_map(grad, s, nhwc);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> scale(s.C), mean(s.C);
      const Split parts = row_parts<T>(s, nhwc);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(gate) + n * s.C, s.C, scale.get());
        for (int64_t c = 0; dmean && c < s.C; ++c) {
          mean[c] = data<A>(*dmean)[n * s.C + c] / static_cast<A>(s.P);
        }
        input_grad_image(matrix(g.image<T>(n), s, nhwc, g.ld), parts, workers, nhwc, scale.get(), mean.get(),
                         data<T>(dx) + n * s.C * s.P);
      }
    });
    return dx;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::channel_mean>(m, "channel_mean");
  visattn::implement<visattn::channel_scale_fwd>(m, "channel_scale_fwd");
  visattn::implement<visattn::channel_scale_bwd>(m, "channel_scale_bwd");
  visattn::implement<visattn::channel_affine>(m, "channel_affine");
  visattn::implement<visattn::channel_input_grad>(m, "channel_input_grad");
}
