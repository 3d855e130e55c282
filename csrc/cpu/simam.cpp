// SimAM: y = act(x * sigmoid(d^2 / (4 (variance + e)) + 0.5) + residual), d = x - mean, over each plane.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "moments.h"
#include "self_gate.h"
#include "self_gate_coefficients.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

template <class A>
class SimAM {
 public:
  static constexpr int kPower = 2;
  static constexpr bool kOther = false, kShared = false, kShuffled = false, kFlat = false;

  SimAM(int64_t channels, A* mean, A* scale, A e_lambda = 0)
      : C_(channels), mean_(mean), scale_(scale), e_lambda_(e_lambda) {}

  bool fixed() const { return false; }

  Coefficients<A> fit(int64_t n, int64_t c, Moments<A> moments, int64_t count) const {
    mean_[n * C_ + c] = moments.mean;
    scale_[n * C_ + c] = 1 / (4 * (moments.second / others(count) + e_lambda_));
    return known(n, c);
  }

  Coefficients<A> known(int64_t n, int64_t c) const {
    return {mean_[n * C_ + c], scale_[n * C_ + c], A(0.5)};
  }

  Line<A> line(int64_t n, int64_t c, Sums<A> sums, int64_t count) const {
    const A q = scale_[n * C_ + c];
    return {-8 * q * q * sums.upper / others(count), -2 * q * sums.lower / static_cast<A>(count)};
  }

 private:
  // The divisor of the variance, 1 for a single value.
  static A others(int64_t count) { return static_cast<A>(std::max<int64_t>(count - 1, 1)); }

  int64_t C_;
  A *mean_, *scale_;
  A e_lambda_;
};

std::tuple<Tensor, Tensor, Tensor> simam_fwd(Tensor x, std::optional<Tensor> residual, int64_t activation,
                                             double e_lambda) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), scale = empty({s.N, s.C}, kDtype<A>);
    SimAM<A> algebra(s.C, data<A>(mean), data<A>(scale), static_cast<A>(e_lambda));
    return std::make_tuple(self_gate_fwd<T>(feature_map(x), s, residual, activation, algebra), mean, scale);
  });
}

std::tuple<Tensor, Tensor> simam_bwd(Tensor grad, Tensor x, std::optional<Tensor> residual, Tensor mean,
                                     Tensor scale, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    SimAM<A> algebra(s.C, data<A>(mean), data<A>(scale));
    auto [dx, dresidual] = self_gate_bwd<T>(grad, feature_map(x), s, residual, activation, algebra);
    return std::make_tuple(dx, dresidual);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::simam_fwd>(m, "simam_fwd");
  visattn::implement<visattn::simam_bwd>(m, "simam_bwd");
}
