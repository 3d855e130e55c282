// Triplet attention: maximum and mean over each axis of x, y = act(x * (mean of the gates) + residual), the
// gates' gradients, and dx.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/activations.h"
#include "channel_pool.h"
#include "cube.h"
#include "cube_passes.h"
#include "cube_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

std::tuple<Tensor, Tensor> triplet_pool(Tensor x, bool spatial) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Faces f = faces_of(s, map.nhwc, spatial);
    Tensor pooled = empty({s.N, 2, f.size}, kDtype<A>), at = empty({s.N, f.size}, ScalarType::Int);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const auto shape = cube_of<T>(nullptr, s, map.nhwc, map.ld);
      const Split parts = plane_parts(shape.A);
      std::vector<Pooled<A>> across;
      for (int64_t i = 0; i < parts.count; ++i) {
        across.emplace_back(parts.size, f.bd < 0 ? 0 : shape.B, shape.D, shape.flat());
      }
      for (int64_t n = begin; n < end; ++n) {
        const auto q = cube_of(map.image<T>(n), s, map.nhwc, map.ld);
        A* max = data<A>(pooled) + 2 * n * f.size;
        const PooledFaces<A> out{max, max + f.size, data<int32_t>(at) + n * f.size};
        workers.each(parts.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) {
            for (int64_t a0 = parts.begin(b); a0 < parts.end(b); a0 += kPlanes) {
              const int64_t a1 = std::min(a0 + kPlanes, parts.end(b));
              pool_inside(q, f, a0, a1, out);
              if (f.bd >= 0) pool_planes(q, parts.begin(b), parts.end(b), a0, a1, across[b]);
            }
          }
        });
        if (f.bd < 0) continue;
        for (int64_t i = 1; i < parts.count; ++i) merge(across[0], across[i]);
        pool_across(q, f, across[0], out);
      }
    });
    return std::make_tuple(pooled, at);
  });
}

Tensor triplet_scale(Tensor x, Tensor gates, std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Faces f = faces_of(s, map.nhwc, gates);
    const auto res = optional_map(residual, s, map.nhwc);
    Tensor y = empty_map(s, map.nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const auto shape = cube_of<T>(nullptr, s, map.nhwc, map.ld);
      const Split pieces = plane_pieces(shape);
      Gates<T> gate(shape.A, shape.B, shape.D);
      for (int64_t n = begin; n < end; ++n) {
        const auto q = cube_of(map.image<T>(n), s, map.nhwc, map.ld);
        gate.set(f, data<A>(gates) + n * f.size, q);
        workers.each(pieces.count, [&](int64_t b, int64_t e) {
          with_activation(activation, [&](auto act) {
            scale_planes<T, decltype(act)::value, false>(q, gate, nullptr, image_or_null<T>(res, n),
                                                         data<T>(y) + n * s.C * s.P, pieces.begin(b),
                                                         pieces.end(e - 1));
          });
        });
      }
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> triplet_scale_bwd(Tensor grad, Tensor x, Tensor gates,
                                             std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x), upstream = dense_map(grad, s, map.nhwc);
    const bool act = activation != kNone;
    const Faces f = faces_of(s, map.nhwc, gates);
    const auto res = act ? optional_map(residual, s, map.nhwc) : std::nullopt;
    const int64_t image = s.C * s.P;
    Tensor dgates = empty({s.N, f.size}, kDtype<A>),
           dresidual = empty_residual_grad(s, map.nhwc, x.scalar_type(), act);
    for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
      const auto shape = cube_of<T>(nullptr, s, map.nhwc, map.ld);
      const Split parts = plane_parts(shape.A);
      const int64_t pitch = shape.flat() ? shape.B * shape.D : shape.D;
      const int64_t face = f.bd < 0 ? 0 : shape.B * shape.D;
      ChannelPartials<A> across(face, parts.count);
      std::vector<PlaneTotals<A>> totals;
      for (int64_t i = 0; i < parts.count; ++i) totals.emplace_back(parts.size, face);
      Gates<T> gate(shape.A, shape.B, shape.D);
      for (int64_t n = begin; n < end; ++n) {
        const auto q = cube_of(map.image<T>(n), s, map.nhwc, map.ld);
        const T *g = upstream.image<T>(n), *pr = image_or_null<T>(res, n);
        T* kept = act ? data<T>(dresidual) + n * image : nullptr;
        const auto gs = cube_of<T>(act ? kept : g, s, map.nhwc, upstream.ld);
        A* out = data<A>(dgates) + n * f.size;
        if (act) gate.set(f, data<A>(gates) + n * f.size, q);
        workers.each(parts.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) {
            std::fill_n(across.part(b), face, A(0));
            for (int64_t a0 = parts.begin(b); a0 < parts.end(b); a0 += kPlanes) {
              const int64_t a1 = std::min(a0 + kPlanes, parts.end(b));
              if (activation == kRelu) scale_planes<T, kRelu, true>(q, gate, g, pr, kept, a0, a1);
              if (activation == kSilu) scale_planes<T, kSilu, true>(q, gate, g, pr, kept, a0, a1);
              sum_planes(q, gs, f, a0, a1, across.part(b), pitch, out);
              totals[b].move(across.part(b), a1 - parts.begin(b), a1 == parts.end(b));
            }
          }
        });
        if (f.bd < 0) continue;
        across.sum(out + f.bd);
        for (int64_t i = 0; i < face; ++i) out[f.bd + i] /= static_cast<A>(f.count());
      }
    });
    return std::make_tuple(dgates, dresidual);
  });
}

Tensor triplet_input_grad(Tensor grad, Tensor x, Tensor gates, Tensor dpooled, Tensor argmax) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const FeatureMap upstream = dense_map(grad, s, nhwc);
    const Faces f = faces_of(s, nhwc, gates);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      const auto shape = cube_of<T>(nullptr, s, nhwc, upstream.ld);
      const Split pieces = plane_pieces(shape);
      Gates<T> gate(shape.A, shape.B, shape.D);
      PooledGrad<A> pooled(shape.A, shape.B, shape.D);
      for (int64_t n = begin; n < end; ++n) {
        const auto g = cube_of(upstream.image<T>(n), s, nhwc, upstream.ld);
        gate.set(f, data<A>(gates) + n * f.size, g);
        pooled.set(f, data<A>(dpooled) + 2 * n * f.size, data<int32_t>(argmax) + n * f.size, g.A, g.B, g.D);
        workers.each(pieces.count, [&](int64_t b, int64_t e) {
          input_grad_planes(g, gate, pooled, data<T>(dx) + n * s.C * s.P, pieces.begin(b), pieces.end(e - 1));
        });
      }
    });
    return dx;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::triplet_pool>(m, "triplet_pool");
  visattn::implement<visattn::triplet_scale>(m, "triplet_scale");
  visattn::implement<visattn::triplet_scale_bwd>(m, "triplet_scale_bwd");
  visattn::implement<visattn::triplet_input_grad>(m, "triplet_input_grad");
}
