// LocalAttention: y = act(x * channel * spatial + residual), spatial = sigmoid(p2 relu(p1 x + q1) + q2) for
// each pixel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "column_stats.h"
#include "gemm.h"
#include "matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "pixel_gate.h"
#include "row_stats.h"
#include "simd.h"
#include "simd_lanes.h"
#include "tensor.h"

namespace visattn {
namespace {

constexpr int64_t kWord = 32;  // hidden units whose signs share an integer

// The spatial gate, a perceptron of a pixel's channels. Its hidden values live in a block's scratch memory;
// only their signs are kept.
template <class T>
struct HiddenPixel {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;
  int64_t C, R, padded, words, P;
  Buffer<A> first, transposed, bias, second, product;  // p1 as [R, C] and [C, padded], q1, p2, p2 p1 [R, C]
  A offset = 0;                                        // q2
  int32_t* signs;                                      // [N, words, P]

  HiddenPixel(const Tensor& p1, const std::optional<Tensor>& q1, const Tensor& p2, const Tensor& kept,
              const Shape& s)
      : C(s.C),
        R(p1.size(0)),
        padded(whole_vectors<A>(R)),
        words((R + kWord - 1) / kWord),
        P(s.P),
        first(R * C),
        transposed(C * padded),
        bias(padded),
        second(padded),
        product(R * C),
        signs(data<int32_t>(kept)) {
    std::copy_n(data<A>(weight_as(p1, kDtype<A>)), R * C, first.get());
    std::copy_n(data<A>(weight_as(p2, kDtype<A>)), R, second.get());
    if (q1) std::copy_n(data<A>(weight_as(*q1, kDtype<A>)), R, bias.get());
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t c = 0; c < C; ++c) {
        transposed[c * padded + r] = first[r * C + c];
        product[r * C + c] = second[r] * first[r * C + c];
      }
    }
  }

  void logits(const Matrix<const T>& x, bool nhwc, int64_t n, int64_t p0, A* out) const {
    const int64_t pixels = nhwc ? x.rows : x.cols, ld = nhwc ? padded : whole_vectors<A>(pixels);
    Buffer<A> hidden(nhwc ? pixels * padded : R * ld);
    A* h = hidden.get();
    int32_t* kept = signs + n * words * P + p0;
    simd([=, this]() VF_INLINE {
      const auto keep = [=](int64_t i, int64_t j, Vec<A> v, auto) VF_INLINE { store(h + i * ld + j, v); };
      if (nhwc) {
        gemm<A>(Broadcast<T>{x.p, x.ld, 1}, transposed.get(), padded, pixels, padded, C, 6, keep);
        for (int64_t p = 0; p < pixels; ++p) activate_row(h + p * padded, kept + p, out + p);
      } else {
        gemm<A>(Broadcast<A>{first.get(), C, 1}, x.p, x.ld, R, pixels, C, R, keep);
        for_vectors<A>(pixels, [&](int64_t p, auto lanes)
                                   VF_INLINE { activate_columns(h + p, ld, kept + p, out + p, lanes); });
      }
    });
  }

  // Floats of a block's share: sum_p mask dz x [R, C] (in nchw transposed and padded), sum_p mask dz
  // [padded], sum_p dz.
  int64_t share_size(bool nhwc) const { return (nhwc ? R * C : C * padded) + padded + 1; }

  void weight_grad(const Matrix<const T>& x, PixelGrad<A> grad, A* out) const {
    const int64_t pixels = grad.nhwc ? x.rows : x.cols, sums = share_size(grad.nhwc) - padded - 1;
    Buffer<A> masked(pixels * padded), sum(padded);
    A *d = masked.get(), *ps = sum.get();
    simd([=, this]() VF_INLINE {
      mask_rows(grad, pixels, d);
      const int64_t ld = grad.nhwc ? C : padded;
      const auto add = [=](int64_t i, int64_t j, Vec<A> v, auto lanes)
                           VF_INLINE { store(out + i * ld + j, load(out + i * ld + j, lanes) + v, lanes); };
      if (grad.nhwc) {
        gemm<A>(Broadcast<A>{d, 1, padded}, x.p, x.ld, R, C, pixels, R, add);
      } else {
        gemm<A>(Broadcast<T>{x.p, x.ld, 1}, d, padded, C, padded, pixels, 6, add);
      }
    });
    column_stats<A, false, false>(Matrix<const A>{d, padded, pixels, padded}, nullptr, ps);
    for (int64_t r = 0; r < padded; ++r) out[sums + r] += ps[r];
    A total;
    row_stats<A, false, false>(Matrix<const A>{grad.dz, pixels, 1, pixels}, nullptr, &total);
    out[sums + padded] += total;
  }

  void input_grad(const Matrix<const T>& g, PixelGrad<A> grad, const A* channel, const A* spatial,
                  const A* dmean, T* dx) const {
    const int64_t pixels = grad.nhwc ? g.rows : g.cols, ld = whole_vectors<A>(pixels);
    Buffer<A> masked(grad.nhwc ? pixels * padded : R * ld);
    A* d = masked.get();
    simd([=, this]() VF_INLINE {
      if (grad.nhwc) {
        mask_rows(grad, pixels, d);
        gemm<A>(Broadcast<A>{d, padded, 1}, product.get(), C, pixels, C, R, 6,
                [=](int64_t p, int64_t c, Vec<A> v, auto lanes) VF_INLINE {
                  const Vec<A> gate = load(channel + c) * spatial[p];
                  store(dx + p * g.ld + c, load(g.row(p) + c, lanes) * gate + (v + load(dmean + c)), lanes);
                });
      } else {
        mask_columns(grad, pixels, d, ld);
        gemm<A>(Broadcast<A>{product.get(), 1, C}, d, ld, C, pixels, R, 6,
                [=](int64_t c, int64_t p, Vec<A> v, auto lanes) VF_INLINE {
                  const Vec<A> gate = load(spatial + p) * channel[c];
                  store(dx + c * g.ld + p, load(g.row(c) + p, lanes) * gate + (v + dmean[c]), lanes);
                });
      }
    });
  }

 private:
  // The hidden values of one pixel, before the bias -> its logit and signs.
  VF_INLINE void activate_row(const A* h, int32_t* kept, A* out) const {
    Vec<A> total = set1<A>(0);
    for (int64_t word = 0; word < words; ++word) {
      IVec<A> bits{};
      const int64_t end = padded < (word + 1) * kWord ? padded : (word + 1) * kWord;
      for (int64_t r = word * kWord; r < end; r += L) {
        const IVec<A> unit = iota<A>() + set1_index<A>(r);
        const Vec<A> sum = load(h + r) + load(bias.get() + r);
        const Vec<A> v = unit < set1_index<A>(R) ? sum : Vec<A>{};  // 0 times infinity, past the last unit
        total += load(second.get() + r) * (v < 0 ? Vec<A>{} : v);
        bits |= (v <= 0 ? IVec<A>{} : IVec<A>{} + 1) << (iota<A>() + set1_index<A>(r - word * kWord));
      }
      kept[word * P] =
          static_cast<int32_t>(reduce_lanes(bits, [](IVec<A> a, IVec<A> b) VF_INLINE { return a | b; }));
    }
    *out = sum_lanes<A>(total) + offset;
  }

  // The same for a vector of pixels.
  template <class Lanes>
  VF_INLINE void activate_columns(const A* h, int64_t ld, int32_t* kept, A* out, Lanes lanes) const {
    Vec<A> total = set1<A>(offset);
    for (int64_t word = 0; word < words; ++word) {
      IVec<A> bits{};
      for (int64_t r = word * kWord; r < R && r < (word + 1) * kWord; ++r) {
        const Vec<A> v = load(h + r * ld) + bias.get()[r];
        total += second.get()[r] * (v < 0 ? Vec<A>{} : v);
        bits |= (v <= 0 ? IVec<A>{} : IVec<A>{} + 1) << set1_index<A>(r - word * kWord);
      }
      int count = L;
      if constexpr (std::is_same_v<Lanes, Tail>) count = lanes.n;
      for (int t = 0; t < count; ++t) kept[word * P + t] = static_cast<int32_t>(bits[t]);
    }
    store(out, total);
  }

  // out [pixels, padded] = dz where the hidden value is positive, else 0.
  VF_INLINE void mask_rows(PixelGrad<A> grad, int64_t pixels, A* out) const {
    const int32_t* kept = signs + grad.n * words * P + grad.p0;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t r = 0; r < padded; r += L) {
        const IVec<A> word = set1_index<A>(kept[r / kWord * P + p]);
        const IVec<A> bit = (word >> (iota<A>() + set1_index<A>(r % kWord))) & 1;
        store(out + p * padded + r, bit != 0 ? set1<A>(grad.dz[p]) : Vec<A>{});
      }
    }
  }

  // The same as [R, pixels], whose rows are whole vectors.
  VF_INLINE void mask_columns(PixelGrad<A> grad, int64_t pixels, A* out, int64_t ld) const {
    const int32_t* kept = signs + grad.n * words * P + grad.p0;
    Index<A> word[L] = {};
    for (int64_t p = 0; p < pixels; p += L) {
      const Vec<A> dz = load(grad.dz + p);
      for (int64_t r = 0; r < R; ++r) {
        if (r % kWord == 0) {
          for (int64_t t = 0; t < L && p + t < pixels; ++t) word[t] = kept[r / kWord * P + p + t];
        }
        const IVec<A> bit = (load_index<A>(word) >> set1_index<A>(r % kWord)) & 1;
        store(out + r * ld + p, bit != 0 ? dz : Vec<A>{});
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_fwd(
    Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2, Tensor p1,
    std::optional<Tensor> q1, Tensor p2, std::optional<Tensor> q2, std::optional<Tensor> residual,
    int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const auto bias1 = bias_as<A>(b1), bias2 = bias_as<A>(b2), offset = bias_as<A>(q2);
    Tensor mean = empty({s.N, s.C}, kDtype<A>), hidden = empty({s.N, mlp.R}, kDtype<A>),
           channel = empty({s.N, s.C}, kDtype<A>), spatial = empty({s.N, s.H, s.W}, kDtype<A>),
           signs = empty({s.N, (p1.size(0) + kWord - 1) / kWord, s.H, s.W}, ScalarType::Int);
    HiddenPixel<T> pixel(p1, q1, p2, signs, s);
    if (offset) pixel.offset = *data<A>(*offset);
    const auto gate_of = [&](int64_t n, const A* mu, A* out) {
      A* h = data<A>(hidden) + n * mlp.R;
      mlp.hidden(mu, data_or_null<A>(bias1), h);
      mlp.gate(h, data_or_null<A>(bias2), out);
    };
    Tensor y = pixel_gate_fwd<T, false>(feature_map(x), s, residual, activation, data<A>(mean),
                                        data<A>(channel), data<A>(spatial), gate_of, pixel);
    return std::make_tuple(y, mean, hidden, channel, spatial, signs);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
local_attention_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor p1, std::optional<Tensor> q1,
                    Tensor p2, std::optional<Tensor> residual, Tensor mean, Tensor hidden,
                    Tensor channel_gate, Tensor spatial_gate, Tensor signs, int64_t activation) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const HiddenPixel<T> pixel(p1, q1, p2, signs, s);
    const int64_t size = pixel.share_size(map.nhwc), sums = size - pixel.padded - 1;
    Buffer<A> dz(s.N * s.C), dh(s.N * mlp.R), images(s.N * size), total(size);
    const A *h = data<A>(hidden), *gate = data<A>(channel_gate);
    const auto dmean_of = [&](int64_t n, const A* dgate, A* dmean) {
      sigmoid_grad(dgate, gate + n * s.C, s.C, &dz[n * s.C]);
      mlp.hidden_grad(&dz[n * s.C], h + n * mlp.R, &dh[n * mlp.R]);
      mlp.input_grad(&dh[n * mlp.R], dmean);
    };
    auto [dx, dresidual] = pixel_gate_bwd<T, false>(grad, map, s, residual, gate, data<A>(spatial_gate),
                                                    activation, dmean_of, pixel, size, images.get());
    const auto [dw1, db1, dw2, db2] = weight_grad(mlp, w1, w2, s.N, dz.get(), dh.get(), data<A>(mean), h);
    batch_sum(s.N, images.get(), size, total.get());
    Tensor dp1 = empty_grad(p1, kDtype<A>), dq1 = empty({pixel.R}, kDtype<A>),
           dp2 = empty_grad(p2, kDtype<A>), dq2 = empty({1}, kDtype<A>);
    // With S = sum mask dz x and t = sum mask dz, the second layer's gradient sum dz relu(h) is p1 . S + q1
    // t.
    for (int64_t r = 0; r < pixel.R; ++r) {
      const A weight = *(pixel.second.get() + r), t = total[sums + r];
      double dot = static_cast<double>(*(pixel.bias.get() + r)) * t;
      for (int64_t c = 0; c < s.C; ++c) {
        const A value = map.nhwc ? total[r * s.C + c] : total[c * pixel.padded + r];
        data<A>(dp1)[r * s.C + c] = weight * value;
        dot += static_cast<double>(*(pixel.first.get() + r * s.C + c)) * value;
      }
      data<A>(dq1)[r] = weight * t;
      data<A>(dp2)[r] = static_cast<A>(dot);
    }
    *data<A>(dq2) = total[size - 1];
    return std::make_tuple(dx, dresidual, gradient_of(w1, dw1), gradient_of(w1, db1), gradient_of(w2, dw2),
                           gradient_of(w2, db2), gradient_of(p1, dp1), gradient_of(p1, dq1),
                           gradient_of(p2, dp2), gradient_of(p2, dq2));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::local_attention_fwd>(m, "local_attention_fwd");
  visattn::implement<visattn::local_attention_bwd>(m, "local_attention_bwd");
}
