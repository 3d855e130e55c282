// Shuffle attention: half of each group's channels are gated by their mean, half by their own normalised
// elements; then the two halves of the channels are interleaved.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "moments.h"
#include "parallel.h"
#include "self_gate.h"
#include "self_gate_coefficients.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

using Weights = std::array<Tensor, 6>;  // cweight, cbias, sweight, sbias, gn_weight, gn_bias

template <class A>
class Shuffle {
 public:
  static constexpr int kPower = 1;
  static constexpr bool kOther = false, kShared = false, kShuffled = true, kFlat = true;

  Shuffle(const Weights& weights, const Shape& s, A* mean, A* rstd, A eps = 0)
      : C_(s.C),
        N_(s.N),
        P_(s.P),
        K_(weights[0].numel()),
        mean_(mean),
        rstd_(rstd),
        eps_(eps),
        sum_r_(0),
        sum_rd_(0) {
    for (size_t i = 0; i < 6; ++i) {
      weights_[i] = weight_as(weights[i], kDtype<A>);
      w_[i] = data<A>(weights_[i]);
    }
  }

  void keep_sums() { sum_r_ = Buffer<A>(N_ * C_), sum_rd_ = Buffer<A>(N_ * C_); }

  bool fixed() const { return false; }

  Coefficients<A> fit(int64_t n, int64_t c, Moments<A> moments, int64_t count) const {
    mean_[n * C_ + c] = moments.mean;
    rstd_[n * C_ + c] = 1 / std::sqrt(moments.second / static_cast<A>(count) + eps_);
    return known(n, c);
  }

  Coefficients<A> known(int64_t n, int64_t c) const {
    const A mean = mean_[n * C_ + c];
    const int64_t j = c % K_;
    if (!spatial(c)) return {std::numeric_limits<A>::quiet_NaN(), 0, w_[0][j] * mean + w_[1][j]};
    // A single pixel is its own mean: d is 0, and a, as large as 1 / sqrt(eps), would only add rounding
    // errors to dx.
    const A a = P_ > 1 ? w_[2][j] * w_[4][j] * rstd_[n * C_ + c] : 0;
    return {mean, a, w_[2][j] * w_[5][j] + w_[3][j]};
  }

  Line<A> line(int64_t n, int64_t c, Sums<A> sums, int64_t count) {
    sum_r_[n * C_ + c] = sums.lower, sum_rd_[n * C_ + c] = sums.upper;
    const A values = static_cast<A>(count), rstd = rstd_[n * C_ + c];
    if (!spatial(c)) return {0, w_[0][c % K_] * sums.lower / values};
    const A a = known(n, c).k;
    return {-a * rstd * rstd * sums.upper / values, -a * sums.lower / values};
  }

  // The gradients of the six weights, over images and groups in order.
  void weight_grads(const std::array<A*, 6>& dw) {
    Buffer<double> sums(6 * K_);
    const auto sum = [&](int64_t weight, int64_t j) -> double& { return sums[weight * K_ + j]; };
    for (int64_t n = 0; n < N_; ++n) {
      for (int64_t c = 0; c < C_; ++c) {
        const int64_t i = n * C_ + c, j = c % K_;
        const A r = sum_r_[i], normed = rstd_[i] * sum_rd_[i];
        if (spatial(c)) {
          sum(2, j) += w_[4][j] * normed + w_[5][j] * r;
          sum(3, j) += r;
          sum(4, j) += w_[2][j] * normed;
          sum(5, j) += w_[2][j] * r;
        } else {
          sum(0, j) += mean_[i] * r;
          sum(1, j) += r;
        }
      }
    }
    for (size_t weight = 0; weight < 6; ++weight) {
      for (int64_t j = 0; j < K_; ++j) {
        dw[weight][j] = static_cast<A>(sum(static_cast<int64_t>(weight), j));
      }
    }
  }

 private:
  bool spatial(int64_t c) const { return c / K_ % 2 == 1; }

  int64_t C_, N_, P_, K_;
  A *mean_, *rstd_;
  A eps_;
  Weights weights_;
  std::array<const A*, 6> w_;
  Buffer<A> sum_r_, sum_rd_;
};

std::tuple<Tensor, Tensor, Tensor> shuffle_attention_fwd(Tensor x, Tensor cweight, Tensor cbias,
                                                         Tensor sweight, Tensor sbias, Tensor gn_weight,
                                                         Tensor gn_bias, std::optional<Tensor> residual,
                                                         int64_t activation, double eps) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), rstd = empty({s.N, s.C}, kDtype<A>);
    Shuffle<A> algebra({cweight, cbias, sweight, sbias, gn_weight, gn_bias}, s, data<A>(mean), data<A>(rstd),
                       static_cast<A>(eps));
    return std::make_tuple(self_gate_fwd<T>(feature_map(x), s, residual, activation, algebra), mean, rstd);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shuffle_attention_bwd(
    Tensor grad, Tensor x, Tensor cweight, Tensor cbias, Tensor sweight, Tensor sbias, Tensor gn_weight,
    Tensor gn_bias, std::optional<Tensor> residual, Tensor mean, Tensor rstd, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Weights weights{cweight, cbias, sweight, sbias, gn_weight, gn_bias};
    Shuffle<A> algebra(weights, s, data<A>(mean), data<A>(rstd));
    algebra.keep_sums();
    auto [dx, dresidual] = self_gate_bwd<T>(grad, feature_map(x), s, residual, activation, algebra);
    Weights dw;
    std::array<A*, 6> out;
    for (size_t i = 0; i < 6; ++i) {
      dw[i] = empty_grad(weights[i], kDtype<A>);
      out[i] = data<A>(dw[i]);
    }
    algebra.weight_grads(out);
    for (int i = 0; i < 6; ++i) dw[i] = gradient_of(weights[i], dw[i]);
    return std::make_tuple(dx, dresidual, dw[0], dw[1], dw[2], dw[3], dw[4], dw[5]);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::shuffle_attention_fwd>(m, "shuffle_attention_fwd");
  visattn::implement<visattn::shuffle_attention_bwd>(m, "shuffle_attention_bwd");
}
