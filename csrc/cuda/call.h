// The host's side of every CUDA op: the map, weights, scratch memory, stream and plan of a call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/geometry.h"
#include "../common/plan.h"
#include "../common/signature.h"
#include "../common/tensor.h"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

using Guard = torch::stable::accelerator::DeviceGuard;

// x itself if each of its images is dense in one of the layouts, else a dense copy.
struct Map {
  Tensor tensor;
  Shape s;
  bool nhwc;
  int64_t stride_n;
};

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

inline Place place_of(const Tensor& x) { return {aoti_torch_device_type_cuda(), x.get_device_index()}; }

// An uninitialised contiguous tensor on the device of x.
inline Tensor empty_beside(const Tensor& x, std::initializer_list<int64_t> sizes,
                           ScalarType dtype = ScalarType::Float) {
  return empty(sizes, dtype, place_of(x));
}

inline Tensor empty_map(const Map& x) {
  return empty_map(x.s, x.nhwc, x.tensor.scalar_type(), place_of(x.tensor));
}

// dresidual as an op returns it: a map, or empty without an activation.
inline Tensor empty_residual_grad(const Map& x, bool activated) {
  return activated ? empty_map(x) : empty_beside(x.tensor, {0}, x.tensor.scalar_type());
}

// Scratch memory of a call: one allocation, or none. torch's allocator reuses memory of the current stream in
// stream order, so the call may free it as soon as its launches are queued.
class Scratchpad {
 public:
  Scratchpad(const Tensor& x, int64_t floats) {
    if (!floats) return;
    memory_ = empty_beside(x, {floats});
    next_ = data<float>(*memory_);
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

// A weight in its own dtype, as the kernels read it. `keep` holds the tensor until the launches are queued.
inline Weight<PlainMemory> weight(const std::optional<Tensor>& w, std::vector<Tensor>& keep) {
  if (!w) return {nullptr, kFloatWeight};
  keep.push_back(as_contiguous(*w));
  return {data<const char>(keep.back()), weight_type(keep.back())};
}

inline Call call_on(const Tensor& x, const int64_t* sizes) {
  const int device = x.get_device_index();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return {device, stream, sizes};
}

// The plan of a launch of kernel(plan), which also goes into the kernel's arguments.
template <class Args, class KernelOf>
Plan plan_of(Args& args, const Problem& problem, const KernelOf& kernel, const Call& call) {
  const Plan p = plan(problem, device_of(call.device), [&](const Plan& candidate) {
    return resident_clusters(kernel(candidate), candidate, call.device);
  });
  args.geometry = p.geometry, args.scratch = p.scratch;
  return p;
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
