// Squeeze-and-excitation: y = act(x * gate(w2 hidden(w1 mean + b1) + b2) + residual). gate is the sigmoid or
// the hard sigmoid, hidden is ReLU or SiLU. The op keeps in `hidden` what the derivative of its activation
// needs: relu(z), or with SiLU z itself.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/activations.h"
#include "channel_scale.h"
#include "mlp.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// The second layer's input, from what is kept; `buffer` has room for it.
template <class A>
const A* activated(const A* hidden, int64_t count, int64_t activation, A* buffer) {
  if (activation == kRelu) return hidden;
  for (int64_t i = 0; i < count; ++i) buffer[i] = hidden[i] / (1 + std::exp(-hidden[i]));
  return buffer;
}

template <class A>
void activated_grad(const A* hidden, int64_t count, int64_t activation, A* dh) {
  for (int64_t i = 0; i < count; ++i) {
    const A s = 1 / (1 + std::exp(-hidden[i]));
    const A slope = activation == kRelu ? A(!(hidden[i] <= 0)) : s * (1 + hidden[i] * (1 - s));
    dh[i] = slope == 0 ? A(0) : dh[i] * slope;
  }
}

// Returns y, and writes mean [N, C], hidden [N, R] and gate [N, C].
template <class T>
Tensor forward(const Tensor& x, const Shape& s, const Mlp<Acc<T>>& mlp, const std::optional<Tensor>& b1,
               const std::optional<Tensor>& b2, const std::optional<Tensor>& residual, int64_t activation,
               int64_t hidden_activation, int64_t gate_activation, Acc<T>* mean, Acc<T>* hidden, Acc<T>* gate,
               const Norm<Acc<T>>* norm = nullptr) {
  using A = Acc<T>;
  const auto bias1 = bias_as<A>(b1), bias2 = bias_as<A>(b2);
  const auto gate_of = [&](int64_t n, const A* mu, A* out) {
    A* h = hidden + n * mlp.R;
    Buffer<A> buffer(hidden_activation == kRelu ? 0 : mlp.R);
    mlp.squeeze(mu, data_or_null<A>(bias1), h);
    if (hidden_activation == kRelu) relu_in_place(h, mlp.R);
    mlp.excite(activated(h, mlp.R, hidden_activation, buffer.get()), data_or_null<A>(bias2), out);
    gate_activation == kSigmoid ? sigmoid_in_place(out, s.C) : hard_sigmoid_in_place(out, s.C);
  };
  return scale_channels_fwd<T>(feature_map(x), s, residual, activation, mean, gate, gate_of, norm);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                                  std::optional<Tensor> b2, std::optional<Tensor> residual,
                                                  int64_t activation, int64_t hidden_activation,
                                                  int64_t gate_activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), hidden = empty({s.N, mlp.R}, kDtype<A>),
           gate = empty({s.N, s.C}, kDtype<A>);
    Tensor y = forward<T>(x, s, mlp, b1, b2, residual, activation, hidden_activation, gate_activation,
                          data<A>(mean), data<A>(hidden), data<A>(gate));
    return std::make_tuple(y, mean, hidden, gate);
  });
}

// Returns y alone.
template <class T>
Tensor inferred(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                const std::optional<Tensor>& b2, const std::optional<Tensor>& residual, int64_t activation,
                int64_t hidden_activation, int64_t gate_activation, const Norm<Acc<T>>* norm = nullptr) {
  using A = Acc<T>;
  const Shape s = shape_of(x);
  const Mlp<A> mlp(w1, w2, s.C);
  Buffer<A> small(s.N * (2 * s.C + mlp.R));
  A *mean = small.get(), *gate = mean + s.N * s.C, *hidden = gate + s.N * s.C;
  return forward<T>(x, s, mlp, b1, b2, residual, activation, hidden_activation, gate_activation, mean, hidden,
                    gate, norm);
}

Tensor se_infer(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                std::optional<Tensor> residual, int64_t activation, int64_t hidden_activation,
                int64_t gate_activation) {
  return dispatch(x, [&](auto type) {
    return inferred<decltype(type)>(x, w1, b1, w2, b2, residual, activation, hidden_activation,
                                    gate_activation);
  });
}

Tensor se_normed(Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor norm_mean, Tensor norm_var,
                 double eps, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                 std::optional<Tensor> residual, int64_t activation, int64_t hidden_activation,
                 int64_t gate_activation) {
  return dispatch(z, [&](auto type) {
    using T = decltype(type);
    const Norm<Acc<T>> norm(z.size(1), norm_weight, norm_bias, norm_mean, norm_var, eps);
    return inferred<T>(z, w1, b1, w2, b2, residual, activation, hidden_activation, gate_activation, &norm);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> residual, Tensor mean, Tensor hidden,
    Tensor gate, int64_t activation, int64_t hidden_activation, int64_t gate_activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const int64_t R = mlp.R;
    Buffer<A> dz(s.N * s.C), dh(s.N * R), buffer(s.N * R);
    const A *h = data<A>(hidden), *sg = data<A>(gate);
    const auto dmean_of = [&](int64_t n, const A* dgate, A* dmean) {
      A *dz_n = &dz[n * s.C], *dh_n = &dh[n * R];
      gate_activation == kSigmoid ? sigmoid_grad(dgate, sg + n * s.C, s.C, dz_n)
                                  : hard_sigmoid_grad(dgate, sg + n * s.C, s.C, dz_n);
      mlp.excite_grad(dz_n, dh_n);
      activated_grad(h + n * R, R, hidden_activation, dh_n);
      mlp.input_grad(dh_n, dmean);
    };
    auto [dx, dresidual] = scale_channels_bwd<T>(grad, feature_map(x), s, residual, sg, activation, dmean_of);
    const A* taken = activated(h, s.N * R, hidden_activation, buffer.get());
    const auto [dw1, db1, dw2, db2] = weight_grad(mlp, w1, w2, s.N, dz.get(), dh.get(), data<A>(mean), taken);
    return std::make_tuple(dx, dresidual, gradient_of(w1, dw1), gradient_of(w1, db1), gradient_of(w2, dw2),
                           gradient_of(w2, db2));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::se_fwd>(m, "se_fwd");
  visattn::implement<visattn::se_infer>(m, "se_infer");
  visattn::implement<visattn::se_normed>(m, "se_normed");
  visattn::implement<visattn::se_bwd>(m, "se_bwd");
}
