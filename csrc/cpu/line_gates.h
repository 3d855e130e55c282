// Products between an image's lines and its hidden rows [L, M], in both layouts of lines, and the batch norm
// and hardswish between them.
//
// Rows, weights and vectors lie in buffers, whose padding whole vectors may read. Hidden rows are `ld` apart,
// a multiple of the vector length. Lanes past a row's end hold garbage and are never stored.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {

constexpr int64_t kStep = 48;  // rows of a product that pass over all columns together

// Sizes of lines [N, C, L], the first H of which are rows, and of their M hidden channels.
struct LineShape {
  int64_t N, C, H, L, M;
  bool nhwc;
  int64_t ld;  // distance between hidden rows

  VF_INLINE int64_t at(int64_t c, int64_t l) const { return nhwc ? l * C + c : c * L + l; }

  // An image from (c, l) on, as a factor with a row for each line or for each channel.
  template <class A>
  VF_INLINE Broadcast<A> by_line(const A* image, int64_t c, int64_t l) const {
    return {image + at(c, l), at(0, 1), at(1, 0)};
  }
  template <class A>
  VF_INLINE Broadcast<A> by_channel(const A* image, int64_t c, int64_t l) const {
    return {image + at(c, l), at(1, 0), at(0, 1)};
  }
};

// Calls f(offset, count) for the dense runs of an image that hold channels [c0, c1).
template <class F>
VF_INLINE inline void for_runs(const LineShape& s, int64_t c0, int64_t c1, const F& f) {
  if (!s.nhwc || c1 - c0 == s.C) return f(s.at(c0, 0), (c1 - c0) * s.L);
  for (int64_t l = 0; l < s.L; ++l) f(s.at(c0, l), c1 - c0);
}

// Calls f(part, begin, end) for the lines of [begin, end) that are rows (part 0), then for those that are
// columns (part 1).
template <class F>
VF_INLINE inline void for_parts(int64_t H, int64_t begin, int64_t end, const F& f) {
  for (int part = 0; part < 2; ++part) {
    const int64_t l0 = part && begin < H ? H : begin, l1 = !part && end > H ? H : end;
    if (l0 < l1) f(part, l0, l1);
  }
}

// Stores the lanes of v, the vector at column j, that lie within the `count` elements of a row.
template <class A>
VF_INLINE inline void store_within(A* row, int64_t j, int64_t count, Vec<A> v) {
  if (j + kLanes<A> <= count) return store(row + j, v);
  if (j < count) store(row + j, v, Tail{static_cast<int>(count - j)});
}

// A small tensor as a buffer, filled with `otherwise` without a tensor.
template <class A>
Buffer<A> buffer_of(const std::optional<Tensor>& t, int64_t count, A otherwise = 0) {
  Buffer<A> out(count);
  if (!t) {
    std::fill_n(out.get(), count, otherwise);
    return out;
  }
  const Tensor values = weight_as(*t, kDtype<A>);
  std::copy_n(data<A>(values), count, out.get());
  return out;
}

// Transposes [rows, cols], whose rows are `ld` apart.
template <class A>
void transpose_to(const A* in, int64_t rows, int64_t cols, int64_t ld, A* out) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * rows + r] = in[r * ld + c];
  }
}

template <class A>
Buffer<A> transposed(const Buffer<A>& in, int64_t rows, int64_t cols) {
  Buffer<A> out(rows * cols);
  transpose_to(in.get(), rows, cols, cols, out.get());
  return out;
}

// Calls f(l, m, sum_c lines(c, l) weight[c, m]) for lines [begin, end) of an image. weight is [C, M].
template <class A, class F>
VF_INLINE inline void to_rows(const LineShape& s, const A* lines, const A* weight, int64_t begin, int64_t end,
                              const F& f) {
  gemm<A>(s.by_line(lines, 0, begin), weight, s.M, end - begin, s.ld, s.C, kStep,
          [&](int64_t i, int64_t m, Vec<A> v, auto) VF_INLINE { f(begin + i, m, v); });
}

// out(c, l) = sum_m weight(c, m) rows(l, m) + bias[c] for channels [c0, c1) and lines [l0, l1) of an image.
// The layout decides which factor has dense rows, and in which direction its vectors run.
template <class A>
void to_lines(const LineShape& s, Broadcast<A> weight, Broadcast<A> rows, const A* bias, int64_t c0,
              int64_t c1, int64_t l0, int64_t l1, A* out) {
  simd([=]() VF_INLINE {
    const Broadcast<A> w{weight.p + c0 * weight.stride_i, weight.stride_i, weight.stride_k},
        r{rows.p + l0 * rows.stride_i, rows.stride_i, rows.stride_k};
    const Broadcast<A>&a = s.nhwc ? r : w, &b = s.nhwc ? w : r;
    const int64_t channels = c1 - c0, count = l1 - l0, along = s.nhwc ? channels : count;
    const int64_t ld = s.nhwc ? s.C : s.L;
    const A* added = bias + c0;
    A* first = out + s.at(c0, l0);
    gemm<A>(a, b.p, b.stride_k, s.nhwc ? count : channels, whole_vectors<A>(along), s.M, kStep,
            [=](int64_t i, int64_t j, Vec<A> v, auto) VF_INLINE {
              store_within(first + i * ld, j, along, v + (s.nhwc ? load(added + j) : set1<A>(added[i])));
            });
  });
}

// Rows [L, M] as the factor that to_lines takes: themselves in nhwc, else dense along L, copied to `along`
// [M, L].
template <class A>
Broadcast<A> rows_factor(const LineShape& s, const A* rows, A* along) {
  if (s.nhwc) return {rows, s.ld, 1};
  transpose_to(rows, s.L, s.M, s.ld, along);
  return {along, 1, s.L};
}

template <class V>
VF_INLINE inline V hardswish(V v) {
  V shifted = v + 3;
  shifted = shifted < V{} ? V{} : shifted;
  shifted = shifted > 6 ? V{} + 6 : shifted;
  return v * shifted / 6;
}

// g * hardswish'(v)
template <class V>
VF_INLINE inline V hardswish_grad(V g, V v) {
  const V inside = v < 3 ? g * (v / 3 + decltype(v[0] + 0)(0.5)) : g;
  return v <= -3 ? V{} : inside;
}

// The batch norm of a vector of hidden channels.
template <class A>
struct NormLanes {
  Vec<A> mean, inverse, weight, bias;

  VF_INLINE Vec<A> normal(Vec<A> z) const { return (z - mean) * inverse; }
  VF_INLINE Vec<A> affine(Vec<A> normal) const { return normal * weight + bias; }
};

template <class A>
class LineNorm {
 public:
  LineNorm(int64_t M, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& bias, double eps)
      : mean_(buffer_of<A>(mean, M)),
        inverse_(buffer_of<A>(var, M)),
        weight_(buffer_of<A>(weight, M, 1)),
        bias_(buffer_of<A>(bias, M)) {
    for (int64_t m = 0; m < M; ++m) inverse_[m] = 1 / std::sqrt(inverse_[m] + static_cast<A>(eps));
  }

  VF_INLINE NormLanes<A> at(int64_t m) const {
    return {load(mean_.get() + m), load(inverse_.get() + m), load(weight_.get() + m), load(bias_.get() + m)};
  }

  // The factor of z.
  A gain(int64_t m) const { return inverse_.get()[m] * weight_.get()[m]; }

  // The largest mean of the normalised z that the rounding of its mean, and of z, can leave.
  double rounding(int64_t m) const {
    return 2 * static_cast<double>(std::numeric_limits<A>::epsilon()) *
           (1 + std::abs(static_cast<double>(mean_.get()[m]) * inverse_.get()[m]));
  }

 private:
  Buffer<A> mean_, inverse_, weight_, bias_;
};

// hidden [L, M] = hardswish(bn(z)) of an image's z [L, M], which is dense.
template <class A>
void activate_rows(const LineShape& s, const LineNorm<A>& norm, const A* z, A* hidden) {
  const LineNorm<A>* by = &norm;
  simd([=]() VF_INLINE {
    for_vectors<A>(s.M, [&](int64_t m, auto lanes) VF_INLINE {
      const NormLanes<A> k = by->at(m);
      for (int64_t l = 0; l < s.L; ++l) {
        store(hidden + l * s.ld + m, hardswish(k.affine(k.normal(load(z + l * s.M + m, lanes)))));
      }
    });
  });
}

// Computes hidden as above, and turns the gradients of hidden in `grads` into those of bn(z). sums [3, ld]
// are the sums of the latter over the lines, plain and times the normalised z, and of the normalised z.
template <class A>
void activate_rows_grad(const LineShape& s, const LineNorm<A>& norm, const A* z, A* hidden, A* grads,
                        A* sums) {
  const LineNorm<A>* by = &norm;
  simd([=]() VF_INLINE {
    for_vectors<A>(s.M, [&](int64_t m, auto lanes) VF_INLINE {
      const NormLanes<A> k = by->at(m);
      Vec<A> dbias = set1<A>(0), dweight = dbias, offset = dbias;
      for (int64_t l = 0; l < s.L; ++l) {
        const Vec<A> normal = k.normal(load(z + l * s.M + m, lanes)), v = k.affine(normal);
        const Vec<A> d = hardswish_grad(load(grads + l * s.ld + m), v);
        store(hidden + l * s.ld + m, hardswish(v));
        store(grads + l * s.ld + m, d);
        dbias += d, dweight += d * normal, offset += normal;
      }
      store(sums + m, dbias), store(sums + s.ld + m, dweight), store(sums + 2 * s.ld + m, offset);
    });
  });
}

// Turns the gradients of bn(z) in `grads` into those of z: grads * gain with given statistics (`fixed`), else
// (grads - dbias - normalised z * dweight) * gain, where dbias and dweight are means over the batch.
template <class A>
void norm_rows_grad(const LineShape& s, const LineNorm<A>& norm, const A* z, const A* dbias, const A* dweight,
                    bool fixed, A* grads) {
  const LineNorm<A>* by = &norm;
  simd([=]() VF_INLINE {
    for_vectors<A>(s.M, [&](int64_t m, auto lanes) VF_INLINE {
      const NormLanes<A> k = by->at(m);
      const Vec<A> lower = load(dbias + m), slope = load(dweight + m), gain = k.inverse * k.weight;
      for (int64_t l = 0; l < s.L; ++l) {
        A* at = grads + l * s.ld + m;
        Vec<A> d = load(at);
        if (!fixed) d = d - lower - k.normal(load(z + l * s.M + m, lanes)) * slope;
        store(at, d * gain);
      }
    });
  });
}

// moments [2, ld]: the mean of an image's z and sum (z - mean)^2, in double and relative to the first line,
// so that equal values give exactly their value, and zero.
template <class A>
void line_moments(const LineShape& s, const A* z, double* moments) {
  simd([=]() VF_INLINE {
    for_vectors<A>(s.M, [&](int64_t m, auto lanes) VF_INLINE {
      const auto line = [&](int64_t l) VF_INLINE {
        return __builtin_convertvector(load(z + l * s.M + m, lanes), Wide<A>);
      };
      const Wide<A> first = line(0), shift = first - first == Wide<A>{} ? first : Wide<A>{};
      Wide<A> sum = {}, squares = {};
      for (int64_t l = 0; l < s.L; ++l) sum += line(l) - shift;
      const Wide<A> middle = shift + sum / static_cast<double>(s.L);
      for (int64_t l = 0; l < s.L; ++l) {
        const Wide<A> d = line(l) - middle;
        squares += d * d;
      }
      std::memcpy(moments + m, &middle, sizeof(middle));
      std::memcpy(moments + s.ld + m, &squares, sizeof(squares));
    });
  });
}

}  // namespace visattn
