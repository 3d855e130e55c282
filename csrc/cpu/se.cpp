// Squeeze-and-excitation: y = act(x * sigmoid(w2 relu(w1 mean + b1) + b2) + residual).
#include <tuple>

#include "channel_scale.h"

namespace visattn {
namespace {

template <class A>
std::optional<Tensor> bias_as(const std::optional<Tensor>& bias) {
  if (!bias) return std::nullopt;
  return weight_as(*bias, kDtype<A>);
}

template <class A>
const A* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<A>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                                  std::optional<Tensor> b2, std::optional<Tensor> residual,
                                                  int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const auto bias1 = bias_as<A>(b1), bias2 = bias_as<A>(b2);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), hidden = empty({s.N, mlp.R}, kDtype<A>),
           gate = empty({s.N, s.C}, kDtype<A>);
    A* h = data<A>(hidden);
    Tensor y = channel_scale_fwd<T>(feature_map(x), s, residual, activation, data<A>(mean), data<A>(gate),
                                    [&](int64_t n, const A* mu, A* out) {
                                      mlp.hidden(mu, data_or_null<A>(bias1), h + n * mlp.R);
                                      mlp.gate(h + n * mlp.R, data_or_null<A>(bias2), out);
                                    });
    return std::make_tuple(y, mean, hidden, gate);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2,
                                                                  std::optional<Tensor> residual, Tensor mean,
                                                                  Tensor hidden, Tensor gate,
                                                                  int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const int64_t R = mlp.R;
    Buffer<A> dz(s.N * s.C), dh(s.N * R);
    const A *h = data<A>(hidden), *sg = data<A>(gate);
    auto [dx, dresidual] = channel_scale_bwd<T>(grad, feature_map(x), s, residual, sg, activation,
                                                [&](int64_t n, const A* dgate, A* dmean) {
                                                  sigmoid_grad(dgate, sg + n * s.C, s.C, &dz[n * s.C]);
                                                  mlp.hidden_grad(&dz[n * s.C], h + n * R, &dh[n * R]);
                                                  mlp.input_grad(&dh[n * R], dmean);
                                                });
    Tensor dw1 = empty_grad(w1, kDtype<A>);
    Tensor dw2 = empty_grad(w2, kDtype<A>);
    Tensor db1 = empty({R}, kDtype<A>), db2 = empty({s.C}, kDtype<A>);
    batch_outer(s.N, dz.get(), s.C, h, R, data<A>(dw2));
    batch_outer(s.N, dh.get(), R, data<A>(mean), s.C, data<A>(dw1));
    batch_sum(s.N, dz.get(), s.C, data<A>(db2));
    batch_sum(s.N, dh.get(), R, data<A>(db1));
    return std::make_tuple(dx, dresidual, dw1, db1, dw2, db2);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  m.impl("se_fwd", TORCH_BOX(&visattn::se_fwd));
  m.impl("se_bwd", TORCH_BOX(&visattn::se_bwd));
}
