// Efficient channel attention on CUDA. Experimental: see se.cpp.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/activations.h"
#include "../common/tensor.h"
#include "batch_sums.h"
#include "call.h"
#include "channel_call.h"
#include "channel_gate.h"
#include "portable.h"

namespace visattn::cuda {
namespace {

GateWeights<PlainMemory> eca_weights(const Tensor& w, std::vector<Tensor>& keep) {
  return {weight(w, keep), {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, static_cast<int>(w.numel()),
          kRelu,           kSigmoid};
}

std::tuple<Tensor, Tensor, Tensor> eca_fwd(Tensor x, Tensor weight, std::optional<Tensor> residual,
                                           int64_t activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const ChannelResults out = call_forward("eca_fwd", x, eca_weights(weight, keep), 0, residual, activation);
  return {out.y, out.mean, out.gate};
}

std::tuple<Tensor, Tensor, Tensor> eca_bwd(Tensor grad, Tensor x, Tensor weight,
                                           std::optional<Tensor> residual, Tensor mean, Tensor gate,
                                           int64_t activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const auto weights = eca_weights(weight, keep);
  Tensor dweight = empty_grad(weight, ScalarType::Float, place_of(x));
  const auto sums_of = [&](int64_t N, float* dz, float*) {
    return eca_sums<PlainMemory>(N, static_cast<int>(x.size(1)), weights.window, dz, data<const float>(mean),
                                 data<float>(dweight));
  };
  const ChannelGrads out =
      call_backward("eca_bwd", grad, x, weights, residual, gate, gate, 0, activation, sums_of);
  return {out.dx, out.dresidual, dweight};
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  visattn::implement<visattn::cuda::eca_fwd>(m, "eca_fwd");
  visattn::implement<visattn::cuda::eca_bwd>(m, "eca_bwd");
}
