// Efficient channel attention: y = act(x * sigmoid(conv1d(mean)) + residual), zero padding along C.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "channel_scale.h"
#include "mlp.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// The channels within reach of tap j of a k-wide window: out[c] uses in[c + shift] for c in [begin, end).
struct Tap {
  int64_t shift, begin, end;
  Tap(int64_t j, int64_t k, int64_t C)
      : shift(j - k / 2), begin(std::max<int64_t>(0, -shift)), end(std::min(C, C - shift)) {}
};

// Returns y, and writes mean and gate [N, C].
template <class T>
Tensor forward(const Tensor& x, const Shape& s, const Tensor& weight, const std::optional<Tensor>& residual,
               int64_t activation, Acc<T>* mean, Acc<T>* gate, const Norm<Acc<T>>* norm = nullptr) {
  using A = Acc<T>;
  const Tensor w = weight_as(weight, kDtype<A>);
  const int64_t k = w.numel();
  const auto gate_of = [&](int64_t, const A* mu, A* out) {
    std::fill_n(out, s.C, A(0));
    for (int64_t j = 0; j < k; ++j) {
      const Tap tap(j, k, s.C);
      for (int64_t c = tap.begin; c < tap.end; ++c) out[c] += data<A>(w)[j] * mu[c + tap.shift];
    }
    sigmoid_in_place(out, s.C);
  };
  return scale_channels_fwd<T>(feature_map(x), s, residual, activation, mean, gate, gate_of, norm);
}

std::tuple<Tensor, Tensor, Tensor> eca_fwd(Tensor x, Tensor weight, std::optional<Tensor> residual,
                                           int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), gate = empty({s.N, s.C}, kDtype<A>);
    Tensor y = forward<T>(x, s, weight, residual, activation, data<A>(mean), data<A>(gate));
    return std::make_tuple(y, mean, gate);
  });
}

// Returns y alone.
template <class T>
Tensor inferred(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                int64_t activation, const Norm<Acc<T>>* norm = nullptr) {
  const Shape s = shape_of(x);
  Buffer<Acc<T>> small(2 * s.N * s.C);
  return forward<T>(x, s, weight, residual, activation, small.get(), small.get() + s.N * s.C, norm);
}

Tensor eca_infer(Tensor x, Tensor weight, std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) { return inferred<decltype(type)>(x, weight, residual, activation); });
}

Tensor eca_normed(Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor norm_mean, Tensor norm_var,
                  double eps, Tensor weight, std::optional<Tensor> residual, int64_t activation) {
  return dispatch(z, [&](auto type) {
    using T = decltype(type);
    const Norm<Acc<T>> norm(z.size(1), norm_weight, norm_bias, norm_mean, norm_var, eps);
    return inferred<T>(z, weight, residual, activation, &norm);
  });
}

std::tuple<Tensor, Tensor, Tensor> eca_bwd(Tensor grad, Tensor x, Tensor weight,
                                           std::optional<Tensor> residual, Tensor mean, Tensor gate,
                                           int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Tensor w = weight_as(weight, kDtype<A>);
    const int64_t k = w.numel();
    Buffer<A> dw_images(s.N * k);
    const A *mu = data<A>(mean), *sg = data<A>(gate);
    const auto dmean_of = [&](int64_t n, const A* dgate, A* dmean) {
      Buffer<A> dz(s.C);
      sigmoid_grad(dgate, sg + n * s.C, s.C, dz.get());
      std::fill_n(dmean, s.C, A(0));
      for (int64_t j = 0; j < k; ++j) {
        const Tap tap(j, k, s.C);
        A sum = 0;
        for (int64_t c = tap.begin; c < tap.end; ++c) {
          sum += dz[c] * mu[n * s.C + c + tap.shift];
          dmean[c + tap.shift] += data<A>(w)[j] * dz[c];
        }
        dw_images[n * k + j] = sum;
      }
    };
    auto [dx, dresidual] = scale_channels_bwd<T>(grad, feature_map(x), s, residual, sg, activation, dmean_of);
    Tensor dw = empty_grad(weight, kDtype<A>);
    batch_sum(s.N, dw_images.get(), k, data<A>(dw));
    return std::make_tuple(dx, dresidual, gradient_of(weight, dw));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::eca_fwd>(m, "eca_fwd");
  visattn::implement<visattn::eca_infer>(m, "eca_infer");
  visattn::implement<visattn::eca_normed>(m, "eca_normed");
  visattn::implement<visattn::eca_bwd>(m, "eca_bwd");
}
