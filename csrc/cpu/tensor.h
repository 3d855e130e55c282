// Tensors on PyTorch's stable ABI: layouts, conversion of weights, allocation, dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "simd.h"

namespace visattn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sizes of a feature map [N, C, H, W]; P = H * W.
struct Shape {
  int64_t N, C, H, W, P;
};

inline Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape [N, C, H, W], got ", x.dim(), " dimensions");
  const auto s = x.sizes();
  return {s[0], s[1], s[2], s[3], s[2] * s[3]};
}

// A feature map as N row-major matrices: [C, P] for nchw, [P, C] for nhwc. `ld` is the stride between rows.
struct FeatureMap {
  Tensor tensor;
  bool nhwc;
  int64_t stride_n, ld;

  template <class T>
  const T* image(int64_t n) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + n * stride_n;
  }
};

inline bool has_strides(const Tensor& x, std::initializer_list<int64_t> wanted) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t d = 0;
  for (int64_t w : wanted) {
    if (w >= 0 && sizes[d] != 1 && strides[d] != w) return false;
    ++d;
  }
  return true;
}

inline bool is_dense(const Tensor& x, bool nhwc) {
  const Shape s = shape_of(x);
  if (s.N == 0) return true;
  return nhwc ? has_strides(x, {s.C * s.P, 1, s.W * s.C, s.C}) : has_strides(x, {s.C * s.P, s.P, s.W, 1});
}

// Layout rule: dense first, then nchw with planes dense and anything between them, then nhwc if channels are
// dense.
inline bool is_nhwc(const Tensor& x) {
  if (is_dense(x, false)) return false;
  if (is_dense(x, true)) return true;
  return !has_strides(x, {-1, -1, x.size(3), 1}) && x.stride(1) == 1;
}

// x as it stands if its layout can be walked by rows, else a dense copy in the same layout.
inline FeatureMap feature_map(const Tensor& x) {
  const Shape s = shape_of(x);
  const bool nhwc = is_nhwc(x);
  const int64_t pixel = x.stride(s.W > 1 ? 3 : 2);
  if (is_dense(x, nhwc)) return {x, nhwc, s.C * s.P, nhwc ? s.C : s.P};
  if (!nhwc && has_strides(x, {-1, -1, s.W, 1})) return {x, false, x.stride(0), x.stride(1)};
  if (nhwc && has_strides(x, {-1, 1, s.W > 1 ? s.W * pixel : -1, -1})) return {x, true, x.stride(0), pixel};
  const auto format = nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return {torch::stable::contiguous(x, format), nhwc, s.C * s.P, nhwc ? s.C : s.P};
}

// grad and residual: dense in the layout of x, copied there if they are not.
inline FeatureMap dense_map(const Tensor& t, const Shape& s, bool nhwc) {
  const bool dense = is_dense(t, nhwc);
  const auto format = nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return {dense ? t : torch::stable::contiguous(t, format), nhwc, s.C * s.P, nhwc ? s.C : s.P};
}

inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which PyTorch 2.11 does not have yet.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_dense(int64_t dims, const int64_t* sizes, ScalarType dtype) {
  constexpr int64_t kMost = 8;
  STD_TORCH_CHECK(dims <= kMost, "at most ", kMost, " dimensions, got ", dims);
  int64_t strides[kMost], stride = 1;
  for (int64_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return empty_strided(dims, sizes, strides, dtype);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_dense(static_cast<int64_t>(sizes.size()), sizes.begin(), dtype);
}

inline Tensor empty_map(const Shape& s, bool nhwc, ScalarType dtype) {
  const int64_t sizes[] = {s.N, s.C, s.H, s.W}, strides[] = {s.C * s.P, 1, s.W * s.C, s.C};
  return nhwc ? empty_strided(4, sizes, strides, dtype) : empty({s.N, s.C, s.H, s.W}, dtype);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// A weight's gradient, which has its dtype, rounded once from the sum.
inline Tensor gradient_of(const Tensor& w, const Tensor& sum) { return as_dtype(sum, w.scalar_type()); }

// A weight as a contiguous tensor of the accumulation dtype.
inline Tensor weight_as(const Tensor& w, ScalarType dtype) {
  const Tensor cast = as_dtype(w, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

// An uninitialised gradient of a weight: its shape, the accumulation dtype.
inline Tensor empty_grad(const Tensor& w, ScalarType dtype) {
  return empty_dense(w.dim(), w.sizes().data(), dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

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
