// Tensors on the CPU, with all of common/tensor.h: feature maps as matrices, conversion of weights, dispatch
// by dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "../common/signature.h"
#include "../common/tensor.h"
#include "simd.h"

namespace visattn {

// A feature map as N row-major matrices: [C, P] in nchw, [P, C] in nhwc. `ld` is the distance between rows.
struct FeatureMap {
  Tensor tensor;
  bool nhwc;
  int64_t stride_n, ld;

  template <class T>
  const T* image(int64_t n) const {
    return data<const T>(tensor) + n * stride_n;
  }
};

// x itself if its layout can be walked by rows, else a dense copy in the same layout.
inline FeatureMap feature_map(const Tensor& x) {
  const Shape s = shape_of(x);
  const bool nhwc = is_nhwc(x);
  const int64_t pixel = x.stride(s.W > 1 ? 3 : 2);
  if (is_dense(x, nhwc)) return {x, nhwc, s.C * s.P, nhwc ? s.C : s.P};
  if (!nhwc && has_strides(x, {-1, -1, s.W, 1})) return {x, false, x.stride(0), x.stride(1)};
  if (nhwc && has_strides(x, {-1, 1, s.W > 1 ? s.W * pixel : -1, -1})) return {x, true, x.stride(0), pixel};
  return {dense(x, nhwc), nhwc, s.C * s.P, nhwc ? s.C : s.P};
}

// A grad or a residual: dense in the layout of x, copied if it is not.
inline FeatureMap dense_map(const Tensor& t, const Shape& s, bool nhwc) {
  return {dense(t, nhwc), nhwc, s.C * s.P, nhwc ? s.C : s.P};
}

inline std::optional<FeatureMap> optional_map(const std::optional<Tensor>& t, const Shape& s, bool nhwc) {
  if (!t) return std::nullopt;
  return dense_map(*t, s, nhwc);
}

template <class T>
const T* image_or_null(const std::optional<FeatureMap>& map, int64_t n) {
  return map ? map->image<T>(n) : nullptr;
}

// dresidual as an op returns it: a map, or empty without an activation, for then it equals grad.
inline Tensor empty_residual_grad(const Shape& s, bool nhwc, ScalarType dtype, bool activated) {
  return activated ? empty_map(s, nhwc, dtype) : empty({0}, dtype);
}

struct MapGrads {
  Tensor dx, dresidual;
};

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// A weight's gradient in the weight's dtype, rounded once from the sum.
inline Tensor gradient_of(const Tensor& w, const Tensor& sum) { return as_dtype(sum, w.scalar_type()); }

// A weight as a contiguous tensor of the accumulation dtype.
inline Tensor weight_as(const Tensor& w, ScalarType dtype) { return as_contiguous(as_dtype(w, dtype)); }

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <class A>
std::optional<Tensor> bias_as(const std::optional<Tensor>& bias) {
  if (!bias) return std::nullopt;
  return weight_as(*bias, kDtype<A>);
}

// Calls f(T{}) with the element type of x.
template <class F>
auto dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64 or bfloat16 on the CPU");
  }
}

}  // namespace visattn
