// The passes over x of a channel gate and a pixel gate whose mathematics is elsewhere: u = x * channel, y =
// act(u * spatial + residual), with the means and maxima that both gates are computed from.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/activations.h"
#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "parallel.h"
#include "pixel_pool.h"
#include "simd.h"
#include "tensor.h"
#include "ties.h"
#include "twofold_passes.h"

namespace visattn {
namespace {

// Calls f with `even` as a compile-time constant.
template <class F>
void with_ties(bool even, const F& f) {
  if (even) return f(std::true_type{});
  f(std::false_type{});
}

std::tuple<Tensor, Tensor> pool_pixels(Tensor x, bool even) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    Tensor pooled = empty({s.N, 2, s.C}, kDtype<A>), at = empty({s.N, s.C}, ScalarType::Int);
    with_ties(even, [&](auto ties) {
      for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
        ChannelPool<T, true, decltype(ties)::value> pool(s, map.nhwc);
        for (int64_t n = begin; n < end; ++n) {
          A* mean = data<A>(pooled) + 2 * n * s.C;
          pool.run(matrix(map.image<T>(n), s, map.nhwc, map.ld), workers, mean, mean + s.C,
                   data<int32_t>(at) + n * s.C);
        }
      });
    });
    return std::make_tuple(pooled, at);
  });
}

std::tuple<Tensor, Tensor> pool_channels(Tensor x, Tensor gate, bool even) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const PixelBlocks<T> blocks(s);
    Tensor maps = empty({s.N, 2, s.H, s.W}, kDtype<A>), at = empty({s.N, s.H, s.W}, ScalarType::Int);
    with_ties(even, [&](auto ties) {
      for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
        Buffer<A> scale(s.C);
        for (int64_t n = begin; n < end; ++n) {
          std::copy_n(data<A>(gate) + n * s.C, s.C, scale.get());
          const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
          A *mean = data<A>(maps) + 2 * n * s.P, *max = mean + s.P;
          workers.each(blocks.count, [&](int64_t b, int64_t e) {
            for (; b < e; ++b) {
              const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b);
              pixel_stats<T, true, decltype(ties)::value>(pixels_of(in, map.nhwc, p0, p1), map.nhwc,
                                                          scale.get(), mean + p0, max + p0,
                                                          data<int32_t>(at) + n * s.P + p0);
            }
          });
        }
      });
    });
    return std::make_tuple(maps, at);
  });
}

Tensor pool_channels_bwd(Tensor x, Tensor gate, Tensor maps, Tensor dmaps, Tensor at) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const PixelBlocks<T> blocks(s);
    Tensor dgate = empty({s.N, s.C}, kDtype<A>);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> scale(s.C), dmean(s.P);
      ChannelPartials<A> parts(s.C, blocks.count);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(gate) + n * s.C, s.C, scale.get());
        const A* dmaps_n = data<A>(dmaps) + 2 * n * s.P;
        for (int64_t p = 0; p < s.P; ++p) dmean[p] = dmaps_n[p] / static_cast<A>(s.C);
        const Maxima<A> maxima{data<int32_t>(at) + n * s.P, data<A>(maps) + (2 * n + 1) * s.P, dmaps_n + s.P};
        const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
        workers.each(blocks.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) {
            map_sums<T>(in, map.nhwc, blocks.first_pixel(b), blocks.last_pixel(b), scale.get(), dmean.get(),
                        maxima, parts.part(b));
          }
        });
        parts.sum(data<A>(dgate) + n * s.C);
      }
    });
    return dgate;
  });
}

Tensor twofold_scale(Tensor x, Tensor channel, Tensor spatial, std::optional<Tensor> residual,
                     int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const auto res = optional_map(residual, s, map.nhwc);
    const PixelBlocks<T> blocks(s);
    Tensor y = empty_map(s, map.nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> gate_c(s.C), gate_s(s.P);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(channel) + n * s.C, s.C, gate_c.get());
        std::copy_n(data<A>(spatial) + n * s.P, s.P, gate_s.get());
        const T* pr = image_or_null<T>(res, n);
        const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
        workers.each(blocks.count, [&](int64_t b, int64_t e) {
          const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(e - 1),
                        skip = map.nhwc ? p0 * s.C : p0;
          apply_gate<T>(pixels_of(in, map.nhwc, p0, p1),
                        both_factors(map.nhwc, gate_c.get(), gate_s.get(), p0), pr ? pr + skip : nullptr,
                        data<T>(y) + n * s.C * s.P + skip, map.nhwc ? s.C : s.P, activation);
        });
      }
    });
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> twofold_scale_bwd(Tensor grad, Tensor x, Tensor channel, Tensor spatial,
                                                     std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x), g = dense_map(grad, s, map.nhwc);
    const bool nhwc = map.nhwc, act = activation != kNone;
    const auto res = act ? optional_map(residual, s, nhwc) : std::nullopt;
    const PixelBlocks<T> blocks(s);
    const int64_t image = s.C * s.P;
    Tensor dchannel = empty({s.N, s.C}, kDtype<A>), dspatial = empty({s.N, s.H, s.W}, kDtype<A>),
           dresidual = empty_residual_grad(s, nhwc, x.scalar_type(), act);
    for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> gate_c(s.C), gate_s(s.P);
      ChannelPartials<A> parts(s.C, blocks.count);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(data<A>(channel) + n * s.C, s.C, gate_c.get());
        std::copy_n(data<A>(spatial) + n * s.P, s.P, gate_s.get());
        const T* pr = image_or_null<T>(res, n);
        T* kept = act ? data<T>(dresidual) + n * image : nullptr;
        const auto in = matrix(map.image<T>(n), s, nhwc, map.ld);
        const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
        workers.each(blocks.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) {
            const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b), skip = nhwc ? p0 * s.C : p0;
            const auto xs = pixels_of(in, nhwc, p0, p1);
            if (act) {
              gate_grad<T>(xs, both_factors(nhwc, gate_c.get(), gate_s.get(), p0), g.image<T>(n) + skip,
                           pr ? pr + skip : nullptr, kept + skip, g.ld, activation);
            }
            gate_sums<T>(xs, pixels_of(upstream, nhwc, p0, p1), nhwc, gate_c.get(), &gate_s[p0],
                         parts.part(b), data<A>(dspatial) + n * s.P + p0);
          }
        });
        parts.sum(data<A>(dchannel) + n * s.C);
      }
    });
    return std::make_tuple(dchannel, dspatial, dresidual);
  });
}

Tensor twofold_input_grad(Tensor grad, Tensor x, Tensor channel, Tensor spatial, Tensor maps, Tensor dmaps,
                          Tensor at_c, Tensor pooled, Tensor dpooled, Tensor at_hw) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x), g = dense_map(grad, s, map.nhwc);
    const PixelBlocks<T> blocks(s);
    Tensor dx = empty_map(s, map.nhwc, x.scalar_type());
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> gate_c(s.C), gate_s(s.P), dmean_c(s.P), dmean_hw(s.C);
      for (int64_t n = begin; n < end; ++n) {
        const A *dmaps_n = data<A>(dmaps) + 2 * n * s.P, *dpooled_n = data<A>(dpooled) + 2 * n * s.C;
        std::copy_n(data<A>(channel) + n * s.C, s.C, gate_c.get());
        std::copy_n(data<A>(spatial) + n * s.P, s.P, gate_s.get());
        for (int64_t p = 0; p < s.P; ++p) dmean_c[p] = dmaps_n[p] / static_cast<A>(s.C);
        for (int64_t c = 0; c < s.C; ++c) dmean_hw[c] = dpooled_n[c] / static_cast<A>(s.P);
        const InputGrad<T> pass{
            gate_c.get(),
            gate_s.get(),
            dmean_c.get(),
            dmean_hw.get(),
            {data<int32_t>(at_c) + n * s.P, data<A>(maps) + (2 * n + 1) * s.P, dmaps_n + s.P},
            {data<int32_t>(at_hw) + n * s.C, data<A>(pooled) + (2 * n + 1) * s.C, dpooled_n + s.C}};
        const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
        const auto gs = matrix(g.image<T>(n), s, map.nhwc, g.ld);
        workers.each(blocks.count, [&](int64_t b, int64_t e) {
          for (; b < e; ++b) {
            pass.run(in, gs, map.nhwc, blocks.first_pixel(b), blocks.last_pixel(b),
                     data<T>(dx) + n * s.C * s.P);
          }
        });
      }
    });
    return dx;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::pool_pixels>(m, "pool_pixels");
  visattn::implement<visattn::pool_channels>(m, "pool_channels");
  visattn::implement<visattn::pool_channels_bwd>(m, "pool_channels_bwd");
  visattn::implement<visattn::twofold_scale>(m, "twofold_scale");
  visattn::implement<visattn::twofold_scale_bwd>(m, "twofold_scale_bwd");
  visattn::implement<visattn::twofold_input_grad>(m, "twofold_input_grad");
}
