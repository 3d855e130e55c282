// CBAM's forward on CUDA: checks, results and the launch.
#include "cbam.h"
#include "tensors.h"

namespace visattn::cuda {

template <class T>
void launch_cbam(const char* name, CbamForward<PlainMemory, T>& a, const Plan& p, bool nhwc,
                 const Call& call);

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_fwd(
    Tensor given, Tensor w1, Tensor w2, Tensor wconv, std::optional<Tensor> residual, int64_t activation) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Map x = map_of(given);
  const auto res = dense_residual(residual, x);
  const int64_t N = x.s.N, C = x.s.C, H = x.s.H, W = x.s.W, R = w1.size(0), k = wconv.size(3);
  STD_TORCH_CHECK(w1.numel() == R * C && w2.numel() == R * C && wconv.numel() == 2 * k * k,
                  "cbam_fwd: weights must be [R, C], [C, R] and [1, 2, k, k] with C = ", C, " channels");
  const Tensor& t = x.tensor;
  Tensor y = empty_map(x), pooled = empty_small(t, {N, 2, C}),
         argmax_hw = empty_small(t, {N, C}, ScalarType::Int), hidden = empty_small(t, {N, 2, R}),
         channel_gate = empty_small(t, {N, C}), maps = empty_small(t, {N, 2, H, W}),
         argmax_c = empty_small(t, {N, H, W}, ScalarType::Int), spatial_gate = empty_small(t, {N, H, W});
  const auto results =
      std::make_tuple(y, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate);
  if (t.numel() == 0) return results;
  std::vector<Tensor> keep;
  const int64_t sizes[] = {N, C, H, W};
  const Call call = call_on(t, sizes);
  dispatch_cuda(t, [&](auto type) {
    using T = decltype(type);
    CbamForward<PlainMemory, T> a{};
    a.weights.w1 = weight(w1, keep), a.weights.w2 = weight(w2, keep), a.wconv = weight(wconv, keep);
    a.weights.hidden_activation = kRelu, a.weights.gate_activation = kSigmoid;
    a.activation = static_cast<int>(activation);
    a.x = in<T>(t), a.residual = in<T>(res), a.y = data<T>(y);
    a.pooled = data<float>(pooled), a.hidden = data<float>(hidden),
    a.channel_gate = data<float>(channel_gate);
    a.maps = data<float>(maps), a.spatial_gate = data<float>(spatial_gate);
    a.argmax_hw = data<int>(argmax_hw), a.argmax_c = data<int>(argmax_c);
    const Plan p = plan(N, C, x.s.P, R, x.stride_n, static_cast<int>(sizeof(T)), x.nhwc,
                        is_aligned({a.x, a.residual, a.y}), device_of(call.device), kFewThreads,
                        static_cast<int>(W), static_cast<int>(k));
    launch_cbam<T>("cbam_fwd", a, p, x.nhwc, call);
  });
  return results;
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  m.impl("cbam_fwd", TORCH_BOX(&visattn::cuda::cbam_fwd));
}
