// Tensors on PyTorch's stable ABI, on any device: shapes and layouts of feature maps, allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

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

// The elements. `const T` only reads them.
template <class T>
T* data(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr());
  } else {
    return static_cast<T*>(t.data_ptr());
  }
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// True if the strides are `wanted`. A negative entry accepts any stride, and so does a dimension of size 1.
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

// Layout rule: a dense map has its own layout. Any other map is nchw if its planes are dense, else nhwc if
// its channels are.
inline bool is_nhwc(const Tensor& x) {
  if (is_dense(x, false)) return false;
  if (is_dense(x, true)) return true;
  return !has_strides(x, {-1, -1, x.size(3), 1}) && x.stride(1) == 1;
}

// A feature map that is dense in a layout: t itself, or a copy.
inline Tensor dense(const Tensor& t, bool nhwc) {
  if (is_dense(t, nhwc)) return t;
  return torch::stable::contiguous(t, nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A contiguous tensor: t itself, or a copy.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The device of an allocation.
struct Place {
  int32_t type, index;
};

inline Place on_cpu() { return {aoti_torch_device_type_cpu(), 0}; }

// The functions below allocate uninitialised tensors.

inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
                            Place place = on_cpu()) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which PyTorch 2.11 does not have yet.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, place.type, place.index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(int64_t dims, const int64_t* sizes, ScalarType dtype, Place place = on_cpu()) {
  constexpr int64_t kMost = 8;
  STD_TORCH_CHECK(dims <= kMost, "at most ", kMost, " dimensions, got ", dims);
  int64_t strides[kMost], stride = 1;
  for (int64_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return empty_strided(dims, sizes, strides, dtype, place);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, Place place = on_cpu()) {
  return empty_contiguous(static_cast<int64_t>(sizes.size()), sizes.begin(), dtype, place);
}

// A dense feature map.
inline Tensor empty_map(const Shape& s, bool nhwc, ScalarType dtype, Place place = on_cpu()) {
  const int64_t sizes[] = {s.N, s.C, s.H, s.W}, strides[] = {s.C * s.P, 1, s.W * s.C, s.C};
  return nhwc ? empty_strided(4, sizes, strides, dtype, place) : empty({s.N, s.C, s.H, s.W}, dtype, place);
}

// A weight's gradient: its shape, in the accumulation dtype.
inline Tensor empty_grad(const Tensor& w, ScalarType dtype, Place place = on_cpu()) {
  return empty_contiguous(w.dim(), w.sizes().data(), dtype, place);
}

}  // namespace visattn
