// Squeeze-and-excitation on CUDA. Experimental: on an H200 the native kernels are right, but slower than
// Triton's, so only use_backend("cuda") chooses them. Python declares the ops, in a namespace of their own,
// with the schemas of visattn_fast.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "batch_sums.h"
#include "call.h"
#include "channel_call.h"
#include "channel_gate.h"
#include "portable.h"

namespace visattn::cuda {
namespace {

GateWeights<PlainMemory> se_weights(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                                    const Tensor& w2, const std::optional<Tensor>& b2,
                                    int64_t hidden_activation, int64_t gate_activation,
                                    std::vector<Tensor>& keep) {
  const int64_t C = x.size(1), R = w1.size(0);
  STD_TORCH_CHECK(w1.numel() == R * C && w2.numel() == R * C,
                  "gate weights must be [R, C] and [C, R] with C = ", C, " channels, got ", w1.numel(),
                  " and ", w2.numel(), " elements");
  return {weight(w1, keep),
          weight(b1, keep),
          weight(w2, keep),
          weight(b2, keep),
          0,
          static_cast<int>(hidden_activation),
          static_cast<int>(gate_activation)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                                  std::optional<Tensor> b2, std::optional<Tensor> residual,
                                                  int64_t activation, int64_t hidden_activation,
                                                  int64_t gate_activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const auto weights = se_weights(x, w1, b1, w2, b2, hidden_activation, gate_activation, keep);
  const ChannelResults out = call_forward("se_fwd", x, weights, w1.size(0), residual, activation);
  return {out.y, out.mean, out.hidden, out.gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> residual, Tensor mean, Tensor hidden,
    Tensor gate, int64_t activation, int64_t hidden_activation, int64_t gate_activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const auto weights = se_weights(x, w1, {}, w2, {}, hidden_activation, gate_activation, keep);
  const int64_t C = x.size(1), R = w1.size(0);
  const Place place = place_of(x);
  Tensor dw1 = empty_grad(w1, ScalarType::Float, place), db1 = empty_beside(x, {R}),
         dw2 = empty_grad(w2, ScalarType::Float, place), db2 = empty_beside(x, {C});
  const auto sums_of = [&](int64_t N, float* dz, float* dhidden) {
    return se_sums<PlainMemory>(N, static_cast<int>(C), static_cast<int>(R),
                                static_cast<int>(hidden_activation), dz, dhidden, data<const float>(mean),
                                data<const float>(hidden), data<float>(dw1), data<float>(db1),
                                data<float>(dw2), data<float>(db2));
  };
  const ChannelGrads out =
      call_backward("se_bwd", grad, x, weights, residual, hidden, gate, R, activation, sums_of);
  return {out.dx, out.dresidual, dw1, db1, dw2, db2};
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  visattn::implement<visattn::cuda::se_fwd>(m, "se_fwd");
  visattn::implement<visattn::cuda::se_bwd>(m, "se_bwd");
}
