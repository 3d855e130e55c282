// Normalization-based attention: y = act(x * sigmoid(bn(x) * abs(weight) / sum abs(weight)) + residual).
#include <tuple>

#include "self_gate.h"

namespace visattn {
namespace {

template <class A>
class Nam {
 public:
  static constexpr bool kShared = true, kShuffled = false;

  Nam(const Tensor& weight, const Tensor& bias, const Shape& s, A* mean, A* var, A eps, bool fixed)
      : C_(s.C), mean_(mean), var_(var), eps_(eps), fixed_(fixed), share_(s.C), gain_(s.C), shift_(s.C) {
    STD_TORCH_CHECK(weight.numel() == C_ && bias.numel() == C_, "weight and bias must have ", C_,
                    " elements");
    const Tensor w = weight_as(weight, kDtype<A>), b = weight_as(bias, kDtype<A>);
    A sum = 0;
    for (int64_t c = 0; c < C_; ++c) sum += std::abs(data<A>(w)[c]);
    for (int64_t c = 0; c < C_; ++c) {
      share_[c] = std::abs(data<A>(w)[c]) / sum;
      gain_[c] = data<A>(w)[c] * share_[c];
      shift_[c] = data<A>(b)[c] * share_[c];
    }
  }

  // Where the gradients of weight and bias go.
  void grads_to(A* dweight, A* dbias) {
    dweight_ = dweight, dbias_ = dbias;
    std::fill_n(dweight, C_, A(0)), std::fill_n(dbias, C_, A(0));
  }

  bool fixed() const { return fixed_; }

  Coefficients<A> fit(int64_t g, int64_t c, Moments<A> moments, int64_t count) {
    if (!fixed_) mean_[c] = moments.mean, var_[c] = moments.second / static_cast<A>(count);
    return known(g, c);
  }

  Coefficients<A> known(int64_t, int64_t c) { return {mean_[c], 0, gain_[c] * rstd(c), shift_[c]}; }

  Line<A> line(int64_t, int64_t c, Sums<A> sums, int64_t count) {
    dweight_[c] = share_[c] * rstd(c) * sums.rd, dbias_[c] = share_[c] * sums.r;
    if (fixed_) return {0, 0};
    const A a = gain_[c] * rstd(c), values = static_cast<A>(count);
    return {-a * rstd(c) * rstd(c) * sums.rd / values, -a * sums.r / values};
  }

 private:
  A rstd(int64_t c) const { return 1 / std::sqrt(var_[c] + eps_); }

  int64_t C_;
  A *mean_, *var_;
  A eps_;
  bool fixed_;
  Buffer<A> share_, gain_, shift_;
  A *dweight_ = nullptr, *dbias_ = nullptr;
};

std::tuple<Tensor, Tensor, Tensor> nam_fwd(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> mean,
                                           std::optional<Tensor> var, std::optional<Tensor> residual,
                                           int64_t activation, double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    Tensor m = empty({s.C}, kDtype<A>), v = empty({s.C}, kDtype<A>);
    const bool fixed = mean && var;
    std::fill_n(data<A>(m), s.C, A(0)), std::fill_n(data<A>(v), s.C, A(0));
    if (fixed) {
      STD_TORCH_CHECK(mean->numel() == s.C && var->numel() == s.C, "statistics must have ", s.C, " elements");
      std::copy_n(data<A>(weight_as(*mean, kDtype<A>)), s.C, data<A>(m));
      std::copy_n(data<A>(weight_as(*var, kDtype<A>)), s.C, data<A>(v));
    }
    Nam<A> algebra(weight, bias, s, data<A>(m), data<A>(v), static_cast<A>(eps), fixed);
    return std::make_tuple(self_gate_fwd<T>(feature_map(x), s, residual, activation, algebra), m, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nam_bwd(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                   std::optional<Tensor> residual, Tensor mean, Tensor var,
                                                   int64_t activation, double eps, bool fixed) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    Nam<A> algebra(weight, bias, s, data<A>(mean), data<A>(var), static_cast<A>(eps), fixed);
    Tensor dweight = empty({s.C}, kDtype<A>), dbias = empty({s.C}, kDtype<A>);
    algebra.grads_to(data<A>(dweight), data<A>(dbias));
    auto [dx, dresidual] = self_gate_bwd<T>(grad, feature_map(x), s, residual, activation, algebra);
    return std::make_tuple(dx, dresidual, dweight, dbias);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  m.impl("nam_fwd", TORCH_BOX(&visattn::nam_fwd));
  m.impl("nam_bwd", TORCH_BOX(&visattn::nam_bwd));
}
