// A call of a gate that scales whole channels, SE or ECA: its results and its launches.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/activations.h"
#include "../common/plan.h"
#include "../common/tensor.h"
#include "batch_sums.h"
#include "call.h"
#include "channel_gate.h"
#include "channel_scale.h"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

template <class Args>
Kernel channel_scale_for(const Plan& p, bool nhwc);

struct ChannelResults {
  Tensor y, mean, hidden, gate;
};

inline ChannelResults call_forward(const char* name, const Tensor& given,
                                   const GateWeights<PlainMemory>& weights, int64_t hidden_units,
                                   const std::optional<Tensor>& residual, int64_t activation) {
  const Map x = map_of(given);
  const auto res = dense_residual(residual, x);
  ChannelResults out{empty_map(x), empty_beside(x.tensor, {x.s.N, x.s.C}),
                     empty_beside(x.tensor, {x.s.N, hidden_units}), empty_beside(x.tensor, {x.s.N, x.s.C})};
  if (x.tensor.numel() == 0) return out;
  const int64_t sizes[] = {x.s.N, x.s.C, x.s.H, x.s.W};
  const Call call = call_on(x.tensor, sizes);
  dispatch_cuda(x.tensor, [&](auto type) {
    using T = decltype(type);
    ChannelForward<PlainMemory, T> a{};
    a.weights = weights;
    a.activation = static_cast<int>(activation);
    a.x = data<const T>(x.tensor), a.residual = data_or_null<const T>(res), a.y = data<T>(out.y);
    a.mean = data<float>(out.mean), a.hidden = data<float>(out.hidden), a.gate = data<float>(out.gate);
    const bool aligned = is_aligned({a.x, a.residual, a.y});
    const auto kernel = [&](const Plan& p) { return channel_scale_for<decltype(a)>(p, x.nhwc); };
    const Plan p =
        plan_of(a, {x.s.N, x.s.C, x.s.P, hidden_units, x.stride_n, int{sizeof(T)}, x.nhwc, aligned, false},
                kernel, call);
    Scratchpad scratch(x.tensor, p.workspace_words());
    launch(name, kernel(p), &a, p, scratch.take(p.workspace_words()), call);
  });
  return out;
}

struct ChannelGrads {
  Tensor dx, dresidual;
};

// hidden (ECA passes any tensor) and gate are the forward's. sums_of(N, dz, dhidden) gives the sums of the
// weights' gradients over the batch.
template <class SumsOf>
ChannelGrads call_backward(const char* name, const Tensor& grad, const Tensor& given,
                           const GateWeights<PlainMemory>& weights, const std::optional<Tensor>& residual,
                           const Tensor& hidden, const Tensor& gate, int64_t hidden_units, int64_t activation,
                           const SumsOf& sums_of) {
  const Map x = map_of(given);
  const Tensor g = dense(grad, x.nhwc);
  const bool act = activation != kNone;
  const auto res = act ? dense_residual(residual, x) : std::nullopt;
  ChannelGrads out{empty_map(x), empty_residual_grad(x, act)};
  const int64_t sizes[] = {x.s.N, x.s.C, x.s.H, x.s.W};
  const Call call = call_on(x.tensor, sizes);
  if (x.tensor.numel() == 0) return launch_batch_sums(name, sums_of(0, nullptr, nullptr), call), out;
  dispatch_cuda(x.tensor, [&](auto type) {
    using T = decltype(type);
    ChannelBackward<PlainMemory, T> a{};
    a.weights = weights;
    a.activation = static_cast<int>(activation);
    a.x_stride_n = x.stride_n;
    a.grad = data<const T>(g), a.x = data<const T>(x.tensor), a.residual = data_or_null<const T>(res);
    a.dx = data<T>(out.dx), a.dresidual = act ? data<T>(out.dresidual) : nullptr;
    a.hidden = data<const float>(hidden), a.gate = data<const float>(gate);
    const bool x_images = x.stride_n * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned = is_aligned({a.grad, a.x, a.residual, a.dx, a.dresidual}) && x_images;
    const auto kernel = [&](const Plan& p) { return channel_scale_for<decltype(a)>(p, x.nhwc); };
    const Plan p =
        plan_of(a, {x.s.N, x.s.C, x.s.P, hidden_units, x.s.C * x.s.P, int{sizeof(T)}, x.nhwc, aligned, true},
                kernel, call);
    const int64_t dz = x.s.N * x.s.C, dhidden = x.s.N * hidden_units;
    Scratchpad scratch(x.tensor, dz + dhidden + p.workspace_words());
    a.dz = scratch.take(dz), a.dhidden = scratch.take(dhidden);
    const Sums sums = sums_of(x.s.N, a.dz, a.dhidden);
    if (p.one_launch) a.sums = sums;
    launch(name, kernel(p), &a, p, scratch.take(p.workspace_words()), call);
    if (!p.one_launch) launch_batch_sums(name, sums, call);
  });
  return out;
}

}  // namespace visattn::cuda
