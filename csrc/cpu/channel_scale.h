// Gates that scale whole channels (SE, ECA, ...): y = act(x * gate[c] + residual) and its backward. A module
// brings the mathematics from pooled means to gates and back.
#pragma once

#include "image.h"
#include "mlp.h"

namespace visattn {

inline const void* image_or_null(const std::optional<FeatureMap>& map, int64_t n, size_t size) {
  if (!map) return nullptr;
  return static_cast<const char*>(map->tensor.const_data_ptr()) +
         n * map->stride_n * static_cast<int64_t>(size);
}

inline std::optional<FeatureMap> optional_map(const std::optional<Tensor>& t, const Shape& s, bool nhwc) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->numel() == s.N * s.C * s.P, "residual must have the shape of x");
  return dense_map(*t, s, nhwc);
}

// gate_of(n, mean [C], gate [C]) fills the gate of image n. mean and gate are [N, C].
template <class T, class GateOf>
Tensor channel_scale_fwd(const FeatureMap& x, const Shape& s, const std::optional<Tensor>& residual,
                         int64_t activation, Acc<T>* mean, Acc<T>* gate, const GateOf& gate_of) {
  using A = Acc<T>;
  const auto res = optional_map(residual, s, x.nhwc);
  Tensor y = empty_map(s, x.nhwc, x.tensor.scalar_type());
  T* py = data<T>(y);
  const int64_t dense_ld = x.nhwc ? s.C : s.P;
  for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Team& team) {
    ChannelPool<T, false> pool(s, x.nhwc);
    Buffer<A> padded(s.C);
    const Split parts = row_parts<T>(s, x.nhwc);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, x.nhwc, x.ld);
      pool.run(in, team, mean + n * s.C);
      gate_of(n, mean + n * s.C, gate + n * s.C);
      std::copy_n(gate + n * s.C, s.C, padded.get());
      const T* pr = static_cast<const T*>(image_or_null(res, n, sizeof(T)));
      team.each(parts.count, [&](int64_t b, int64_t e) {
        const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1), skip = r0 * dense_ld;
        apply_gate<T>(rows_of(in, r0, r1), channel_gate(x.nhwc, padded.get(), r0), pr ? pr + skip : nullptr,
                      py + n * s.C * s.P + skip, dense_ld, activation);
      });
    }
  });
  return y;
}

struct ChannelScaleGrad {
  Tensor dx, dresidual;
};

// dmean_of(n, dgate [C], dmean [C]) turns the gate's gradient into the gradient of the channel means.
template <class T, class DmeanOf>
ChannelScaleGrad channel_scale_bwd(const Tensor& grad, const FeatureMap& x, const Shape& s,
                                   const std::optional<Tensor>& residual, const Acc<T>* gate,
                                   int64_t activation, const DmeanOf& dmean_of) {
  using A = Acc<T>;
  const auto dtype = x.tensor.scalar_type();
  const bool nhwc = x.nhwc, act = activation != kNone;
  const FeatureMap g = dense_map(grad, s, nhwc);
  const auto res = act ? optional_map(residual, s, nhwc) : std::nullopt;
  ChannelScaleGrad out{empty_map(s, nhwc, dtype), act ? empty_map(s, nhwc, dtype) : empty({0}, dtype)};
  const int64_t image = s.C * s.P;
  for_images(s.N, image, [&](int64_t begin, int64_t end, const Team& team) {
    const Split parts = row_parts<T>(s, nhwc);
    ChannelPartials<A> dots(s.C, nhwc ? parts.count : 1);
    Buffer<A> dgate(s.C), dmean(s.C), scale(s.C);
    for (int64_t n = begin; n < end; ++n) {
      const auto in = matrix(x.image<T>(n), s, nhwc, x.ld);
      std::copy_n(gate + n * s.C, s.C, scale.get());
      const T* pr = static_cast<const T*>(image_or_null(res, n, sizeof(T)));
      T* kept = act ? data<T>(out.dresidual) + n * image : nullptr;
      const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
      team.each(parts.count, [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) {
          const int64_t r0 = parts.begin(i), r1 = parts.end(i), skip = r0 * g.ld;
          const auto xs = rows_of(in, r0, r1), gs = rows_of(upstream, r0, r1);
          if (act) {
            gate_grad<T>(xs, channel_gate<A>(nhwc, scale.get(), r0), g.image<T>(n) + skip,
                         pr ? pr + skip : nullptr, kept + skip, g.ld, activation);
          }
          if (nhwc) {
            products<T, false, true>(xs, gs, nullptr, nullptr, nullptr, dots.part(i));
          } else {
            products<T, true, false>(xs, gs, nullptr, nullptr, dots.part(0) + r0, nullptr);
          }
        }
      });
      dots.sum(dgate.get());
      dmean_of(n, dgate.get(), dmean.get());
      for (int64_t c = 0; c < s.C; ++c) dmean[c] /= static_cast<A>(s.P);
      team.each(parts.count, [&](int64_t b, int64_t e) {
        const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1);
        const auto gs = rows_of(upstream, r0, r1);
        T* dx = data<T>(out.dx) + n * image + r0 * g.ld;
        if (nhwc) {
          affine<T, false>(gs, scale.get(), dmean.get(), dx);
        } else {
          affine<T, true>(gs, scale.get() + r0, dmean.get() + r0, dx);
        }
      });
    }
  });
  return out;
}

}  // namespace visattn
