// CBAM on CUDA: the ops' checks, results and launches.
#include "cbam_backward.h"
#include "cbam_forward.h"
#include "tensors.h"

namespace visattn::cuda {

template <class Args>
Kernel cbam_for(const Plan& p, bool nhwc);

namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

template <class Args>
Plan plan_of(Args& a, const Map& x, int64_t hidden, int64_t window, bool aligned, const Call& call) {
  const int element = static_cast<int>(x.tensor.element_size());
  constexpr bool kBackward = !std::is_same_v<Args, CbamForward<PlainMemory, typename Args::Element>>;
  const Plan p = plan({x.s.N, x.s.C, x.s.P, hidden, x.stride_n, element, x.nhwc, aligned, kBackward,
                       static_cast<int>(x.s.W), static_cast<int>(window)},
                      device_of(call.device), [&](const Plan& p) {
                        return resident_clusters(cbam_for<Args>(p, x.nhwc), p, call.device);
                      });
  a.geometry = p.geometry, a.scratch = p.scratch;
  return p;
}

GateWeights<PlainMemory> gate_weights(const char* name, const Map& x, const Tensor& w1, const Tensor& w2,
                                      const Tensor& wconv, std::vector<Tensor>& keep) {
  const int64_t C = x.s.C, R = w1.size(0), k = wconv.size(3);
  STD_TORCH_CHECK(w1.numel() == R * C && w2.numel() == R * C && wconv.numel() == 2 * k * k, name,
                  ": weights must be [R, C], [C, R] and [1, 2, k, k] with C = ", C, " channels");
  return {weight(w1, keep), {nullptr, 0}, weight(w2, keep), {nullptr, 0}, 0, kRelu, kSigmoid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_fwd(
    Tensor given, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias,
    std::optional<Tensor> residual, int64_t activation) {
  const Guard guard(given.get_device_index());
  const Map x = map_of(given);
  const auto res = dense_residual(residual, x);
  std::vector<Tensor> keep;
  const auto weights = gate_weights("cbam_fwd", x, w1, w2, wconv, keep);
  const int64_t N = x.s.N, C = x.s.C, H = x.s.H, W = x.s.W, R = w1.size(0), k = wconv.size(3);
  const Tensor& t = x.tensor;
  Tensor y = empty_map(x), pooled = empty_small(t, {N, 2, C}),
         argmax_hw = empty_small(t, {N, C}, ScalarType::Int), hidden = empty_small(t, {N, 2, R}),
         channel_gate = empty_small(t, {N, C}), maps = empty_small(t, {N, 2, H, W}),
         argmax_c = empty_small(t, {N, H, W}, ScalarType::Int), spatial_gate = empty_small(t, {N, H, W});
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
    a.x = in<T>(t), a.residual = in<T>(res), a.y = data<T>(y);
    a.pooled = data<float>(pooled), a.hidden = data<float>(hidden),
    a.channel_gate = data<float>(channel_gate);
    a.maps = data<float>(maps), a.spatial_gate = data<float>(spatial_gate);
    a.argmax_hw = data<int>(argmax_hw), a.argmax_c = data<int>(argmax_c);
    const Plan p = plan_of(a, x, R, k, is_aligned({a.x, a.residual, a.y}), call);
    Scratchpad scratch(t, p.workspace_words());
    launch("cbam_fwd", cbam_for<decltype(a)>(p, x.nhwc), &a, p, scratch.take(p.workspace_words()), call);
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_bwd(
    Tensor grad, Tensor given, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> bias,
    std::optional<Tensor> residual, Tensor pooled, Tensor argmax_hw, Tensor hidden, Tensor channel_gate,
    Tensor maps, Tensor argmax_c, Tensor spatial_gate, int64_t activation) {
  const Guard guard(given.get_device_index());
  const Map x = map_of(given);
  const Tensor &t = x.tensor, g = dense(grad, x.nhwc);
  const bool act = activation != kNone;
  const auto res = act ? dense_residual(residual, x) : std::nullopt;
  std::vector<Tensor> keep;
  const auto weights = gate_weights("cbam_bwd", x, w1, w2, wconv, keep);
  const int64_t N = x.s.N, C = x.s.C, R = w1.size(0), k = wconv.size(3);
  Tensor dx = empty_map(x), dresidual = act ? empty_map(x) : empty_on(t, {0}, {1}, t.scalar_type()),
         dw1 = empty_as(t, w1), dw2 = empty_as(t, w2), dwconv = empty_as(t, wconv),
         dbias = empty_small(t, {bias ? 1 : 0});
  const int64_t sizes[] = {N, C, x.s.H, x.s.W};
  const Call call = call_on(t, sizes);
  const auto sums_of = [&](int64_t batch, float* dz, float* dhidden, float* dconv) {
    return cbam_sums<PlainMemory>(batch, static_cast<int>(C), static_cast<int>(R), static_cast<int>(k), dz,
                                  dhidden, dconv, in<float>(pooled), in<float>(hidden), data<float>(dw1),
                                  data<float>(dw2), data<float>(dwconv), bias ? data<float>(dbias) : nullptr);
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
    a.grad = in<T>(g), a.x = in<T>(t), a.residual = in<T>(res);
    a.dx = data<T>(dx), a.dresidual = act ? data<T>(dresidual) : nullptr;
    a.hidden = in<float>(hidden), a.channel_gate = in<float>(channel_gate), a.maps = in<float>(maps);
    a.spatial_gate = in<float>(spatial_gate);
    a.argmax_hw = in<int>(argmax_hw), a.argmax_c = in<int>(argmax_c);
    const bool aligned = is_aligned({a.grad, a.x, a.residual, a.dx, a.dresidual, a.spatial_gate, a.argmax_c});
    const Plan p = plan_of(a, x, R, k, aligned, call);
    const int64_t dz = N * C, dhidden = 2 * N * R, dconv = N * (2 * k * k + 1);
    Scratchpad scratch(t, dz + dhidden + dconv + p.workspace_words());
    a.dz = scratch.take(dz), a.dhidden = scratch.take(dhidden), a.dconv = scratch.take(dconv);
    const Sums sums = sums_of(N, a.dz, a.dhidden, a.dconv);
    if (p.one_launch) a.sums = sums;
    launch("cbam_bwd", cbam_for<decltype(a)>(p, x.nhwc), &a, p, scratch.take(p.workspace_words()), call);
    if (!p.one_launch) launch_batch_sums("cbam_bwd", sums, call);
  });
  return results;
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  m.impl("cbam_fwd", TORCH_BOX(&visattn::cuda::cbam_fwd));
  m.impl("cbam_bwd", TORCH_BOX(&visattn::cuda::cbam_bwd));
}
