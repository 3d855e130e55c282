// CBAM: channel attention, then spatial attention on u = x * channel_gate, which is never stored.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/activations.h"
#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "map_conv.h"
#include "matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "pixel_pool.h"
#include "simd.h"
#include "tensor.h"
#include "ties.h"
#include "twofold_passes.h"

namespace visattn {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_fwd(
    Tensor x, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias, std::optional<Tensor> residual,
    int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const bool nhwc = map.nhwc;
    const Mlp<A> mlp(w1, w2, s.C);
    const Tensor w = weight_as(wconv, kDtype<A>);
    const A offset = value_of<A>(bias);
    const int64_t k = wconv.size(3), dense_ld = nhwc ? s.C : s.P;
    const auto res = optional_map(residual, s, nhwc);
    const PixelBlocks<T> blocks(s);
    Tensor y = empty_map(s, nhwc, x.scalar_type()), pooled = empty({s.N, 2, s.C}, kDtype<A>),
           argmax_hw = empty({s.N, s.C}, ScalarType::Int), hidden = empty({s.N, 2, mlp.R}, kDtype<A>),
           channel_gate = empty({s.N, s.C}, kDtype<A>), maps = empty({s.N, 2, s.H, s.W}, kDtype<A>),
           argmax_c = empty({s.N, s.H, s.W}, ScalarType::Int),
           spatial_gate = empty({s.N, s.H, s.W}, kDtype<A>);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      ChannelPool<T, true> pool(s, nhwc);
      Framed<A> framed[2] = {{s.H, s.W, k}, {s.H, s.W, k}};
      Buffer<A> channel(s.C), spatial(s.P);
      for (int64_t n = begin; n < end; ++n) {
        const auto in = matrix(map.image<T>(n), s, nhwc, map.ld);
        const T* pr = image_or_null<T>(res, n);
        A *mean_hw = data<A>(pooled) + 2 * n * s.C, *mean_c = data<A>(maps) + 2 * n * s.P,
          *max_c = mean_c + s.P;
        pool.run(in, workers, mean_hw, mean_hw + s.C, data<int32_t>(argmax_hw) + n * s.C);
        mlp.gate_of_two(mean_hw, data<A>(hidden) + 2 * n * mlp.R, channel.get());
        std::copy_n(channel.get(), s.C, data<A>(channel_gate) + n * s.C);
        const auto reduce_channels = [&](int64_t b) {
          const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
          pixel_stats<T, true>(pixels_of(in, nhwc, p0, p1), nhwc, channel.get(), mean_c + p0, max_c + p0,
                               data<int32_t>(argmax_c) + n * s.P + p0);
          framed[0].set_rows(blocks.begin(b), blocks.end(b), s.W, mean_c);
          framed[1].set_rows(blocks.begin(b), blocks.end(b), s.W, max_c);
        };
        const auto gate_block = [&](int64_t b) {
          const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b), skip = nhwc ? p0 * s.C : p0;
          conv_gate(framed, data<A>(w), offset, k, blocks.begin(b), blocks.end(b), s.W, spatial.get());
          std::copy(&spatial[p0], &spatial[p1], data<A>(spatial_gate) + n * s.P + p0);
          apply_gate<T>(pixels_of(in, nhwc, p0, p1), both_factors(nhwc, channel.get(), spatial.get(), p0),
                        pr ? pr + skip : nullptr, data<T>(y) + n * s.C * s.P + skip, dense_ld, activation);
        };
        workers.pipeline(blocks.count, blocks.reach(k), reduce_channels, gate_block);
      }
    });
    return std::make_tuple(y, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate);
  });
}

// Memory and sums that the backward passes of one image share.
template <class T>
struct CbamGrads {
  using A = Acc<T>;
  Framed<A> framed[2], dq;
  Buffer<A> channel, spatial, along_c, dmean_c, dmax_c, dgate, part, dpooled;
  PixelBlocks<T> blocks;
  ChannelPartials<A> direct, through_maps;

  CbamGrads(const Shape& s, int64_t k)
      : framed{{s.H, s.W, k}, {s.H, s.W, k}},
        dq(s.H, s.W, k),
        channel(s.C),
        spatial(s.P),
        along_c(s.P),
        dmean_c(s.P),
        dmax_c(s.P),
        dgate(s.C),
        part(s.C),
        dpooled(2 * s.C),
        blocks(s),
        direct(s.C, blocks.count),
        through_maps(s.C, blocks.count) {}

  // Pass 1: A[p] = sum_c g x channel, dq = A spatial (1 - spatial), and sum_p g x spatial for each channel.
  void upstream(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, int64_t b) {
    const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
    gate_sums<T>(pixels_of(x, nhwc, p0, p1), pixels_of(g, nhwc, p0, p1), nhwc, channel.get(), &spatial[p0],
                 direct.part(b), &along_c[p0]);
    for (int64_t p = p0; p < p1; ++p) along_c[p] *= spatial[p] * (1 - spatial[p]);
    dq.set_rows(blocks.begin(b), blocks.end(b), blocks.W, along_c.get());
  }

  // Pass 2: the maps' gradients, and what they contribute to each channel.
  void maps(const Matrix<const T>& x, bool nhwc, const int32_t* at, const A* turned, int64_t k, int64_t b) {
    const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b), C = nhwc ? x.cols : x.rows;
    conv_input_grad(dq, turned, k, blocks.begin(b), blocks.end(b), blocks.W, dmean_c.get(), dmax_c.get());
    for (int64_t p = p0; p < p1; ++p) dmean_c[p] /= static_cast<A>(C);
    map_sums<T>(x, nhwc, p0, p1, channel.get(), dmean_c.get(), {at, nullptr, dmax_c.get()},
                through_maps.part(b));
  }

  // Pass 3: dx.
  void input(const Matrix<const T>& x, const Matrix<const T>& g, bool nhwc, const int32_t* at_c,
             const int32_t* at_hw, T* dx, int64_t b) {
    const int64_t C = nhwc ? g.cols : g.rows;
    const Maxima<A> over_c{at_c, nullptr, dmax_c.get()}, over_hw{at_hw, nullptr, dpooled.get() + C};
    const InputGrad<T> grad{channel.get(), spatial.get(), dmean_c.get(), dpooled.get(), over_c, over_hw};
    grad.run(x, g, nhwc, blocks.first_pixel(b), blocks.last_pixel(b), dx);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias,
    std::optional<Tensor> residual, Tensor pooled, Tensor argmax_hw, Tensor hidden, Tensor channel_gate,
    Tensor maps, Tensor argmax_c, Tensor spatial_gate, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const bool nhwc = map.nhwc, act = activation != kNone;
    const Mlp<A> mlp(w1, w2, s.C);
    const Tensor w = weight_as(wconv, kDtype<A>);
    const int64_t k = wconv.size(3), image = s.C * s.P;
    const FeatureMap g = dense_map(grad, s, nhwc);
    const auto res = act ? optional_map(residual, s, nhwc) : std::nullopt;
    Tensor dx = empty_map(s, nhwc, x.scalar_type()),
           dresidual = empty_residual_grad(s, nhwc, x.scalar_type(), act);
    Buffer<A> turned = flipped(data<A>(w), k), dz(s.N * s.C), dh(2 * s.N * mlp.R), dw_images(s.N * 2 * k * k),
              db_images(s.N);
    for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
      CbamGrads<T> grads(s, k);
      const auto& blocks = grads.blocks;
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(channel_gate) + n * s.C, s.C, grads.channel.get());
        std::copy_n(data<A>(spatial_gate) + n * s.P, s.P, grads.spatial.get());
        for (int64_t m = 0; m < 2; ++m)
          grads.framed[m].set_rows(0, s.H, s.W, data<A>(maps) + (2 * n + m) * s.P);
        const int32_t *at_c = data<int32_t>(argmax_c) + n * s.P, *at_hw = data<int32_t>(argmax_hw) + n * s.C;
        const T* pr = image_or_null<T>(res, n);
        T* kept = act ? data<T>(dresidual) + n * image : nullptr;
        const auto in = matrix(map.image<T>(n), s, nhwc, map.ld);
        const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
        workers.pipeline(
            blocks.count, blocks.reach(k),
            [&](int64_t b) {
              const int64_t p0 = blocks.first_pixel(b), skip = nhwc ? p0 * s.C : p0;
              if (act) {
                gate_grad<T>(pixels_of(in, nhwc, p0, blocks.last_pixel(b)),
                             both_factors(nhwc, grads.channel.get(), grads.spatial.get(), p0),
                             g.image<T>(n) + skip, pr ? pr + skip : nullptr, kept + skip, g.ld, activation);
              }
              grads.upstream(in, upstream, nhwc, b);
            },
            [&](int64_t b) { grads.maps(in, nhwc, at_c, turned.get(), k, b); });
        conv_weight_grad(grads.framed, grads.dq, k, s.H, s.W, workers, &dw_images[n * 2 * k * k]);
        if (bias) conv_bias_grad(grads.dq, s.H, s.W, &db_images[n]);
        grads.direct.sum(grads.dgate.get());
        grads.through_maps.sum(grads.part.get());
        for (int64_t c = 0; c < s.C; ++c) grads.dgate[c] += grads.part[c];
        sigmoid_grad(grads.dgate.get(), grads.channel.get(), s.C, &dz[n * s.C]);
        mlp.grad_of_two(&dz[n * s.C], data<A>(hidden) + 2 * n * mlp.R, &dh[2 * n * mlp.R],
                        grads.dpooled.get());
        for (int64_t c = 0; c < s.C; ++c) grads.dpooled[c] /= static_cast<A>(s.P);
        workers.each(blocks.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) grads.input(in, upstream, nhwc, at_c, at_hw, data<T>(dx) + n * image, b);
        });
      }
    });
    Tensor dw1 = empty_grad(w1, kDtype<A>), dw2 = empty_grad(w2, kDtype<A>),
           dw = empty_grad(wconv, kDtype<A>);
    weight_grad_of_two<A>(mlp, s.N, dz.get(), dh.get(), data<A>(pooled), data<A>(hidden), data<A>(dw1),
                          data<A>(dw2));
    batch_sum(s.N, dw_images.get(), 2 * k * k, data<A>(dw));
    return std::make_tuple(dx, dresidual, gradient_of(w1, dw1), gradient_of(w2, dw2), gradient_of(wconv, dw),
                           gradient_of(wconv, bias_grad(bias, s.N, db_images.get())));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::cbam_fwd>(m, "cbam_fwd");
  visattn::implement<visattn::cbam_bwd>(m, "cbam_bwd");
}
