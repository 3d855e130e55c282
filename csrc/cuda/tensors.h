// Tensors of the CUDA ops: maps whose images are dense, results, the plan of a call. For host code alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/tensor.h"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

// x as it stands if each of its images is dense in one of the layouts, else a dense copy.
struct Map {
  Tensor tensor;
  Shape s;
  bool nhwc;
  int64_t stride_n;
};

inline Tensor dense(const Tensor& t, bool nhwc) {
  if (is_dense(t, nhwc)) return t;
  return torch::stable::contiguous(t, nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Map map_of(const Tensor& x) {
  const Shape s = shape_of(x);
  const bool nhwc = is_nhwc(x);
  const bool images = nhwc ? has_strides(x, {-1, 1, s.W * s.C, s.C}) : has_strides(x, {-1, s.P, s.W, 1});
  if (images && s.N > 1) return {x, s, nhwc, x.stride(0)};
  return {dense(x, nhwc), s, nhwc, s.C * s.P};
}

inline std::optional<Tensor> dense_residual(const std::optional<Tensor>& residual, const Map& x) {
  if (!residual) return std::nullopt;
  STD_TORCH_CHECK(
      residual->numel() == x.s.N * x.s.C * x.s.P && residual->scalar_type() == x.tensor.scalar_type(),
      "residual must have the shape and the dtype of x");
  return dense(*residual, x.nhwc);
}

inline Tensor empty_on(const Tensor& x, const std::vector<int64_t>& sizes,
                       const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), code, aoti_torch_device_type_cuda(),
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_small(const Tensor& x, const std::vector<int64_t>& sizes,
                          ScalarType dtype = ScalarType::Float) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return empty_on(x, sizes, strides, dtype);
}

inline Tensor empty_as(const Tensor& x, const Tensor& like) {
  return empty_small(x, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
}

inline Tensor empty_map(const Map& x) {
  const Shape& s = x.s;
  const std::vector<int64_t> nhwc = {s.C * s.P, 1, s.W * s.C, s.C}, nchw = {s.C * s.P, s.P, s.W, 1};
  return empty_on(x.tensor, {s.N, s.C, s.H, s.W}, x.nhwc ? nhwc : nchw, x.tensor.scalar_type());
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* in(const std::optional<Tensor>& t) {
  return t ? in<T>(*t) : nullptr;
}

// What a call needs beside its results: one allocation, or none. Memory of torch's allocator on the current
// stream may be given back once the launches are in line, for it is reused in stream order.
class Scratchpad {
 public:
  Scratchpad(const Tensor& x, int64_t floats) {
    if (floats) memory_ = empty_small(x, {floats}), next_ = data<float>(*memory_);
  }
  float* take(int64_t floats) { return floats ? (next_ += floats) - floats : nullptr; }

 private:
  std::optional<Tensor> memory_;
  float* next_ = nullptr;
};

inline WeightType weight_type(const Tensor& w) {
  switch (w.scalar_type()) {
    case ScalarType::Float:
      return kFloatWeight;
    case ScalarType::Half:
      return kHalfWeight;
    case ScalarType::BFloat16:
      return kBFloat16Weight;
    default:
      STD_TORCH_CHECK(false, "weights must be float32, float16 or bfloat16 for the CUDA kernels");
  }
}

// A weight that the kernels read as it is, in its own dtype. The tensor outlives the launch's preparation in
// `keep`.
inline Weight<PlainMemory> weight(const std::optional<Tensor>& w, std::vector<Tensor>& keep) {
  if (!w) return {nullptr, kFloatWeight};
  keep.push_back(w->is_contiguous() ? *w : torch::stable::contiguous(*w));
  return {in<char>(keep.back()), weight_type(keep.back())};
}

inline Call call_on(const Tensor& x, const int64_t* sizes) {
  const int device = x.get_device_index();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return {device, stream, sizes};
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// Calls f(T{}) with the element type of x.
template <class F>
auto dispatch_cuda(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16 for the CUDA kernels");
  }
}

}  // namespace visattn::cuda
