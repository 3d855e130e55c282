// A map scaled by the sigmoid of another map's batch norm: y = act(x * sigmoid(bn(m)) + residual).
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "batch_norm_gate.h"
#include "self_gate.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// m in the layout of x; a convolution may have returned it in the other one.
FeatureMap beside(const Tensor& m, const Shape& s, bool nhwc) { return dense_map(m, s, nhwc); }

std::tuple<Tensor, Tensor, Tensor> norm_gate_fwd(Tensor x, Tensor m, Tensor weight, Tensor bias,
                                                 std::optional<Tensor> mean, std::optional<Tensor> var,
                                                 std::optional<Tensor> residual, int64_t activation,
                                                 double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const Scaled scaled{dense_map(x, s, nhwc), x};
    const Statistics<A> stats(mean, var, s.C);
    BatchGate<A, true> algebra(weight, bias, s, data<A>(stats.mean), data<A>(stats.var), static_cast<A>(eps),
                               stats.fixed);
    Tensor y = self_gate_fwd<T>(beside(m, s, nhwc), s, residual, activation, algebra, &scaled);
    return std::make_tuple(y, stats.mean, stats.var);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_gate_bwd(Tensor grad, Tensor x, Tensor m,
                                                                 Tensor weight, Tensor bias,
                                                                 std::optional<Tensor> residual, Tensor mean,
                                                                 Tensor var, int64_t activation, double eps,
                                                                 bool fixed) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const Scaled scaled{dense_map(x, s, nhwc), empty_map(s, nhwc, x.scalar_type())};
    BatchGate<A, true> algebra(weight, bias, s, data<A>(mean), data<A>(var), static_cast<A>(eps), fixed);
    Tensor dweight = empty({s.C}, kDtype<A>), dbias = empty({s.C}, kDtype<A>);
    algebra.grads_to(data<A>(dweight), data<A>(dbias));
    auto [dm, dresidual] =
        self_gate_bwd<T>(grad, beside(m, s, nhwc), s, residual, activation, algebra, &scaled);
    return std::make_tuple(scaled.grad, dm, dresidual, gradient_of(weight, dweight),
                           gradient_of(bias, dbias));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::norm_gate_fwd>(m, "norm_gate_fwd");
  visattn::implement<visattn::norm_gate_bwd>(m, "norm_gate_bwd");
}
