// BAM: y = act(x * (1 + sigmoid(channel * spatial)) + residual), or with the sum of both branches, which are
// logits of channels [N, C] and of pixels [N, H, W]; the branches' gradients; and dx.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/activations.h"
#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "matrix.h"
#include "parallel.h"
#include "pixel_pool.h"
#include "simd.h"
#include "simd_lanes.h"
#include "simd_math.h"
#include "tensor.h"
#include "wide_sums.h"

namespace visattn {
namespace {

// The sigmoid of the branches' product or sum. One branch belongs to the rows, the other to the columns.
template <bool kSum, class V>
VF_INLINE inline V joint(V row, V column) {
  return sigmoid_lanes(kSum ? row + column : row * column);
}

// out = act(v * gate + shift + residual): y from v = x, without a shift; dx from v = g, where residual is the
// spatial branch's gradient. The shift belongs to the rows or the columns. Any but v may be null; columns are
// padded.
template <class T, bool kSum, int kAct>
void apply_joint(Matrix<const T> v, Gate<Acc<T>> branch, Gate<Acc<T>> shift, const T* residual, T* out,
                 int64_t dense_ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t r = 0; r < v.rows; ++r) {
      const T *pv = v.row(r), *pr = residual ? residual + r * dense_ld : nullptr;
      T* po = out + r * dense_ld;
      const Vec<A> row = set1<A>(branch.row[r]), of_row = set1<A>(shift.row ? shift.row[r] : A(0));
      cover_vectors<A>(v.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> gate = 1 + joint<kSum>(row, load(branch.column + c));
        Vec<A> u = load(pv + c, lanes) * gate + (shift.column ? load(shift.column + c) : of_row);
        if (pr) u = u + load(pr + c, lanes);
        store(po + c, activate<kAct>(u), lanes);
      });
    }
  });
}

// out = g * act'(x * gate + residual).
template <class T, bool kSum, int kAct>
void joint_grad(Matrix<const T> x, Gate<Acc<T>> branch, const T* grad, const T* residual, T* out,
                int64_t dense_ld) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for (int64_t r = 0; r < x.rows; ++r) {
      const T *px = x.row(r), *pg = grad + r * dense_ld, *pr = residual ? residual + r * dense_ld : nullptr;
      T* po = out + r * dense_ld;
      const Vec<A> row = set1<A>(branch.row[r]);
      cover_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        Vec<A> u = load(px + c, lanes) * (1 + joint<kSum>(row, load(branch.column + c)));
        if (pr) u = u + load(pr + c, lanes);
        store(po + c, activate_grad<kAct>(load(pg + c, lanes), u), lanes);
      });
    }
  });
}

// The gradients of both branches in one block: per_row and per_column (padded) are sums of g x s (1 - s), for
// a product of the branches times the other branch.
template <class T, bool kSum>
void joint_sums(Matrix<const T> x, Matrix<const T> g, Gate<Acc<T>> branch, Acc<T>* per_row,
                Acc<T>* per_column) {
  using A = Acc<T>;
  ColumnTotals<A> totals(x.rows, x.cols);
  double* const total[] = {totals.of(0)};
  simd([=]() VF_INLINE {
    for (int64_t c = 0; c < x.cols; c += kLanes<A>) store(per_column + c, set1<A>(0));
    const auto add_row = [&](int64_t r) VF_INLINE {
      const T *px = x.row(r), *pg = g.row(r);
      const Vec<A> row = set1<A>(branch.row[r]);
      RowTotal<A> of_row;
      for_vectors<A>(x.cols, [&](int64_t c, auto lanes) VF_INLINE {
        const Vec<A> column = load(branch.column + c), s = joint<kSum>(row, column);
        const Vec<A> d = load(px + c, lanes) * load(pg + c, lanes) * (s * (1 - s));
        of_row.add(kSum ? d : d * column);
        store(per_column + c, load(per_column + c) + (kSum ? d : d * row));
      });
      per_row[r] = of_row.sum();
    };
    A* const sums[] = {per_column};
    add_in_chunks(x.rows, x.cols, sums, total, [&](int64_t r, int64_t end) VF_INLINE {
      for (; r < end; ++r) add_row(r);
    });
  });
}

// Both branches of one image, padded, as factors of the rows and columns of a block of its pixels.
template <class A>
struct Branches {
  const Shape s;
  const bool nhwc;
  const Tensor channels, pixels;
  Buffer<A> channel, spatial;

  Branches(const Shape& shape, bool nhwc_, const Tensor& of_channel, const Tensor& of_pixel)
      : s(shape), nhwc(nhwc_), channels(of_channel), pixels(of_pixel), channel(s.C), spatial(s.P) {}

  void set(int64_t n) {
    std::copy_n(data<A>(channels) + n * s.C, s.C, channel.get());
    std::copy_n(data<A>(pixels) + n * s.P, s.P, spatial.get());
  }
  Gate<A> at(int64_t p0) const { return both_factors(nhwc, channel.get(), spatial.get(), p0); }
};

// Calls f with the kind of gate and the activation as compile-time constants.
template <class F>
void with_kind(bool added, int64_t activation, const F& f) {
  with_epilogue(activation, added, [&](auto act, auto of_sum) { f(of_sum, act); });
}

Tensor bam_scale(Tensor x, Tensor channel, Tensor spatial, std::optional<Tensor> residual, int64_t activation,
                 bool added) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const auto res = optional_map(residual, s, map.nhwc);
    const PixelBlocks<T> blocks(s);
    Tensor y = empty_map(s, map.nhwc, x.scalar_type());
    with_kind(added, activation, [&](auto of_sum, auto act) {
      for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
        Branches<A> branches(s, map.nhwc, channel, spatial);
        for (int64_t n = begin; n < end; ++n) {
          branches.set(n);
          const auto in = matrix(map.image<T>(n), s, map.nhwc, map.ld);
          const T* pr = image_or_null<T>(res, n);
          workers.each(blocks.count, [&](int64_t b, int64_t e) {
            const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(e - 1),
                          skip = map.nhwc ? p0 * s.C : p0;
            apply_joint<T, decltype(of_sum)::value, decltype(act)::value>(
                pixels_of(in, map.nhwc, p0, p1), branches.at(p0), {nullptr, nullptr},
                pr ? pr + skip : nullptr, data<T>(y) + n * s.C * s.P + skip, map.nhwc ? s.C : s.P);
          });
        }
      });
    });
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> bam_scale_bwd(Tensor grad, Tensor x, Tensor channel, Tensor spatial,
                                                 std::optional<Tensor> residual, int64_t activation,
                                                 bool added) {
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
    with_kind(added, activation, [&](auto of_sum, auto kind) {
      constexpr bool kSum = decltype(of_sum)::value;
      for_images(s.N, image, [&](int64_t begin, int64_t end, const Workers& workers) {
        Branches<A> branches(s, nhwc, channel, spatial);
        ChannelPartials<A> parts(s.C, blocks.count);
        for (int64_t n = begin; n < end; ++n) {
          branches.set(n);
          const T* pr = image_or_null<T>(res, n);
          T* kept = act ? data<T>(dresidual) + n * image : nullptr;
          const auto in = matrix(map.image<T>(n), s, nhwc, map.ld);
          const auto upstream = matrix<const T>(act ? kept : g.image<T>(n), s, nhwc, g.ld);
          workers.each(blocks.count, [&](int64_t b, int64_t e) {
            for (; b < e; ++b) {
              const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(b),
                            skip = nhwc ? p0 * s.C : p0;
              const auto xs = pixels_of(in, nhwc, p0, p1), gs = pixels_of(upstream, nhwc, p0, p1);
              if (act) {
                joint_grad<T, kSum, decltype(kind)::value>(xs, branches.at(p0), g.image<T>(n) + skip,
                                                           pr ? pr + skip : nullptr, kept + skip, g.ld);
              }
              Buffer<A> pixels(p1 - p0);
              A *of_channel = parts.part(b), *of_pixel = pixels.get();
              joint_sums<T, kSum>(xs, gs, branches.at(p0), nhwc ? of_pixel : of_channel,
                                  nhwc ? of_channel : of_pixel);
              std::copy_n(of_pixel, p1 - p0, data<A>(dspatial) + n * s.P + p0);
            }
          });
          parts.sum(data<A>(dchannel) + n * s.C);
        }
      });
    });
    return std::make_tuple(dchannel, dspatial, dresidual);
  });
}

Tensor bam_input_grad(Tensor grad, Tensor x, Tensor channel, Tensor spatial, std::optional<Tensor> dmean,
                      std::optional<Tensor> dbranch, bool added) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const FeatureMap g = dense_map(grad, s, nhwc);
    const auto spatial_grad = optional_map(dbranch, s, nhwc);
    const std::optional<Tensor>& shift = dmean;
    const PixelBlocks<T> blocks(s);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    with_kind(added, kNone, [&](auto of_sum, auto none) {
      for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
        Branches<A> branches(s, nhwc, channel, spatial);
        Buffer<A> mean(s.C);
        for (int64_t n = begin; n < end; ++n) {
          branches.set(n);
          for (int64_t c = 0; shift && c < s.C; ++c) {
            mean[c] = data<A>(*shift)[n * s.C + c] / static_cast<A>(s.P);
          }
          const auto gs = matrix(g.image<T>(n), s, nhwc, g.ld);
          const T* pa = image_or_null<T>(spatial_grad, n);
          workers.each(blocks.count, [&](int64_t b, int64_t e) {
            const int64_t p0 = blocks.first_pixel(b), p1 = blocks.last_pixel(e - 1),
                          skip = nhwc ? p0 * s.C : p0;
            apply_joint<T, decltype(of_sum)::value, decltype(none)::value>(
                pixels_of(gs, nhwc, p0, p1), branches.at(p0), channel_factor<A>(nhwc, mean.get()),
                pa ? pa + skip : nullptr, data<T>(dx) + n * s.C * s.P + skip, g.ld);
          });
        }
      });
    });
    return dx;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::bam_scale>(m, "bam_scale");
  visattn::implement<visattn::bam_scale_bwd>(m, "bam_scale_bwd");
  visattn::implement<visattn::bam_input_grad>(m, "bam_input_grad");
}
