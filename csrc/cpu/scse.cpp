// scSE: y = act(x * (channel + spatial) + residual), spatial = sigmoid(ws . x + bs) for each pixel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "column_stats.h"
#include "elementwise.h"
#include "matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "pixel_gate.h"
#include "row_stats.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// The spatial gate, a linear function of a pixel's channels.
template <class T>
struct LinearPixel {
  using A = Acc<T>;
  int64_t C;
  Buffer<A> weight;
  A bias = 0;

  explicit LinearPixel(const Tensor& w) : C(w.numel()), weight(C) {
    std::copy_n(data<A>(weight_as(w, kDtype<A>)), C, weight.get());
  }

  void logits(const Matrix<const T>& x, bool nhwc, int64_t, int64_t, A* out) const {
    if (nhwc) {
      row_stats<T, false, true>(x, weight.get(), out);
    } else {
      column_stats<T, false, true>(x, weight.get(), out);
    }
    const int64_t pixels = nhwc ? x.rows : x.cols;
    for (int64_t p = 0; p < pixels; ++p) out[p] += bias;
  }

  // out [C + 1]: the weight's gradient, then the bias's.
  void weight_grad(const Matrix<const T>& x, PixelGrad<A> grad, A* out) const {
    Buffer<A> share(C);
    channel_sums<T, true>(x, grad.nhwc, grad.dz, share.get());
    for (int64_t c = 0; c < C; ++c) out[c] += share[c];
    const int64_t pixels = grad.nhwc ? x.rows : x.cols;
    A total;
    row_stats<A, false, false>(Matrix<const A>{grad.dz, pixels, 1, pixels}, nullptr, &total);
    out[C] += total;
  }

  void input_grad(const Matrix<const T>& g, PixelGrad<A> grad, const A* channel, const A* spatial,
                  const A* dmean, T* dx) const {
    const Affine<A> of_channel{channel, weight.get()}, of_pixel{spatial, grad.dz};
    if (grad.nhwc) {
      affine_sum<T, false>(g, of_pixel, of_channel, dmean, dx);
    } else {
      affine_sum<T, true>(g, of_channel, of_pixel, dmean, dx);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scse_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1,
                                                            Tensor w2, std::optional<Tensor> b2, Tensor ws,
                                                            std::optional<Tensor> bs,
                                                            std::optional<Tensor> residual,
                                                            int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const auto bias1 = bias_as<A>(b1), bias2 = bias_as<A>(b2), bias_s = bias_as<A>(bs);
    LinearPixel<T> pixel(ws);
    if (bias_s) pixel.bias = *data<A>(*bias_s);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), hidden = empty({s.N, mlp.R}, kDtype<A>),
           channel = empty({s.N, s.C}, kDtype<A>), spatial = empty({s.N, s.H, s.W}, kDtype<A>);
    const auto gate_of = [&](int64_t n, const A* mu, A* out) {
      A* h = data<A>(hidden) + n * mlp.R;
      mlp.hidden(mu, data_or_null<A>(bias1), h);
      mlp.gate(h, data_or_null<A>(bias2), out);
    };
    Tensor y = pixel_gate_fwd<T, true>(feature_map(x), s, residual, activation, data<A>(mean),
                                       data<A>(channel), data<A>(spatial), gate_of, pixel);
    return std::make_tuple(y, mean, hidden, channel, spatial);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scse_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor ws, std::optional<Tensor> residual, Tensor mean,
    Tensor hidden, Tensor channel_gate, Tensor spatial_gate, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const LinearPixel<T> pixel(ws);
    const int64_t R = mlp.R, size = s.C + 1;
    Buffer<A> dz(s.N * s.C), dh(s.N * R), images(s.N * size), total(size);
    const A *h = data<A>(hidden), *gate = data<A>(channel_gate);
    const auto dmean_of = [&](int64_t n, const A* dgate, A* dmean) {
      sigmoid_grad(dgate, gate + n * s.C, s.C, &dz[n * s.C]);
      mlp.hidden_grad(&dz[n * s.C], h + n * R, &dh[n * R]);
      mlp.input_grad(&dh[n * R], dmean);
    };
    auto [dx, dresidual] =
        pixel_gate_bwd<T, true>(grad, feature_map(x), s, residual, gate, data<A>(spatial_gate), activation,
                                dmean_of, pixel, size, images.get());
    const auto [dw1, db1, dw2, db2] = weight_grad(mlp, w1, w2, s.N, dz.get(), dh.get(), data<A>(mean), h);
    batch_sum(s.N, images.get(), size, total.get());
    Tensor dws = empty_grad(ws, kDtype<A>), dbs = empty({1}, kDtype<A>);
    std::copy_n(total.get(), s.C, data<A>(dws));
    *data<A>(dbs) = total[s.C];
    return std::make_tuple(dx, dresidual, gradient_of(w1, dw1), gradient_of(w1, db1), gradient_of(w2, dw2),
                           gradient_of(w2, db2), gradient_of(ws, dws), gradient_of(ws, dbs));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::scse_fwd>(m, "scse_fwd");
  visattn::implement<visattn::scse_bwd>(m, "scse_bwd");
}
