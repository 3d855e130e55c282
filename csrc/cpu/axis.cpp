// The passes over x along both axes, each of which reads x once: means over W and over H together, a gate for
// each row and each column of a channel, and their gradients.
//
// Lines are laid out as in line_layout.h. Threads share an image by its channels, so that no sum is ever
// split.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/activations.h"
#include "axis_sums.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "line_layout.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// ---- element by element

// A stretch of dense memory: a row of a plane (nchw), or channels of a pixel (nhwc). Either the row's value
// or the column's is the same for the whole stretch.
template <class A>
struct Stretch {
  int64_t in, dense, count;  // offsets in x and in dense maps
  int64_t c, h, w;           // where it begins
  bool free;                 // whole vectors may be read and written past its end, which is written later
};

template <class A, class F>
VF_INLINE inline void along(const Stretch<A>& at, const F& f) {
  if (!at.free) return cover_vectors<A>(at.count, f);
  for (int64_t i = 0; i < at.count; i += kLanes<A>) f(i, Full{});
}

template <class A, bool kNhwc, class F>
VF_INLINE inline void for_stretches(const Shape& s, int64_t ld, int64_t c0, int64_t c1, const F& f) {
  if constexpr (kNhwc) {
    for (int64_t p = 0; p < s.P; ++p) {
      f(Stretch<A>{p * ld + c0, p * s.C + c0, c1 - c0, c0, p / s.W, p % s.W, false});
    }
  } else {
    const int64_t guarded = first_guarded<A>(s, ld, c1);
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t h = 0; h < s.H; ++h) {
        f(Stretch<A>{c * ld + h * s.W, c * s.P + h * s.W, s.W, c, h, 0, c < guarded});
      }
    }
  }
}

template <bool kNhwc, class A, class L>
VF_INLINE inline Vec<A> row_value(const A* row, int64_t i, L lanes) {
  if constexpr (kNhwc) return load(row + i, lanes);
  return set1<A>(*row);
}

template <class T, bool kNhwc, int kAct, bool kResidual>
void scale_as(const T* x, int64_t ld, const Shape& s, Lines<const Acc<T>> gate, const T* residual, T* y,
              int64_t c0, int64_t c1) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_stretches<A, kNhwc>(s, ld, c0, c1, [&](const Stretch<A>& at) VF_INLINE {
      const A *row = gate.row(at.c, at.h), *column = gate.column(at.c, at.w);
      along(at, [&](int64_t i, auto lanes) VF_INLINE {
        Vec<A> v =
            load(x + at.in + i, lanes) * (row_value<kNhwc, A>(row, i, lanes) * load(column + i, lanes));
        if constexpr (kResidual) v = v + load(residual + at.dense + i, lanes);
        store(y + at.dense + i, activate<kAct>(v), lanes);
      });
    });
  });
}

template <class T, bool kNhwc, int kAct, bool kResidual>
void scale_grad_as(const T* x, int64_t ld, const T* g, const Shape& s, Lines<const Acc<T>> gate,
                   const T* residual, T* out, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  simd([=]() VF_INLINE {
    for_stretches<A, kNhwc>(s, ld, c0, c1, [&](const Stretch<A>& at) VF_INLINE {
      const A *row = gate.row(at.c, at.h), *column = gate.column(at.c, at.w);
      along(at, [&](int64_t i, auto lanes) VF_INLINE {
        Vec<A> v =
            load(x + at.in + i, lanes) * (row_value<kNhwc, A>(row, i, lanes) * load(column + i, lanes));
        if constexpr (kResidual) v = v + load(residual + at.dense + i, lanes);
        store(out + at.dense + i, activate_grad<kAct>(load(g + at.dense + i, lanes), v), lanes);
      });
    });
  });
}

template <class T, bool kNhwc>
void input_grad_as(const T* g, const Shape& s, Lines<const Acc<T>> gate, Lines<const Acc<T>> dmean, T* dx,
                   int64_t c0, int64_t c1) {
  using A = Acc<T>;
  const A per_row = A(1) / static_cast<A>(s.W), per_column = A(1) / static_cast<A>(s.H);
  simd([=]() VF_INLINE {
    for_stretches<A, kNhwc>(s, kNhwc ? s.C : s.P, c0, c1, [&](const Stretch<A>& at) VF_INLINE {
      const A *row = gate.row(at.c, at.h), *column = gate.column(at.c, at.w);
      const A *drow = dmean.row(at.c, at.h), *dcolumn = dmean.column(at.c, at.w);
      along(at, [&](int64_t i, auto lanes) VF_INLINE {
        const Vec<A> scale = row_value<kNhwc, A>(row, i, lanes) * load(column + i, lanes);
        const Vec<A> shift =
            row_value<kNhwc, A>(drow, i, lanes) * per_row + load(dcolumn + i, lanes) * per_column;
        store(dx + at.dense + i, load(g + at.dense + i, lanes) * scale + shift, lanes);
      });
    });
  });
}

// Calls f with compile-time constants: the layout, the activation, and whether there is a residual.
template <class F>
void with_constants(bool nhwc, int64_t activation, bool residual, const F& f) {
  with_epilogue(activation, residual, [&](auto act, auto has_residual) {
    if (nhwc) {
      f(std::true_type{}, act, has_residual);
    } else {
      f(std::false_type{}, act, has_residual);
    }
  });
}

// Calls f(n, c0, c1) for images and ranges of channels: a thread gets whole images, or all threads share an
// image's channels by cache lines.
template <class T, class F>
void for_channels(const Shape& s, const F& f) {
  for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
    const Split parts(s.C, 64 / static_cast<int64_t>(sizeof(T)));
    for (int64_t n = begin; n < end; ++n) {
      workers.each(parts.count, [&](int64_t b, int64_t e) { f(n, parts.begin(b), parts.end(e - 1)); });
    }
  });
}

Tensor axis_mean(Tensor x) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    Tensor means = empty_lines(s, map.nhwc, kDtype<A>);
    for_channels<T>(s, [&](int64_t n, int64_t c0, int64_t c1) {
      const auto out = lines_of<A>(means, s, map.nhwc, n);
      axis_sums<T, false>(map.image<T>(n), map.ld, nullptr, s, {}, out, c0, c1);
      const auto divide = [&](A* first, int64_t count, int64_t by) {
        for (int64_t i = 0; i < count; ++i) first[i] /= static_cast<A>(by);
      };
      for (int64_t l = 0; map.nhwc && l < s.H + s.W; ++l) {
        divide(out.row(c0, l), c1 - c0, l < s.H ? s.W : s.H);
      }
    });
    return means;
  });
}

Tensor axis_scale(Tensor x, Tensor gates, std::optional<Tensor> residual, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Tensor gate = dense_lines(gates, map.nhwc);
    const auto res = optional_map(residual, s, map.nhwc);
    Tensor y = empty_map(s, map.nhwc, x.scalar_type());
    with_constants(map.nhwc, activation, res.has_value(), [&](auto nhwc, auto act, auto has_residual) {
      for_channels<T>(s, [&](int64_t n, int64_t c0, int64_t c1) {
        scale_as<T, decltype(nhwc)::value, decltype(act)::value, decltype(has_residual)::value>(
            map.image<T>(n), map.ld, s, lines_of<const A>(gate, s, map.nhwc, n), image_or_null<T>(res, n),
            data<T>(y) + n * s.C * s.P, c0, c1);
      });
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> axis_scale_bwd(Tensor grad, Tensor x, Tensor gates, std::optional<Tensor> residual,
                                          int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x), g = dense_map(grad, s, map.nhwc);
    const bool act = activation != kNone;
    const Tensor gate = dense_lines(gates, map.nhwc);
    const auto res = act ? optional_map(residual, s, map.nhwc) : std::nullopt;
    Tensor dgates = empty_lines(s, map.nhwc, kDtype<A>),
           dresidual = empty_residual_grad(s, map.nhwc, x.scalar_type(), act);
    with_constants(map.nhwc, activation, res.has_value(), [&](auto nhwc, auto kind, auto has_residual) {
      for_channels<T>(s, [&](int64_t n, int64_t c0, int64_t c1) {
        const auto lines = lines_of<const A>(gate, s, map.nhwc, n);
        const T* upstream = g.image<T>(n);
        if constexpr (decltype(kind)::value != kNone) {
          T* kept = data<T>(dresidual) + n * s.C * s.P;
          scale_grad_as<T, decltype(nhwc)::value, decltype(kind)::value, decltype(has_residual)::value>(
              map.image<T>(n), map.ld, upstream, s, lines, image_or_null<T>(res, n), kept, c0, c1);
          upstream = kept;
        }
        axis_sums<T, true>(map.image<T>(n), map.ld, upstream, s, lines, lines_of<A>(dgates, s, map.nhwc, n),
                           c0, c1);
      });
    });
    return std::make_tuple(dgates, dresidual);
  });
}

Tensor axis_input_grad(Tensor grad, Tensor x, Tensor gates, Tensor dmeans) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const FeatureMap g = dense_map(grad, s, nhwc);
    const Tensor gate = dense_lines(gates, nhwc), dmean = dense_lines(dmeans, nhwc);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    for_channels<T>(s, [&](int64_t n, int64_t c0, int64_t c1) {
      const auto lines = lines_of<const A>(gate, s, nhwc, n), dlines = lines_of<const A>(dmean, s, nhwc, n);
      T* out = data<T>(dx) + n * s.C * s.P;
      if (nhwc) {
        input_grad_as<T, true>(g.image<T>(n), s, lines, dlines, out, c0, c1);
      } else {
        input_grad_as<T, false>(g.image<T>(n), s, lines, dlines, out, c0, c1);
      }
    });
    return dx;
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::axis_mean>(m, "axis_mean");
  visattn::implement<visattn::axis_scale>(m, "axis_scale");
  visattn::implement<visattn::axis_scale_bwd>(m, "axis_scale_bwd");
  visattn::implement<visattn::axis_input_grad>(m, "axis_input_grad");
}
