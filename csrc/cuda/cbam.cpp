// CBAM on CUDA. Experimental: see se.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "../common/plan.h"
#include "../common/tensor.h"
#include "batch_sums.h"
#include "call.h"
#include "cbam_forward.h"
#include "cbam_image.h"
#include "channel_gate.h"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

template <class Args>
Kernel cbam_for(const Plan& p, bool nhwc);

namespace {

Problem problem_of(const Map& x, int64_t hidden, int64_t window, bool aligned, bool backward) {
  return {x.s.N,
          x.s.C,
          x.s.P,
          hidden,
          x.stride_n,
          static_cast<int>(x.tensor.element_size()),
          x.nhwc,
          aligned,
          backward,
          static_cast<int>(x.s.W),
          static_cast<int>(window)};
}

GateWeights<PlainMemory> gate_weights(const char* name, const Map& x, const Tensor& w1, const Tensor& w2,
                                      const Tensor& wconv, std::vector<Tensor>& keep) {
  const int64_t C = x.s.C, R = w1.size(0), k = wconv.size(3);
  STD_TORCH_CHECK(w1.numel() == R * C && w2.numel() == R * C && wconv.numel() == 2 * k * k, name,
                  ": weights must be [R, C], [C, R] and [1, 2, k, k] with C = ", C, " channels");
  return {weight(w1, keep), {nullptr, 0}, weight(w2, keep), {nullptr, 0}, 0, kRelu, kSigmoid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_fwd(
    Tensor x, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias, std::optional<Tensor> residual,
    int64_t activation) {
  const Guard guard(x.get_device_index());
  const Map map = map_of(x);
  const auto res = dense_residual(residual, map);
  std::vector<Tensor> keep;
  const auto weights = gate_weights("cbam_fwd", map, w1, w2, wconv, keep);
  const int64_t N = map.s.N, C = map.s.C, H = map.s.H, W = map.s.W, R = w1.size(0), k = wconv.size(3);
  const Tensor& t = map.tensor;
  Tensor y = empty_map(map), pooled = empty_beside(t, {N, 2, C}),
         argmax_hw = empty_beside(t, {N, C}, ScalarType::Int), hidden = empty_beside(t, {N, 2, R}),
         channel_gate = empty_beside(t, {N, C}), maps = empty_beside(t, {N, 2, H, W}),
         argmax_c = empty_beside(t, {N, H, W}, ScalarType::Int), spatial_gate = empty_beside(t, {N, H, W});
  const auto results =
      std::make_tuple(y, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate);
  if (t.numel() == 0) return results;
  const int64_t sizes[] = {N, C, H, W};
  const Call call = call_on(t, sizes);
  dispatch_cuda(t, [&](auto type) {
    using T = decltype(type);
    CbamForward<PlainMemory, T> a{};
    a.weights = weights, a.wconv = weight(wconv, keep), a.bias = weight(bias, keep);
    a.activation = static_cast<int>(activation);
    a.x = data<const T>(t), a.residual = data_or_null<const T>(res), a.y = data<T>(y);
    a.pooled = data<float>(pooled), a.hidden = data<float>(hidden),
    a.channel_gate = data<float>(channel_gate);
    a.maps = data<float>(maps), a.spatial_gate = data<float>(spatial_gate);
    a.argmax_hw = data<int>(argmax_hw), a.argmax_c = data<int>(argmax_c);
    const auto kernel = [&](const Plan& p) { return cbam_for<decltype(a)>(p, map.nhwc); };
    const bool aligned = is_aligned({a.x, a.residual, a.y});
    const Plan p = plan_of(a, problem_of(map, R, k, aligned, false), kernel, call);
    Scratchpad scratch(t, p.workspace_words());
    launch("cbam_fwd", kernel(p), &a, p, scratch.take(p.workspace_words()), call);
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias,
    std::optional<Tensor> residual, Tensor pooled, Tensor argmax_hw, Tensor hidden, Tensor channel_gate,
    Tensor maps, Tensor argmax_c, Tensor spatial_gate, int64_t activation) {
  const Guard guard(x.get_device_index());
  const Map map = map_of(x);
  const Tensor &t = map.tensor, g = dense(grad, map.nhwc);
  const bool act = activation != kNone;
  const auto res = act ? dense_residual(residual, map) : std::nullopt;
  std::vector<Tensor> keep;
  const auto weights = gate_weights("cbam_bwd", map, w1, w2, wconv, keep);
  const int64_t N = map.s.N, C = map.s.C, R = w1.size(0), k = wconv.size(3);
  const Place place = place_of(t);
  Tensor dx = empty_map(map), dresidual = empty_residual_grad(map, act),
         dw1 = empty_grad(w1, ScalarType::Float, place), dw2 = empty_grad(w2, ScalarType::Float, place),
         dwconv = empty_grad(wconv, ScalarType::Float, place), dbias = empty_beside(t, {bias ? 1 : 0});
  const int64_t sizes[] = {N, C, map.s.H, map.s.W};
  const Call call = call_on(t, sizes);
  const auto sums_of = [&](int64_t batch, float* dz, float* dhidden, float* dconv) {
    return cbam_sums<PlainMemory>(batch, static_cast<int>(C), static_cast<int>(R), static_cast<int>(k), dz,
                                  dhidden, dconv, data<const float>(pooled), data<const float>(hidden),
                                  data<float>(dw1), data<float>(dw2), data<float>(dwconv),
                                  bias ? data<float>(dbias) : nullptr);
  };
  const auto results = std::make_tuple(dx, dresidual, dw1, dw2, dwconv, dbias);
  if (t.numel() == 0) {
    launch_batch_sums("cbam_bwd", sums_of(0, nullptr, nullptr, nullptr), call);
    return results;
  }
  dispatch_cuda(t, [&](auto type) {
    using T = decltype(type);
    CbamBackward<PlainMemory, T> a{};
    a.weights = weights, a.wconv = weight(wconv, keep);
    a.activation = static_cast<int>(activation);
    a.grad = data<const T>(g), a.x = data<const T>(t), a.residual = data_or_null<const T>(res);
    a.dx = data<T>(dx), a.dresidual = act ? data<T>(dresidual) : nullptr;
    a.hidden = data<const float>(hidden), a.channel_gate = data<const float>(channel_gate),
    a.maps = data<const float>(maps);
    a.spatial_gate = data<const float>(spatial_gate);
    a.argmax_hw = data<const int>(argmax_hw), a.argmax_c = data<const int>(argmax_c);
    const bool aligned = is_aligned({a.grad, a.x, a.residual, a.dx, a.dresidual, a.spatial_gate, a.argmax_c});
    const auto kernel = [&](const Plan& p) { return cbam_for<decltype(a)>(p, map.nhwc); };
    const Plan p = plan_of(a, problem_of(map, R, k, aligned, true), kernel, call);
    const int64_t dz = N * C, dhidden = 2 * N * R, dconv = N * (2 * k * k + 1);
    Scratchpad scratch(t, dz + dhidden + dconv + p.workspace_words());
    a.dz = scratch.take(dz), a.dhidden = scratch.take(dhidden), a.dconv = scratch.take(dconv);
    const Sums sums = sums_of(N, a.dz, a.dhidden, a.dconv);
    if (p.one_launch) a.sums = sums;
    launch("cbam_bwd", kernel(p), &a, p, scratch.take(p.workspace_words()), call);
    if (!p.one_launch) launch_batch_sums("cbam_bwd", sums, call);
  });
  return results;
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  visattn::implement<visattn::cuda::cbam_fwd>(m, "cbam_fwd");
  visattn::implement<visattn::cuda::cbam_bwd>(m, "cbam_bwd");
}
