// The sigmoid of a batch norm as a gate.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "moments.h"
#include "parallel.h"
#include "self_gate_coefficients.h"
#include "tensor.h"

namespace visattn {

// Algebra of a gate that is the sigmoid of a batch norm: of x itself, scaled by abs(weight) / sum abs(weight)
// (NAM), or of another map (kOther_), unscaled (GAM). mean and var [C] are given (`fixed`), or computed and
// written.
template <class A, bool kOther_>
class BatchGate {
 public:
  static constexpr int kPower = 1;
  static constexpr bool kOther = kOther_, kShared = true, kShuffled = false, kFlat = false;

  BatchGate(const Tensor& weight, const Tensor& bias, const Shape& s, A* mean, A* var, A eps, bool fixed)
      : C_(s.C), mean_(mean), var_(var), eps_(eps), fixed_(fixed), share_(s.C), gain_(s.C), shift_(s.C) {
    const Tensor w = weight_as(weight, kDtype<A>), b = weight_as(bias, kDtype<A>);
    double total = 0;
    for (int64_t c = 0; c < C_; ++c) total += std::abs(data<A>(w)[c]);
    const A sum = static_cast<A>(total);
    for (int64_t c = 0; c < C_; ++c) {
      share_[c] = kOther ? A(1) : std::abs(data<A>(w)[c]) / sum;
      gain_[c] = data<A>(w)[c] * share_[c];
      shift_[c] = data<A>(b)[c] * share_[c];
    }
  }

  // Sets where the gradients of weight and bias go.
  void grads_to(A* dweight, A* dbias) {
    dweight_ = dweight, dbias_ = dbias;
    std::fill_n(dweight, C_, A(0)), std::fill_n(dbias, C_, A(0));
  }

  bool fixed() const { return fixed_; }

  Coefficients<A> fit(int64_t g, int64_t c, Moments<A> moments, int64_t count) {
    if (!fixed_) mean_[c] = moments.mean, var_[c] = moments.second / static_cast<A>(count);
    return known(g, c);
  }

  Coefficients<A> known(int64_t, int64_t c) { return {mean_[c], gain_[c] * rstd(c), shift_[c]}; }

  Line<A> line(int64_t, int64_t c, Sums<A> sums, int64_t count) {
    dweight_[c] = share_[c] * rstd(c) * sums.upper, dbias_[c] = share_[c] * sums.lower;
    if (fixed_) return {0, 0};
    const A a = gain_[c] * rstd(c), values = static_cast<A>(count);
    return {-a * rstd(c) * rstd(c) * sums.upper / values, -a * sums.lower / values};
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

// Mean and variance of the norm: copies of the given ones, or zeros, to become the batch's.
template <class A>
struct Statistics {
  Tensor mean, var;
  bool fixed;

  Statistics(const std::optional<Tensor>& given_mean, const std::optional<Tensor>& given_var,
             int64_t channels)
      : mean(empty({channels}, kDtype<A>)),
        var(empty({channels}, kDtype<A>)),
        fixed(given_mean && given_var) {
    std::fill_n(data<A>(mean), channels, A(0)), std::fill_n(data<A>(var), channels, A(0));
    if (!fixed) return;
    std::copy_n(data<A>(weight_as(*given_mean, kDtype<A>)), channels, data<A>(mean));
    std::copy_n(data<A>(weight_as(*given_var, kDtype<A>)), channels, data<A>(var));
  }
};

}  // namespace visattn
