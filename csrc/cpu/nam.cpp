// Normalization-based attention: y = act(x * sigmoid(bn(x) * abs(weight) / sum abs(weight)) + residual).
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "batch_norm_gate.h"
#include "self_gate.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

std::tuple<Tensor, Tensor, Tensor> nam_fwd(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> mean,
                                           std::optional<Tensor> var, std::optional<Tensor> residual,
                                           int64_t activation, double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Statistics<A> stats(mean, var, s.C);
    BatchGate<A, false> algebra(weight, bias, s, data<A>(stats.mean), data<A>(stats.var), static_cast<A>(eps),
                                stats.fixed);
    return std::make_tuple(self_gate_fwd<T>(feature_map(x), s, residual, activation, algebra), stats.mean,
                           stats.var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nam_bwd(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                   std::optional<Tensor> residual, Tensor mean, Tensor var,
                                                   int64_t activation, double eps, bool fixed) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    BatchGate<A, false> algebra(weight, bias, s, data<A>(mean), data<A>(var), static_cast<A>(eps), fixed);
    Tensor dweight = empty({s.C}, kDtype<A>), dbias = empty({s.C}, kDtype<A>);
    algebra.grads_to(data<A>(dweight), data<A>(dbias));
    auto [dx, dresidual] = self_gate_bwd<T>(grad, feature_map(x), s, residual, activation, algebra);
    return std::make_tuple(dx, dresidual, gradient_of(weight, dweight), gradient_of(bias, dbias));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::nam_fwd>(m, "nam_fwd");
  visattn::implement<visattn::nam_bwd>(m, "nam_bwd");
}
