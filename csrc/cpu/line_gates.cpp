// The gates of rows and columns from their means: gates = sigmoid(w hardswish(bn(w1 means + b1)) + b), where
// w and b belong to rows or to columns. It is the small dense middle of coordinate attention; with its
// gradients.
#include "line_gates.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "column_stats.h"
#include "gemm.h"
#include "image_matrix.h"
#include "line_layout.h"
#include "mlp.h"
#include "parallel.h"
#include "row_stats.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

// Calls f(A{}) with the dtype of lines, which is an accumulation dtype.
template <class F>
auto dispatch_lines(const Tensor& lines, const F& f) {
  if (lines.scalar_type() == ScalarType::Double) return f(double{});
  return f(float{});
}

template <class A>
LineShape line_shape(const Tensor& means, int64_t height, const Tensor& w1) {
  const auto sizes = means.sizes();
  const int64_t M = w1.size(0);
  const bool nhwc = !means.is_contiguous() && torch::stable::transpose(means, 1, 2).is_contiguous();
  return {sizes[0], sizes[1], height, sizes[2], M, nhwc, whole_vectors<A>(M)};
}

// Uninitialised, with the strides of dense lines.
Tensor lines_like(const Tensor& lines) {
  return empty_strided(3, lines.sizes().data(), lines.strides().data(), lines.scalar_type());
}

// Channels in cache lines, the parts that threads share.
template <class A>
Split channel_parts(const LineShape& s) {
  return Split(s.C, 64 / static_cast<int64_t>(sizeof(A)));
}

// ---- forward

// z [L, M] of an image's lines [begin, end). weight is [C, M].
template <class A>
void hidden_rows(const LineShape& s, const A* means, const A* weight, const A* bias, int64_t begin,
                 int64_t end, A* z) {
  simd([=]() VF_INLINE {
    to_rows(s, means, weight, begin, end, [&](int64_t l, int64_t m, Vec<A> v) VF_INLINE {
      store_within(z + l * s.M, m, s.M, v + load(bias + m));
    });
  });
}

// Weights [C, M] and biases [C] of the rows' gates, and of the columns'.
template <class A>
struct GateWeights {
  Buffer<A> weight[2], bias[2];
  int64_t stride_c, stride_m;

  GateWeights(const LineShape& s, const Tensor& w_h, const std::optional<Tensor>& b_h, const Tensor& w_w,
              const std::optional<Tensor>& b_w)
      : weight{buffer_of<A>(w_h, s.C * s.M), buffer_of<A>(w_w, s.C * s.M)},
        bias{buffer_of<A>(b_h, s.C), buffer_of<A>(b_w, s.C)},
        stride_c(s.nhwc ? 1 : s.M),
        stride_m(s.nhwc ? s.C : 1) {
    for (auto& w : weight) {
      if (s.nhwc) w = transposed(w, s.C, s.M);
    }
  }

  // The gates of channels [c0, c1) of an image.
  void gates(const LineShape& s, Broadcast<A> hidden, int64_t c0, int64_t c1, A* out) const {
    for_parts(s.H, 0, s.L, [&](int part, int64_t l0, int64_t l1) {
      const Broadcast<A> factor{weight[part].get(), stride_c, stride_m};
      to_lines(s, factor, hidden, bias[part].get(), c0, c1, l0, l1, out);
    });
    for_runs(s, c0, c1, [&](int64_t at, int64_t count) { sigmoid_in_place(out + at, count); });
  }
};

// mean and var [M] of z from the moments [N, 2, ld] of the images.
template <class A>
void combine_lines(const LineShape& s, const double* moments, A* mean, A* var) {
  const double count = static_cast<double>(s.L), images = static_cast<double>(s.N);
  for (int64_t m = 0; m < s.M; ++m) {
    const auto of_image = [&](int64_t n) { return moments[2 * n * s.ld + m]; };
    const double shift = s.N && std::isfinite(of_image(0)) ? of_image(0) : 0;
    double sum = 0, second = 0;
    for (int64_t n = 0; n < s.N; ++n) sum += of_image(n) - shift;
    const double middle = s.N ? shift + sum / images : 0;
    for (int64_t n = 0; n < s.N; ++n) {
      const double d = of_image(n) - middle;
      second += moments[(2 * n + 1) * s.ld + m] + count * d * d;
    }
    mean[m] = static_cast<A>(middle), var[m] = static_cast<A>(s.N ? second / (images * count) : 0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> line_gates_fwd(
    Tensor means, int64_t height, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> bn_weight,
    std::optional<Tensor> bn_bias, std::optional<Tensor> mean, std::optional<Tensor> var, Tensor w_h,
    std::optional<Tensor> b_h, Tensor w_w, std::optional<Tensor> b_w, double eps) {
  return dispatch_lines(means, [&](auto type) {
    using A = decltype(type);
    const LineShape s = line_shape<A>(means, height, w1);
    const bool fixed = mean && var;
    const Tensor lines = s.nhwc ? means : dense_lines(means, false);
    const auto weight = transposed(buffer_of<A>(w1, s.M * s.C), s.M, s.C), bias = buffer_of<A>(b1, s.M);
    Tensor z = empty({s.N, s.L, s.M}, kDtype<A>),
           of_batch[] = {empty({fixed ? 0 : s.M}, kDtype<A>), empty({fixed ? 0 : s.M}, kDtype<A>)};
    Buffer<double> moments(fixed ? 0 : 2 * s.N * s.ld);
    for_images(s.N, s.C * s.L, [&](int64_t begin, int64_t end, const Workers& workers) {
      for (int64_t n = begin; n < end; ++n) {
        A* rows = data<A>(z) + n * s.L * s.M;
        workers.each(s.L, [&](int64_t b, int64_t e) {
          hidden_rows(s, data<A>(lines) + n * s.C * s.L, weight.get(), bias.get(), b, e, rows);
        });
        if (!fixed) line_moments(s, rows, moments.get() + 2 * n * s.ld);
      }
    });
    if (!fixed) combine_lines(s, moments.get(), data<A>(of_batch[0]), data<A>(of_batch[1]));
    const LineNorm<A> norm(s.M, fixed ? *mean : of_batch[0], fixed ? *var : of_batch[1], bn_weight, bn_bias,
                           eps);
    const GateWeights<A> algebra(s, w_h, b_h, w_w, b_w);
    Tensor gates = lines_like(lines);
    for_images(s.N, s.C * s.L, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> hidden(s.L * s.ld), along(s.nhwc ? 0 : s.L * s.M);
      for (int64_t n = begin; n < end; ++n) {
        activate_rows(s, norm, data<A>(z) + n * s.L * s.M, hidden.get());
        const auto rows = rows_factor(s, hidden.get(), along.get());
        A* out = data<A>(gates) + n * s.C * s.L;
        const Split parts = channel_parts<A>(s);
        workers.each(parts.count, [&](int64_t b, int64_t e) {
          algebra.gates(s, rows, parts.begin(b), parts.end(e - 1), out);
        });
      }
    });
    return std::make_tuple(gates, z, of_batch[0], of_batch[1]);
  });
}

// ---- backward

// dhidden [L, ld] of an image's lines [begin, end). w_h and w_w are [C, M].
template <class A>
void hidden_grad(const LineShape& s, const A* dlines, const A* w_h, const A* w_w, int64_t begin, int64_t end,
                 A* dhidden) {
  simd([=]() VF_INLINE {
    for_parts(s.H, begin, end, [&](int part, int64_t l0, int64_t l1) VF_INLINE {
      to_rows(s, dlines, part ? w_w : w_h, l0, l1,
              [&](int64_t l, int64_t m, Vec<A> v) VF_INLINE { store(dhidden + l * s.ld + m, v); });
    });
  });
}

// sums [3, M]: the gradients of the norm's bias and weight and of b1, from the sums of the images [N, 3, ld].
// batch [2, ld]: the means over the batch that norm_rows_grad subtracts. The batch's mean is rounded, so the
// mean of the normalised z is not quite zero: both account for it, and the gradients of z add up to zero.
template <class A>
void norm_sums(const LineShape& s, const LineNorm<A>& norm, const A* images, bool fixed, A* sums, A* batch) {
  const double count = static_cast<double>(s.N ? s.N * s.L : 1);
  for (int64_t m = 0; m < s.M; ++m) {
    double dbias = 0, dweight = 0, offset = 0;
    for (int64_t n = 0; n < s.N; ++n) {
      const A* image = images + 3 * n * s.ld + m;
      dbias += image[0], dweight += image[s.ld], offset += image[2 * s.ld];
    }
    offset /= count;
    if (fixed || !(std::abs(offset) <= norm.rounding(m))) offset = 0;  // the statistics of another batch
    dweight -= offset * dbias;
    sums[m] = static_cast<A>(dbias), sums[s.M + m] = static_cast<A>(dweight);
    sums[2 * s.M + m] = fixed ? sums[m] * norm.gain(m) : A(0);  // the batch's mean removes b1
    batch[m] = static_cast<A>((dbias - offset * dweight) / count);
    batch[s.ld + m] = static_cast<A>(dweight / count);
  }
}

// Sums over the batch for a range of channels, image by image, and the gradients that follow from them.
template <class A>
struct ChannelGrads {
  const LineShape& s;
  const A *means, *hidden, *dz;  // hidden and dz are [N, L, ld]
  const A* dz_along;             // [N, M, L], in nchw alone
  Broadcast<A> w1;               // (c, m)
  A* lines;                      // the gradients of the logits; those of the means replace them
  Buffer<A> dw[3];               // [C, ld], of w_h, w_w and w1
  Buffer<A> images;              // the sum over images of the logits' gradients, in the layout of an image
  Buffer<A> nothing;             // [C], in place of a bias

  void add(int64_t n, int64_t c0, int64_t c1) {
    const int64_t image = n * s.C * s.L, rows = n * s.L * s.ld;
    A* out = lines + image;
    struct Product {
      const A *lines, *rows;
      int64_t begin, end;
      A* sum;
    };
    const Product products[] = {{out, hidden + rows, 0, s.H, dw[0].get()},
                                {out, hidden + rows, s.H, s.L, dw[1].get()},
                                {means + image, dz + rows, 0, s.L, dw[2].get()}};
    const Broadcast<A> of_means =
        s.nhwc ? Broadcast<A>{dz + rows, s.ld, 1} : Broadcast<A>{dz_along + n * s.M * s.L, 1, s.L};
    const int64_t ld = s.ld;
    A* total = images.get();
    simd([=, &products, this]() VF_INLINE {
      for (const Product& p : products) {
        A* sum = p.sum + c0 * ld;
        gemm<A>(s.by_channel(p.lines, c0, p.begin), p.rows + p.begin * ld, ld, c1 - c0, ld, p.end - p.begin,
                kStep, [=](int64_t i, int64_t m, Vec<A> v, auto) VF_INLINE {
                  store(sum + i * ld + m, load(sum + i * ld + m) + v);
                });
      }
      for_runs(s, c0, c1, [&](int64_t at, int64_t count) VF_INLINE {
        for_vectors<A>(count, [&](int64_t i, auto lanes) VF_INLINE {
          store(total + at + i, load(total + at + i, lanes) + load(out + at + i, lanes), lanes);
        });
      });
    });
    to_lines(s, w1, of_means, nothing.get(), c0, c1, 0, s.L, out);
  }

  // Writes the sums to dw_h and dw_w [C, M], dw1 [M, C], db_h and db_w [C].
  void finish(int64_t c0, int64_t c1, const Tensor& dw_h, const Tensor& dw_w, const Tensor& dw1,
              const Tensor& db_h, const Tensor& db_w) const {
    Buffer<A> sums(c1 - c0);
    for_parts(s.H, 0, s.L, [&](int part, int64_t l0, int64_t l1) {
      const A* first = images.get() + s.at(c0, l0);
      if (s.nhwc) {
        column_stats<A, false, false>({first, s.C, l1 - l0, c1 - c0}, nullptr, sums.get());
      } else {
        row_stats<A, false, false>({first, s.L, c1 - c0, l1 - l0}, nullptr, sums.get());
      }
      std::copy_n(sums.get(), c1 - c0, data<A>(part ? db_w : db_h) + c0);
    });
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t m = 0; m < s.M; ++m) {
        data<A>(dw_h)[c * s.M + m] = dw[0].get()[c * s.ld + m];
        data<A>(dw_w)[c * s.M + m] = dw[1].get()[c * s.ld + m];
        data<A>(dw1)[m * s.C + c] = dw[2].get()[c * s.ld + m];
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> line_gates_bwd(
    Tensor dgates, Tensor gates, Tensor means, Tensor z, int64_t height, Tensor w1,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, Tensor mean, Tensor var, Tensor w_h,
    Tensor w_w, double eps, bool fixed) {
  return dispatch_lines(means, [&](auto type) {
    using A = decltype(type);
    const LineShape s = line_shape<A>(means, height, w1);
    const Tensor lines = s.nhwc ? means : dense_lines(means, false), given = dense_lines(dgates, s.nhwc),
                 kept = dense_lines(gates, s.nhwc), units = weight_as(z, kDtype<A>);
    const LineNorm<A> norm(s.M, mean, var, bn_weight, bn_bias, eps);
    const Buffer<A> weights[] = {buffer_of<A>(w_h, s.C * s.M), buffer_of<A>(w_w, s.C * s.M),
                                 buffer_of<A>(w1, s.M * s.C)};
    Tensor dmeans = lines_like(lines), sums = empty({3, s.M}, kDtype<A>);
    Buffer<A> hidden(s.N * s.L * s.ld), dz(s.N * s.L * s.ld), of_norm(3 * s.N * s.ld), batch(2 * s.ld),
        along(s.nhwc ? 0 : s.N * s.L * s.M);

    for_images(s.N, s.C * s.L, [&](int64_t begin, int64_t end, const Workers& workers) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t image = n * s.C * s.L, rows = n * s.L * s.ld;
        A* dlines = data<A>(dmeans) + image;
        workers.each(s.C * s.L, [&](int64_t b, int64_t e) {
          sigmoid_grad(data<A>(given) + image + b, data<A>(kept) + image + b, e - b, dlines + b);
        });
        workers.each(s.L, [&](int64_t b, int64_t e) {
          hidden_grad(s, dlines, weights[0].get(), weights[1].get(), b, e, dz.get() + rows);
        });
        activate_rows_grad(s, norm, data<A>(units) + n * s.L * s.M, hidden.get() + rows, dz.get() + rows,
                           of_norm.get() + 3 * n * s.ld);
      }
    });

    norm_sums(s, norm, of_norm.get(), fixed, data<A>(sums), batch.get());
    parallel_for(0, s.N, 1 + (1 << 13) / (1 + s.L * s.ld), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        A* rows = dz.get() + n * s.L * s.ld;
        norm_rows_grad(s, norm, data<A>(units) + n * s.L * s.M, batch.get(), batch.get() + s.ld, fixed, rows);
        if (!s.nhwc) transpose_to(rows, s.L, s.M, s.ld, along.get() + n * s.L * s.M);
      }
    });

    ChannelGrads<A> grads{s,
                          data<A>(lines),
                          hidden.get(),
                          dz.get(),
                          along.get(),
                          {weights[2].get(), 1, s.C},
                          data<A>(dmeans),
                          {Buffer<A>(s.C * s.ld), Buffer<A>(s.C * s.ld), Buffer<A>(s.C * s.ld)},
                          Buffer<A>(s.C * s.L),
                          Buffer<A>(s.C)};
    Tensor dw1 = empty_grad(w1, kDtype<A>), dw_h = empty_grad(w_h, kDtype<A>),
           dw_w = empty_grad(w_w, kDtype<A>), db_h = empty({s.C}, kDtype<A>), db_w = empty({s.C}, kDtype<A>);
    const Split parts = channel_parts<A>(s);
    const int64_t grain = 1 + (1 << 15) / (1 + s.N * s.L * s.M * parts.size);
    parallel_for(0, parts.count, grain, [&](int64_t b, int64_t e) {
      const int64_t c0 = parts.begin(b), c1 = parts.end(e - 1);
      for (int64_t n = 0; n < s.N; ++n) grads.add(n, c0, c1);
      grads.finish(c0, c1, dw_h, dw_w, dw1, db_h, db_w);
    });
    return std::make_tuple(dmeans, sums, db_h, db_w, gradient_of(w1, dw1), gradient_of(w_h, dw_h),
                           gradient_of(w_w, dw_w));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::line_gates_fwd>(m, "line_gates_fwd");
  visattn::implement<visattn::line_gates_bwd>(m, "line_gates_bwd");
}
