// Gates that each element computes from itself and from its channel (SimAM, NAM, ...):
//   y = act(x * sigmoid(k d^p + b) + residual), d = x - m, with m, k, b of the channel.
// With another map z (GAM), the gate of an element of x scales the same element of z instead.
//
// A module supplies its algebra, a class with these constants:
//  - kPower: p, 1 or 2.
//  - kOther: another map z is scaled: y = act(z * sigmoid(...) + residual).
//  - kShared: the batch shares its statistics; else each image has its own.
//  - kShuffled: channel h C/2 + j of the gate's result becomes channel 2 j + h of y.
//  - kFlat: a NaN m means d = 0: the gate is sigmoid(b) for the whole channel, whatever x holds.
//
// and these functions, where g is a group (an image, or 0 with kShared) and c a channel:
//  - fixed(): true if m, k, b do not depend on the moments of x.
//  - fit(g, c, moments, count) -> Coefficients: m, k, b in the forward pass.
//  - known(g, c) -> Coefficients: the same in the backward pass, from what the forward pass has kept.
//  - line(g, c, sums, count) -> Line: the statistics' contribution to dx. It keeps what the parameters'
//    gradients need.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "../common/activations.h"
#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "moments.h"
#include "parallel.h"
#include "self_gate_coefficients.h"
#include "self_gate_passes.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {

// Another map, dense and in the layout of x, and where its gradient goes.
struct Scaled {
  FeatureMap map;
  Tensor grad;
};

// The groups of images that share their statistics, one after the other.
struct Groups {
  int64_t count, images;
  Groups(const Shape& s, bool shared) : count(shared ? (s.N > 0) : s.N), images(shared ? s.N : 1) {}
};

inline int64_t result_channel(int64_t c, int64_t C, bool shuffled) {
  return shuffled ? c % (C / 2) * 2 + c / (C / 2) : c;
}

// Calls f(group, begin, end) for ranges of channels. A channel's planes in a group stay in cache from the
// first pass to the last.
template <class F>
void for_channels(const Groups& groups, const Shape& s, const F& f) {
  constexpr int64_t kTooSmall = 1 << 13;
  const int64_t grain = std::max<int64_t>(1, kTooSmall / (groups.images * s.P + 1));
  parallel_for(0, groups.count * s.C, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t stop = std::min(end, (i / s.C + 1) * s.C);
      f(i / s.C, i % s.C, stop - i / s.C * s.C);
      i = stop;
    }
  });
}

// Calls f(group, workers). With shared statistics all threads work on the only group.
template <class F>
void for_groups(const Groups& groups, const Shape& s, bool shared, const F& f) {
  if (shared) {
    if (groups.count) f(0, Workers(true));
    return;
  }
  for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
    for (int64_t n = begin; n < end; ++n) f(n, workers);
  });
}

// The parts of a group of channels_last images; each part lies in one image.
template <class T>
struct GroupParts {
  Split split;
  int64_t images;
  GroupParts(const Shape& s, const Groups& groups) : split(row_parts<T>(s, true)), images(groups.images) {}
  int64_t count() const { return images * split.count; }
  int64_t image(int64_t i) const { return i / split.count; }
  int64_t begin(int64_t i) const { return split.begin(i % split.count); }
  int64_t end(int64_t i) const { return split.end(i % split.count); }
  int64_t rows(int64_t i) const { return end(i) - begin(i); }
};

template <class T, class Algebra>
Tensor self_gate_fwd(const FeatureMap& x, const Shape& s, const std::optional<Tensor>& residual,
                     int64_t activation, Algebra& algebra, const Scaled* scaled = nullptr) {
  using A = Acc<T>;
  constexpr bool kOther = Algebra::kOther, kShared = Algebra::kShared, kShuffled = Algebra::kShuffled;
  const auto res = optional_map(residual, s, x.nhwc);
  Tensor y = empty_map(s, x.nhwc, x.tensor.scalar_type());
  const Groups groups(s, kShared);
  const int64_t image = s.C * s.P, values = groups.images * s.P;
  const auto residual_at = [&](int64_t n, int64_t skip) {
    const T* p = image_or_null<T>(res, n);
    return p ? p + skip : nullptr;
  };
  const auto scaled_at = [&](int64_t n, int64_t skip) {
    return kOther ? scaled->map.template image<T>(n) + skip : nullptr;
  };
  if (!x.nhwc) {
    for_channels(groups, s, [&](int64_t g, int64_t c0, int64_t c1) {
      const int64_t n0 = g * groups.images;
      SelfGate<A> k(1);
      Buffer<A> mean(groups.images), second(groups.images);
      for (int64_t c = c0; c < c1; ++c) {
        const auto plane = [&](int64_t i) { return x.image<T>(n0 + i) + c * x.ld; };
        Moments<A> moments{};
        if (!algebra.fixed()) {
          for (int64_t i = 0; i < groups.images; ++i) {
            moments = row_moments(plane(i), s.P);
            mean[i] = moments.mean, second[i] = moments.second;
          }
          if (groups.images > 1) {
            moments = combine_moments<A>(
                groups.images, [&](int64_t i) { return Moments<A>{mean[i], second[i]}; },
                [&](int64_t) { return s.P; });
          }
        }
        k.set(0, algebra.fit(g, c, moments, values));
        const int64_t skip = result_channel(c, s.C, kShuffled) * s.P;
        for (int64_t i = 0; i < groups.images; ++i) {
          T* out = data<T>(y) + (n0 + i) * image + skip;
          const T* pr = residual_at(n0 + i, skip);
          with_epilogue(activation, pr, [&](auto kAct, auto kResidual) {
            self_gate_row<Algebra, T, kAct, kResidual>(plane(i), scaled_at(n0 + i, c * s.P), s.P, arrays(k),
                                                       pr, out);
          });
        }
      }
    });
    return y;
  }
  const GroupParts<T> parts(s, groups);
  for_groups(groups, s, kShared, [&](int64_t g, const Workers& workers) {
    const int64_t n0 = g * groups.images;
    SelfGate<A> k(s.C);
    const auto block = [&](int64_t i) {
      return rows_of(matrix(x.image<T>(n0 + parts.image(i)), s, true, x.ld), parts.begin(i), parts.end(i));
    };
    ChannelPartials<A> mean(s.C, algebra.fixed() ? 1 : parts.count()),
        second(s.C, algebra.fixed() ? 1 : parts.count());
    if (!algebra.fixed()) {
      workers.each(parts.count(), [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) column_moments(block(i), mean.part(i), second.part(i));
      });
    }
    for (int64_t c = 0; c < s.C; ++c) {
      Moments<A> moments{};
      if (!algebra.fixed()) {
        moments = combine_moments<A>(
            parts.count(), [&](int64_t i) { return Moments<A>{mean.part(i)[c], second.part(i)[c]}; },
            [&](int64_t i) { return parts.rows(i); });
      }
      k.set(c, algebra.fit(g, c, moments, values));
    }
    workers.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        T* out = data<T>(y) + n * image + skip;
        const T* pr = residual_at(n, skip);
        with_epilogue(activation, pr, [&](auto kAct, auto kResidual) {
          self_gate_columns<Algebra, T, kAct, kResidual>(block(i), scaled_at(n, skip), arrays(k), pr, out,
                                                         s.C);
        });
      }
    });
  });
  return y;
}

template <class T, class Algebra>
MapGrads self_gate_bwd(const Tensor& grad, const FeatureMap& x, const Shape& s,
                       const std::optional<Tensor>& residual, int64_t activation, Algebra& algebra,
                       const Scaled* scaled = nullptr) {
  using A = Acc<T>;
  constexpr bool kOther = Algebra::kOther, kShared = Algebra::kShared, kShuffled = Algebra::kShuffled;
  const auto dtype = x.tensor.scalar_type();
  const bool act = activation != kNone;
  const FeatureMap g_map = dense_map(grad, s, x.nhwc);
  const auto res = act ? optional_map(residual, s, x.nhwc) : std::nullopt;
  MapGrads out{empty_map(s, x.nhwc, dtype), empty_residual_grad(s, x.nhwc, dtype, act)};
  const Groups groups(s, kShared);
  const int64_t image = s.C * s.P, values = groups.images * s.P;
  const auto residual_at = [&](int64_t n, int64_t skip) {
    const T* p = image_or_null<T>(res, n);
    return p ? p + skip : nullptr;
  };
  const auto kept_at = [&](int64_t n, int64_t skip) {
    return act ? data<T>(out.dresidual) + n * image + skip : nullptr;
  };
  const auto dx_at = [&](int64_t n, int64_t skip) { return data<T>(out.dx) + n * image + skip; };
  const auto scaled_at = [&](int64_t n, int64_t skip) {
    return kOther ? scaled->map.template image<T>(n) + skip : nullptr;
  };
  const auto dscaled_at = [&](int64_t n, int64_t skip) {
    return kOther ? data<T>(scaled->grad) + n * image + skip : nullptr;
  };
  if (!x.nhwc) {
    for_channels(groups, s, [&](int64_t g, int64_t c0, int64_t c1) {
      const int64_t n0 = g * groups.images;
      SelfGate<A> k(1);
      Buffer<A> base(std::is_same_v<T, A> ? 0 : groups.images * s.P);
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t skip = result_channel(c, s.C, kShuffled) * s.P;
        k.set(0, algebra.known(g, c));
        Sums<double> sums{};
        const auto base_at = [&](int64_t n) {
          if constexpr (std::is_same_v<T, A>) {
            return dx_at(n, c * s.P);
          } else {
            return base.get() + (n - n0) * s.P;
          }
        };
        for (int64_t n = n0; n < n0 + groups.images; ++n) {
          const Sums<double> part = with_activation(activation, [&](auto kAct) {
            return self_gate_sums_row<Algebra, T, kAct>(
                x.image<T>(n) + c * x.ld, scaled_at(n, c * s.P), s.P, arrays(k), g_map.image<T>(n) + skip,
                residual_at(n, skip), kept_at(n, skip), base_at(n), dscaled_at(n, c * s.P));
          });
          sums.lower += part.lower, sums.upper += part.upper;
        }
        k.set(0, algebra.line(g, c, rounded<A>(sums), values));
        if (std::is_same_v<T, A> && algebra.fixed()) continue;  // the line is 0
        for (int64_t n = n0; n < n0 + groups.images; ++n)
          self_gate_grad_row<Algebra, T>(x.image<T>(n) + c * x.ld, s.P, arrays(k), base_at(n),
                                         dx_at(n, c * s.P));
      }
    });
    return out;
  }
  const GroupParts<T> parts(s, groups);
  for_groups(groups, s, kShared, [&](int64_t g, const Workers& workers) {
    const int64_t n0 = g * groups.images;
    SelfGate<A> k(s.C);
    for (int64_t c = 0; c < s.C; ++c) k.set(c, algebra.known(g, c));
    ChannelPartials<A> lower(s.C, parts.count()), upper(s.C, parts.count());
    const auto block = [&](int64_t i) {
      return rows_of(matrix(x.image<T>(n0 + parts.image(i)), s, true, x.ld), parts.begin(i), parts.end(i));
    };
    workers.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        with_activation(activation, [&](auto kAct) {
          self_gate_sums_columns<Algebra, T, kAct>(
              block(i), scaled_at(n, skip), arrays(k), g_map.image<T>(n) + skip, residual_at(n, skip),
              kept_at(n, skip), dx_at(n, skip), dscaled_at(n, skip), s.C, lower.part(i), upper.part(i));
        });
      }
    });
    Buffer<Sums<double>> sums(s.C);
    for (int64_t i = 0; i < parts.count(); ++i) {
      for (int64_t c = 0; c < s.C; ++c) {
        sums[c].lower += lower.part(i)[c], sums[c].upper += upper.part(i)[c];
      }
    }
    for (int64_t c = 0; c < s.C; ++c) k.set(c, algebra.line(g, c, rounded<A>(sums[c]), values));
    if (algebra.fixed()) return;  // the line is 0
    workers.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        self_gate_grad_columns<Algebra, T>(block(i), arrays(k), dx_at(n, skip), s.C);
      }
    });
  });
  return out;
}

}  // namespace visattn
