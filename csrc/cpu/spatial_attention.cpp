// CBAM's spatial attention: sigmoid(conv([mean_C, max_C]) + bias).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "elementwise.h"
#include "image_matrix.h"
#include "map_conv.h"
#include "mlp.h"
#include "parallel.h"
#include "pixel_pool.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

std::tuple<Tensor, Tensor, Tensor> spatial_attention_fwd(Tensor x, Tensor wconv, std::optional<Tensor> bias) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Tensor w = weight_as(wconv, kDtype<A>);
    const A offset = value_of<A>(bias);
    const int64_t k = wconv.size(3);
    const PixelBlocks<T> blocks(s);
    Tensor gate = empty({s.N, 1, s.H, s.W}, x.scalar_type()), maps = empty({s.N, 2, s.H, s.W}, kDtype<A>),
           argmax = empty({s.N, s.H, s.W}, ScalarType::Int);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Framed<A> framed[2] = {{s.H, s.W, k}, {s.H, s.W, k}};
      Buffer<A> row(s.P);
      for (int64_t n = begin; n < end; ++n) {
        const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
        A *mean = data<A>(maps) + 2 * n * s.P, *max = mean + s.P;
        workers.pipeline(
            blocks.count, blocks.reach(k),
            [&](int64_t b) {
              const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
              pixel_stats<T, false>(pixels_of(in, map.nhwc, p0, p1), map.nhwc, nullptr, mean + p0, max + p0,
                                    data<int32_t>(argmax) + n * s.P + p0);
              framed[0].set_rows(blocks.begin(b), blocks.end(b), s.W, mean);
              framed[1].set_rows(blocks.begin(b), blocks.end(b), s.W, max);
            },
            [&](int64_t b) {
              conv_gate(framed, data<A>(w), offset, k, blocks.begin(b), blocks.end(b), s.W, row.get());
              const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
              std::copy(&row[p0], &row[p1], data<T>(gate) + n * s.P + p0);
            });
      }
    });
    return std::make_tuple(gate, maps, argmax);
  });
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention_bwd(Tensor grad, Tensor x, Tensor wconv,
                                                         std::optional<Tensor> bias, Tensor gate, Tensor maps,
                                                         Tensor argmax_c) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const int64_t k = wconv.size(3);
    const Tensor w = weight_as(wconv, kDtype<A>), g = as_contiguous(grad);
    Buffer<A> turned = flipped(data<A>(w), k), dw_images(s.N * 2 * k * k), db_images(s.N);
    const PixelBlocks<T> blocks(s);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Framed<A> framed[2] = {{s.H, s.W, k}, {s.H, s.W, k}}, dq(s.H, s.W, k);
      Buffer<A> row(s.P), dmean(s.P), dmax(s.P);
      for (int64_t n = begin; n < end; ++n) {
        const T *pg = data<T>(g) + n * s.P, *sg = data<T>(gate) + n * s.P;
        for (int64_t p = 0; p < s.P; ++p) {
          const A value = sg[p];
          row[p] = static_cast<A>(pg[p]) * value * (1 - value);
        }
        dq.set_rows(0, s.H, s.W, row.get());
        for (int64_t m = 0; m < 2; ++m) framed[m].set_rows(0, s.H, s.W, data<A>(maps) + (2 * n + m) * s.P);
        conv_weight_grad(framed, dq, k, s.H, s.W, workers, &dw_images[n * 2 * k * k]);
        if (bias) conv_bias_grad(dq, s.H, s.W, &db_images[n]);
        const int32_t* at = data<int32_t>(argmax_c) + n * s.P;
        const auto out = matrix(data<T>(dx) + n * s.C * s.P, s, nhwc, nhwc ? s.C : s.P);
        workers.each(blocks.count, [&](int64_t begin_block, int64_t end_block) {
          for (int64_t b = begin_block; b < end_block; ++b) {
            const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
            conv_input_grad(dq, turned.get(), k, blocks.begin(b), blocks.end(b), s.W, dmean.get(),
                            dmax.get());
            for (int64_t p = p0; p < p1; ++p) dmean[p] /= static_cast<A>(s.C);
            const auto block = pixels_of(out, nhwc, p0, p1);
            if (nhwc) {
              fill<T, true>(block, &dmean[p0]);
            } else {
              fill<T, false>(block, &dmean[p0]);
            }
            for (int64_t p = p0; p < p1; ++p)
              *element(out, nhwc, at[p], p) = static_cast<T>(dmean[p] + dmax[p]);
          }
        });
      }
    });
    Tensor dw = empty_grad(wconv, kDtype<A>);
    batch_sum(s.N, dw_images.get(), 2 * k * k, data<A>(dw));
    return std::make_tuple(dx, gradient_of(wconv, dw),
                           gradient_of(wconv, bias_grad(bias, s.N, db_images.get())));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::spatial_attention_fwd>(m, "spatial_attention_fwd");
  visattn::implement<visattn::spatial_attention_bwd>(m, "spatial_attention_bwd");
}
