// The convolution of an image's two maps to one, as an op of its own, for gates whose other steps are ops of
// PyTorch.
#include "map_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

#include "mlp.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

template <class A>
void frame_maps(Framed<A>* framed, const A* maps, int64_t H, int64_t W) {
  for (int64_t m = 0; m < 2; ++m) framed[m].set_rows(0, H, W, maps + m * H * W);
}

Tensor map_conv(Tensor maps, Tensor w) {
  return dispatch(maps, [&](auto type) {
    using A = Acc<decltype(type)>;
    const Shape s = shape_of(maps);
    const Tensor in = weight_as(maps, kDtype<A>), taps = weight_as(w, kDtype<A>);
    const int64_t k = w.size(3);
    Tensor out = empty({s.N, 1, s.H, s.W}, kDtype<A>);
    for_images(s.N, s.P * k * k, [&](int64_t begin, int64_t end, const Workers& workers) {
      Framed<A> framed[2] = {{s.H, s.W, k}, {s.H, s.W, k}};
      for (int64_t n = begin; n < end; ++n) {
        frame_maps(framed, data<A>(in) + 2 * n * s.P, s.H, s.W);
        const Framed<A>* from = framed;
        const A* weights = data<A>(taps);
        A* to = data<A>(out) + n * s.P;
        const int64_t W = s.W;
        workers.each(s.H, [=](int64_t b, int64_t e) {
          simd([=]() VF_INLINE {
            for (int64_t y = b; y < e; ++y) conv_row(from, 2, weights, k, y, W, to + y * W);
          });
        });
      }
    });
    return out;
  });
}

std::tuple<Tensor, Tensor> map_conv_bwd(Tensor grad, Tensor maps, Tensor w) {
  return dispatch(maps, [&](auto type) {
    using A = Acc<decltype(type)>;
    const Shape s = shape_of(maps);
    const Tensor in = weight_as(maps, kDtype<A>), taps = weight_as(w, kDtype<A>),
                 g = weight_as(grad, kDtype<A>);
    const int64_t k = w.size(3);
    Buffer<A> turned = flipped(data<A>(taps), k), dw_images(s.N * 2 * k * k);
    Tensor dmaps = empty({s.N, 2, s.H, s.W}, kDtype<A>), dw = empty_grad(w, kDtype<A>);
    for_images(s.N, s.P * k * k, [&](int64_t begin, int64_t end, const Workers& workers) {
      Framed<A> framed[2] = {{s.H, s.W, k}, {s.H, s.W, k}}, dq(s.H, s.W, k);
      for (int64_t n = begin; n < end; ++n) {
        frame_maps(framed, data<A>(in) + 2 * n * s.P, s.H, s.W);
        dq.set_rows(0, s.H, s.W, data<A>(g) + n * s.P);
        A* dmean = data<A>(dmaps) + 2 * n * s.P;
        workers.each(s.H, [&](int64_t b, int64_t e) {
          conv_input_grad(dq, turned.get(), k, b, e, s.W, dmean, dmean + s.P);
        });
        conv_weight_grad(framed, dq, k, s.H, s.W, workers, &dw_images[n * 2 * k * k]);
      }
    });
    batch_sum(s.N, dw_images.get(), 2 * k * k, data<A>(dw));
    return std::make_tuple(dmaps, dw);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::map_conv>(m, "map_conv");
  visattn::implement<visattn::map_conv_bwd>(m, "map_conv_bwd");
}
