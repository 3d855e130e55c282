// Gates that each element computes of itself and of its channel (SimAM, NAM, ...):
//   y = act(x * sigmoid((q d + a) d + b) + residual), d = x - m, with m, q, a, b of the channel;
// or that it computes for the same element of another map, which is then what is scaled (GAM).
//
// A module brings its algebra, a class with
//   kOther      another map z is scaled: y = act(z * sigmoid(...) + residual);
//   kShared     the statistics are the batch's, not each image's;
//   kShuffled   channel h C/2 + j of the result of the gate is channel 2 j + h of y;
//   fixed()     m, q, a, b are known without the moments of x;
//   fit(g, c, moments, count) -> Coefficients: of channel c in group g (an image, or 0 where kShared);
//   known(g, c) -> Coefficients: the same in the backward pass, from what the forward pass has kept;
//   line(g, c, sums, count) -> Line: what the statistics add to dx; it keeps what the parameters' gradients
//   need.
#pragma once

#include "channel_scale.h"
#include "moments.h"

namespace visattn {

// m that is NaN stands for d = 0: the gate is sigmoid(b) all over the channel, whatever x holds.
template <class A>
struct Coefficients {
  A m, q, a, b;
};

// With r the gradient before the sigmoid: sums of r, r d and r d^2 over the values behind a statistic. Chunks
// are added up in double: an error of the sums is the same all over dx, and adds up in whatever stands
// before.
template <class A>
struct Sums {
  A r, rd, rdd;
};

template <class A>
Sums<A> rounded(const Sums<double>& s) {
  return {static_cast<A>(s.r), static_cast<A>(s.rd), static_cast<A>(s.rdd)};
}

// dx = g sigmoid + r (2 q d + a) + u d + v; with another map the first term is dz.
template <class A>
struct Line {
  A u, v;
};

// Everything above for a run of channels, a padded array each: what the passes read and write.
template <class A>
class SelfGate {
 public:
  explicit SelfGate(int64_t channels) : stride_((channels + 15) / 16 * 16), values_(6 * stride_) {}
  A* m() { return at(0); }
  A* q() { return at(1); }
  A* a() { return at(2); }
  A* b() { return at(3); }
  A* u() { return at(4); }
  A* v() { return at(5); }
  void set(int64_t c, Coefficients<A> k) { m()[c] = k.m, q()[c] = k.q, a()[c] = k.a, b()[c] = k.b; }
  void set(int64_t c, Line<A> line) { u()[c] = line.u, v()[c] = line.v; }

 private:
  A* at(int64_t i) { return values_.get() + i * stride_; }
  int64_t stride_;
  Buffer<A> values_;
};

template <class A>
struct GateArrays {
  const A *m, *q, *a, *b, *u, *v;
};

template <class A>
GateArrays<A> arrays(SelfGate<A>& k, int64_t c = 0) {
  return {k.m() + c, k.q() + c, k.a() + c, k.b() + c, k.u() + c, k.v() + c};
}

// ---- vectors: of x at columns c and, shuffled, also half + c; of y side by side from 2 c on ----

template <class T, class V, class Lanes>
VF_INLINE inline void load_result(const T* p, int64_t c, Lanes lanes, V (&v)[1]) {
  v[0] = load(p + c, lanes);
}
template <class T, class V, class Lanes>
VF_INLINE inline void store_result(T* p, int64_t c, Lanes lanes, const V (&v)[1]) {
  store(p + c, v[0], lanes);
}
template <class T, class V>
VF_INLINE inline void load_result(const T* p, int64_t c, Full, V (&v)[2]) {
  unzip(load(p + 2 * c), load(p + 2 * c + kLanes<Acc<T>>), v[0], v[1]);
}
template <class T, class V>
VF_INLINE inline void store_result(T* p, int64_t c, Full, const V (&v)[2]) {
  V low, high;
  zip(v[0], v[1], low, high);
  store(p + 2 * c, low), store(p + 2 * c + kLanes<Acc<T>>, high);
}
template <class T, class V>
VF_INLINE inline void load_result(const T* p, int64_t c, Tail tail, V (&v)[2]) {
  T lanes[2 * kLanes<Acc<T>>] = {};
  for (int j = 0; j < 2 * tail.n; ++j) lanes[j] = p[2 * c + j];
  load_result(lanes, 0, Full{}, v);
}
template <class T, class V>
VF_INLINE inline void store_result(T* p, int64_t c, Tail tail, const V (&v)[2]) {
  T lanes[2 * kLanes<Acc<T>>];
  store_result(lanes, 0, Full{}, v);
  for (int j = 0; j < 2 * tail.n; ++j) p[2 * c + j] = lanes[j];
}

// The coefficients of a row, or of one vector of columns.
template <class A>
struct Lanes {
  Vec<A> m, q, a, b, u, v;

  VF_INLINE static Lanes of_row(const GateArrays<A>& k, int64_t r) {
    return {set1<A>(k.m[r]), set1<A>(k.q[r]), set1<A>(k.a[r]),
            set1<A>(k.b[r]), set1<A>(k.u[r]), set1<A>(k.v[r])};
  }
  template <class Count>
  VF_INLINE static Lanes of_columns(const GateArrays<A>& k, int64_t c, Count lanes) {
    return {load(k.m + c, lanes), load(k.q + c, lanes), load(k.a + c, lanes),
            load(k.b + c, lanes), load(k.u + c, lanes), load(k.v + c, lanes)};
  }
  VF_INLINE Vec<A> deviation(Vec<A> x) const { return (m == m) ? x - m : Vec<A>{}; }
  // Where there is no quadratic term, an infinite d is not to make one: 0 * inf is NaN.
  VF_INLINE Vec<A> sigmoid(Vec<A> d) const {
    return sigmoid_lanes((((q == Vec<A>{}) ? Vec<A>{} : q * d) + a) * d + b);
  }
};

// Another map, dense and in the layout of x, and where its gradient goes.
struct Scaled {
  FeatureMap map;
  Tensor grad;
};

// ---- passes. Stores may alias anything as far as the compiler knows, so all that loops need is copied
// first. Result-like matrices (y, grad, residual) are dense, `ld` apart.

template <class T, int kAct, bool kResidual, bool kOther>
void self_gate_row(const T* x, const T* scaled, int64_t count, GateArrays<Acc<T>> k, const T* residual,
                   T* y) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    const auto gate = Lanes<A>::of_row(k, 0);
    const T *px = x, *pz = scaled, *pr = residual;
    T* py = y;
    for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
      const Vec<A> in = load(px + c, lanes);
      Vec<A> z = in;
      if constexpr (kOther) z = load(pz + c, lanes);
      Vec<A> v = z * gate.sigmoid(gate.deviation(in));
      if constexpr (kResidual) v += load(pr + c, lanes);
      store(py + c, activate<kAct>(v), lanes);
    });
  });
}

template <class T, int kAct, bool kResidual, bool kShuffled, bool kOther>
void self_gate_columns(Matrix<const T> x, const T* scaled, GateArrays<Acc<T>> arrays, const T* residual, T* y,
                       int64_t ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    constexpr int K = kShuffled ? 2 : 1;
    const int64_t count = x.cols / K;
    for_row_groups<true>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      const T *px[R], *pz[R], *pr[R];
      T* py[R];
      for (int r = 0; r < R; ++r) {
        px[r] = x.row(r0 + r);
        pz[r] = kOther ? scaled + (r0 + r) * ld : nullptr;
        pr[r] = kResidual ? residual + (r0 + r) * ld : nullptr;
        py[r] = y + (r0 + r) * ld;
      }
      for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
        Lanes<A> gate[K];
        for (int i = 0; i < K; ++i) gate[i] = Lanes<A>::of_columns(k, i * count + c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec<A> v[K], res[K] = {};
          if constexpr (kResidual) load_result(pr[r], c, lanes, res);
          for (int i = 0; i < K; ++i) {
            const Vec<A> in = load(px[r] + i * count + c, lanes);
            v[i] = in;
            if constexpr (kOther) v[i] = load(pz[r] + i * count + c, lanes);
            v[i] *= gate[i].sigmoid(gate[i].deviation(in));
            if constexpr (kResidual) v[i] += res[i];
            v[i] = activate<kAct>(v[i]);
          }
          store_result(py[r], c, lanes, v);
        }
      });
    });
  });
}

// What is scaled gets `scaled`, what the gate is made of `through` and a line.
template <class A>
struct Terms {
  Vec<A> scaled, through;
};

// r, r d and r d^2 of one vector are added to `sum`; g becomes g' = g act'(.).
// Returns g' s and r (2 q d + a).
template <int kAct, class A>
VF_INLINE inline Terms<A> gradient_terms(const Lanes<A>& gate, Vec<A> in, Vec<A> z, Vec<A>& g,
                                         Vec<A> residual, Vec<A> (&sum)[3]) {
  const Vec<A> d = gate.deviation(in), s = gate.sigmoid(d);
  if constexpr (kAct != kNone) g = activate_grad<kAct>(g, z * s + residual);
  const Vec<A> gs = g * s, r = gs * z * (1 - s), rd = r * d;
  sum[0] += r, sum[1] += rd, sum[2] += rd * d;
  return {gs, r * (2 * gate.q * d + gate.a)};
}

// Sums of a row. With an activation g' goes to `kept`; `base` gets what dx is but for the line u d + v, and
// `dscaled` the gradient of the other map.
template <class T, int kAct, bool kOther>
Sums<double> self_gate_sums_row(const T* x, const T* scaled, int64_t count, GateArrays<Acc<T>> k,
                                const T* grad, const T* residual, T* kept, Acc<T>* base, T* dscaled) {
  using A = Acc<T>;
  Sums<double> out{};
  simd([=, &out]() VF_INLINE {
    const auto gate = Lanes<A>::of_row(k, 0);
    double total[3] = {};
    for (int64_t c0 = 0; c0 < count; c0 += kChunk * kLanes<A>) {
      const T *px = x + c0, *pg = grad + c0, *pr = residual ? residual + c0 : nullptr;
      const T* pz = kOther ? scaled + c0 : nullptr;
      T *pk = kAct != kNone ? kept + c0 : nullptr, *po = kOther ? dscaled + c0 : nullptr;
      A* pb = base + c0;
      Vec<A> part[3] = {};
      for_vectors<A>(std::min(count - c0, kChunk * kLanes<A>), [=, &part](int64_t c, auto lanes) VF_INLINE {
        Vec<A> g = load(pg + c, lanes), res = {};
        if (kAct != kNone && pr) res = load(pr + c, lanes);
        const Vec<A> in = load(px + c, lanes);
        Vec<A> z = in;
        if constexpr (kOther) z = load(pz + c, lanes);
        const Terms<A> terms = gradient_terms<kAct, A>(gate, in, z, g, res, part);
        if constexpr (kOther) store(po + c, terms.scaled, lanes);
        store(pb + c, kOther ? terms.through : terms.scaled + terms.through, lanes);
        if constexpr (kAct != kNone) store(pk + c, g, lanes);
      });
      for (int t = 0; t < 3; ++t) total[t] += sum_lanes<A>(part[t]);
    }
    out = {total[0], total[1], total[2]};
  });
  return out;
}

// dx = base + u d + v; base may be dx.
template <class T>
void self_gate_grad_row(const T* x, int64_t count, GateArrays<Acc<T>> k, const Acc<T>* base, T* dx) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    const auto gate = Lanes<A>::of_row(k, 0);
    const T* px = x;
    const A* pb = base;
    T* po = dx;
    for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
      const Vec<A> d = gate.deviation(load(px + c, lanes));
      store(po + c, load(pb + c, lanes) + gate.u * d + gate.v, lanes);
    });
  });
}

// Sums of columns; what else is written is as for a row, with dx as `base`.
template <class T, int kAct, bool kShuffled, bool kOther>
void self_gate_sums_columns(Matrix<const T> x, const T* scaled, GateArrays<Acc<T>> arrays, const T* grad,
                            const T* residual, T* kept, T* dx, T* dscaled, int64_t ld, Acc<T>* s0, Acc<T>* s1,
                            Acc<T>* s2) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    constexpr int K = kShuffled ? 2 : 1;
    const int64_t count = x.cols / K;
    for (int64_t c = 0; c < x.cols; ++c) s0[c] = s1[c] = s2[c] = 0;
    for_row_groups<true>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      A* const out[3] = {s0, s1, s2};
      const T *px[R], *pz[R], *pg[R], *pr[R];
      T *pk[R], *po[R], *pd[R];
      for (int r = 0; r < R; ++r) {
        px[r] = x.row(r0 + r), pg[r] = grad + (r0 + r) * ld;
        pz[r] = kOther ? scaled + (r0 + r) * ld : nullptr;
        pr[r] = residual ? residual + (r0 + r) * ld : nullptr;
        pk[r] = kAct != kNone ? kept + (r0 + r) * ld : nullptr;
        po[r] = dx + (r0 + r) * ld, pd[r] = kOther ? dscaled + (r0 + r) * ld : nullptr;
      }
      for_vectors<A>(count, [=](int64_t c, auto lanes) VF_INLINE {
        Lanes<A> gate[K];
        Vec<A> sum[K][3] = {};
        for (int i = 0; i < K; ++i) gate[i] = Lanes<A>::of_columns(k, i * count + c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec<A> g[K], res[K] = {};
          load_result(pg[r], c, lanes, g);
          if (kAct != kNone && pr[r]) load_result(pr[r], c, lanes, res);
          for (int i = 0; i < K; ++i) {
            const Vec<A> in = load(px[r] + i * count + c, lanes);
            Vec<A> z = in;
            if constexpr (kOther) z = load(pz[r] + i * count + c, lanes);
            const Terms<A> terms = gradient_terms<kAct, A>(gate[i], in, z, g[i], res[i], sum[i]);
            if constexpr (kOther) store(pd[r] + i * count + c, terms.scaled, lanes);
            store(po[r] + i * count + c, kOther ? terms.through : terms.scaled + terms.through, lanes);
          }
          if constexpr (kAct != kNone) store_result(pk[r], c, lanes, g);
        }
        for (int i = 0; i < K; ++i) {
          for (int t = 0; t < 3; ++t) {
            A* at = out[t] + i * count + c;
            store(at, load(at, lanes) + sum[i][t], lanes);
          }
        }
      });
    });
  });
}

// dx += u d + v, of columns.
template <class T>
void self_gate_grad_columns(Matrix<const T> x, GateArrays<Acc<T>> arrays, T* dx, int64_t ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_row_groups<true>(x, [&](int64_t r0, auto group) VF_INLINE {
      constexpr int R = decltype(group)::value;
      const auto k = arrays;
      const T* px[R];
      T* po[R];
      for (int r = 0; r < R; ++r) px[r] = x.row(r0 + r), po[r] = dx + (r0 + r) * ld;
      for_vectors<A>(x.cols, [=](int64_t c, auto lanes) VF_INLINE {
        const auto gate = Lanes<A>::of_columns(k, c, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<A> d = gate.deviation(load(px[r] + c, lanes));
          store(po[r] + c, load(po[r] + c, lanes) + gate.u * d + gate.v, lanes);
        }
      });
    });
  });
}

// Calls f with the activation as a compile-time constant.
template <class F>
auto with_activation(int64_t activation, const F& f) {
  if (activation == kRelu) return f(std::integral_constant<int, kRelu>{});
  if (activation == kSilu) return f(std::integral_constant<int, kSilu>{});
  return f(std::integral_constant<int, kNone>{});
}

// Calls f with the activation and the presence of the residual as compile-time constants.
template <class F>
void with_epilogue(int64_t activation, bool residual, const F& f) {
  with_activation(activation, [&](auto act) {
    if (residual) {
      f(act, std::true_type{});
    } else {
      f(act, std::false_type{});
    }
  });
}

// ---- drivers ----

// The images that share their statistics, one group after the other: [first, first + images).
struct Groups {
  int64_t count, images;
  Groups(const Shape& s, bool shared) : count(shared ? (s.N > 0) : s.N), images(shared ? s.N : 1) {}
};

inline int64_t result_channel(int64_t c, int64_t C, bool shuffled) {
  return shuffled ? c % (C / 2) * 2 + c / (C / 2) : c;
}

// f(group, begin, end) over channels: a channel's planes in a group stay in cache from the first pass to the
// last.
template <class F>
void for_channels(const Groups& groups, const Shape& s, const F& f) {
  constexpr int64_t kTooSmall = 1 << 13;
  const int64_t grain = std::max<int64_t>(1, kTooSmall / (groups.images * s.P + 1));
  torch::stable::parallel_for(0, groups.count * s.C, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t stop = std::min(end, (i / s.C + 1) * s.C);
      f(i / s.C, i % s.C, stop - i / s.C * s.C);
      i = stop;
    }
  });
}

// f(group, team): where statistics are the batch's, all threads work on the one group.
template <class F>
void for_groups(const Groups& groups, const Shape& s, bool shared, const F& f) {
  if (shared) {
    if (groups.count) f(0, Team(true));
    return;
  }
  for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Team& team) {
    for (int64_t n = begin; n < end; ++n) f(n, team);
  });
}

// Parts of a group of channels_last images: part i lies in one image.
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
    const T* p = static_cast<const T*>(image_or_null(res, n, sizeof(T)));
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
            self_gate_row<T, kAct, kResidual, kOther>(plane(i), scaled_at(n0 + i, c * s.P), s.P, arrays(k),
                                                      pr, out);
          });
        }
      }
    });
    return y;
  }
  const GroupParts<T> parts(s, groups);
  for_groups(groups, s, kShared, [&](int64_t g, const Team& team) {
    const int64_t n0 = g * groups.images;
    SelfGate<A> k(s.C);
    const auto block = [&](int64_t i) {
      return rows_of(matrix(x.image<T>(n0 + parts.image(i)), s, true, x.ld), parts.begin(i), parts.end(i));
    };
    ChannelPartials<A> mean(s.C, algebra.fixed() ? 1 : parts.count()),
        second(s.C, algebra.fixed() ? 1 : parts.count());
    if (!algebra.fixed()) {
      team.each(parts.count(), [&](int64_t b, int64_t e) {
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
    team.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        T* out = data<T>(y) + n * image + skip;
        const T* pr = residual_at(n, skip);
        with_epilogue(activation, pr, [&](auto kAct, auto kResidual) {
          self_gate_columns<T, kAct, kResidual, kShuffled, kOther>(block(i), scaled_at(n, skip), arrays(k),
                                                                   pr, out, s.C);
        });
      }
    });
  });
  return y;
}

template <class T, class Algebra>
ChannelScaleGrad self_gate_bwd(const Tensor& grad, const FeatureMap& x, const Shape& s,
                               const std::optional<Tensor>& residual, int64_t activation, Algebra& algebra,
                               const Scaled* scaled = nullptr) {
  using A = Acc<T>;
  constexpr bool kOther = Algebra::kOther, kShared = Algebra::kShared, kShuffled = Algebra::kShuffled;
  const auto dtype = x.tensor.scalar_type();
  const bool act = activation != kNone;
  const FeatureMap g_map = dense_map(grad, s, x.nhwc);
  const auto res = act ? optional_map(residual, s, x.nhwc) : std::nullopt;
  ChannelScaleGrad out{empty_map(s, x.nhwc, dtype), act ? empty_map(s, x.nhwc, dtype) : empty({0}, dtype)};
  const Groups groups(s, kShared);
  const int64_t image = s.C * s.P, values = groups.images * s.P;
  const auto residual_at = [&](int64_t n, int64_t skip) {
    const T* p = static_cast<const T*>(image_or_null(res, n, sizeof(T)));
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
            return self_gate_sums_row<T, kAct, kOther>(
                x.image<T>(n) + c * x.ld, scaled_at(n, c * s.P), s.P, arrays(k), g_map.image<T>(n) + skip,
                residual_at(n, skip), kept_at(n, skip), base_at(n), dscaled_at(n, c * s.P));
          });
          sums.r += part.r, sums.rd += part.rd, sums.rdd += part.rdd;
        }
        k.set(0, algebra.line(g, c, rounded<A>(sums), values));
        if (std::is_same_v<T, A> && algebra.fixed()) continue;  // the line is 0
        for (int64_t n = n0; n < n0 + groups.images; ++n)
          self_gate_grad_row<T>(x.image<T>(n) + c * x.ld, s.P, arrays(k), base_at(n), dx_at(n, c * s.P));
      }
    });
    return out;
  }
  const GroupParts<T> parts(s, groups);
  for_groups(groups, s, kShared, [&](int64_t g, const Team& team) {
    const int64_t n0 = g * groups.images;
    SelfGate<A> k(s.C);
    for (int64_t c = 0; c < s.C; ++c) k.set(c, algebra.known(g, c));
    ChannelPartials<A> r(s.C, parts.count()), rd(s.C, parts.count()), rdd(s.C, parts.count());
    const auto block = [&](int64_t i) {
      return rows_of(matrix(x.image<T>(n0 + parts.image(i)), s, true, x.ld), parts.begin(i), parts.end(i));
    };
    team.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        with_activation(activation, [&](auto kAct) {
          self_gate_sums_columns<T, kAct, kShuffled, kOther>(
              block(i), scaled_at(n, skip), arrays(k), g_map.image<T>(n) + skip, residual_at(n, skip),
              kept_at(n, skip), dx_at(n, skip), dscaled_at(n, skip), s.C, r.part(i), rd.part(i), rdd.part(i));
        });
      }
    });
    Buffer<Sums<double>> sums(s.C);
    for (int64_t i = 0; i < parts.count(); ++i) {
      for (int64_t c = 0; c < s.C; ++c) {
        sums[c].r += r.part(i)[c], sums[c].rd += rd.part(i)[c], sums[c].rdd += rdd.part(i)[c];
      }
    }
    for (int64_t c = 0; c < s.C; ++c) k.set(c, algebra.line(g, c, rounded<A>(sums[c]), values));
    if (algebra.fixed()) return;  // the line is 0
    team.each(parts.count(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = n0 + parts.image(i), skip = parts.begin(i) * s.C;
        self_gate_grad_columns<T>(block(i), arrays(k), dx_at(n, skip), s.C);
      }
    });
  });
  return out;
}

}  // namespace visattn
