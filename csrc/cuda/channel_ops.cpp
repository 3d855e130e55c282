// SE and ECA on CUDA: the ops' checks, results and launches. The ops of this namespace are declared in
// Python, with the schemas of visattn_fast, and chosen there.
#include "batch_sums.h"
#include "channel_scale.h"
#include "tensors.h"

namespace visattn::cuda {

template <class T, class Args>
void launch_channel_scale(const char* name, Args& a, const Plan& p, bool nhwc, const Call& call);

namespace {

using Guard = torch::stable::accelerator::DeviceGuard;
using Weights = GateWeights<PlainMemory>;

Plan plan_of(const Map& x, int64_t hidden, int64_t stride_n, bool aligned, const Call& call, int threads) {
  const int element = static_cast<int>(x.tensor.element_size());
  return plan(x.s.N, x.s.C, x.s.P, hidden, stride_n, element, x.nhwc, aligned, device_of(call.device),
              threads);
}

struct Forward {
  Tensor y, mean, hidden, gate;
};

Forward forward(const char* name, const Tensor& given, const Weights& weights, int64_t hidden_units,
                const std::optional<Tensor>& residual, int64_t activation) {
  const Map x = map_of(given);
  const auto res = dense_residual(residual, x);
  Forward out{empty_map(x), empty_small(x.tensor, {x.s.N, x.s.C}),
              empty_small(x.tensor, {x.s.N, hidden_units}), empty_small(x.tensor, {x.s.N, x.s.C})};
  if (x.tensor.numel() == 0) return out;
  const int64_t sizes[] = {x.s.N, x.s.C, x.s.H, x.s.W};
  const Call call = call_on(x.tensor, sizes);
  dispatch_cuda(x.tensor, [&](auto type) {
    using T = decltype(type);
    ChannelForward<PlainMemory, T> a{};
    a.weights = weights;
    a.activation = static_cast<int>(activation);
    a.x = in<T>(x.tensor), a.residual = in<T>(res), a.y = data<T>(out.y);
    a.mean = data<float>(out.mean), a.hidden = data<float>(out.hidden), a.gate = data<float>(out.gate);
    const Plan p = plan_of(x, hidden_units, x.stride_n, is_aligned({a.x, a.residual, a.y}), call, kThreads);
    launch_channel_scale<T>(name, a, p, x.nhwc, call);
  });
  return out;
}

struct Backward {
  Tensor dx, dresidual, dz, dhidden;
};

// `small` starts with the tensors that the kernel reads of those that forward kept: hidden (empty in ECA) and
// gate.
Backward backward(const char* name, const Tensor& grad, const Tensor& given, const Weights& weights,
                  const std::optional<Tensor>& residual, const Tensor& hidden, const Tensor& gate,
                  int64_t hidden_units, int64_t activation) {
  const Map x = map_of(given);
  const Tensor g = dense(grad, x.nhwc);
  const bool act = activation != kNone;
  const auto res = act ? dense_residual(residual, x) : std::nullopt;
  Backward out{empty_map(x), act ? empty_map(x) : empty_on(x.tensor, {0}, {1}, x.tensor.scalar_type()),
               empty_small(x.tensor, {x.s.N, x.s.C}), empty_small(x.tensor, {x.s.N, hidden_units})};
  if (x.tensor.numel() == 0) return out;
  const int64_t sizes[] = {x.s.N, x.s.C, x.s.H, x.s.W};
  const Call call = call_on(x.tensor, sizes);
  dispatch_cuda(x.tensor, [&](auto type) {
    using T = decltype(type);
    ChannelBackward<PlainMemory, T> a{};
    a.weights = weights;
    a.activation = static_cast<int>(activation);
    a.x_stride_n = x.stride_n;
    a.grad = in<T>(g), a.x = in<T>(x.tensor), a.residual = in<T>(res);
    a.dx = data<T>(out.dx), a.dresidual = act ? data<T>(out.dresidual) : nullptr;
    a.hidden = in<float>(hidden), a.gate = in<float>(gate);
    a.dz = data<float>(out.dz), a.dhidden = data<float>(out.dhidden);
    const bool x_images = x.stride_n * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned = is_aligned({a.grad, a.x, a.residual, a.dx, a.dresidual}) && x_images;
    const Plan p = plan_of(x, hidden_units, x.s.C * x.s.P, aligned, call, kFewThreads);
    launch_channel_scale<T>(name, a, p, x.nhwc, call);
  });
  return out;
}

Weights se_weights(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                   const std::optional<Tensor>& b2, int64_t hidden_activation, int64_t gate_activation,
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

Weights eca_weights(const Tensor& w, std::vector<Tensor>& keep) {
  return {weight(w, keep), {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, static_cast<int>(w.numel()),
          kRelu,           kSigmoid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                                  std::optional<Tensor> b2, std::optional<Tensor> residual,
                                                  int64_t activation, int64_t hidden_activation,
                                                  int64_t gate_activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const Weights w = se_weights(x, w1, b1, w2, b2, hidden_activation, gate_activation, keep);
  const Forward out = forward("se_fwd", x, w, w1.size(0), residual, activation);
  return {out.y, out.mean, out.hidden, out.gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_bwd(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> residual, Tensor mean, Tensor hidden,
    Tensor gate, int64_t activation, int64_t hidden_activation, int64_t gate_activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const Weights w = se_weights(x, w1, {}, w2, {}, hidden_activation, gate_activation, keep);
  const int64_t C = x.size(1), R = w1.size(0);
  const Backward out = backward("se_bwd", grad, x, w, residual, hidden, gate, R, activation);
  const auto empty_as = [&](const Tensor& t) {
    return empty_small(x, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
  };
  Tensor dw1 = empty_as(w1), db1 = empty_small(x, {R}), dw2 = empty_as(w2), db2 = empty_small(x, {C});
  const float *dz = in<float>(out.dz), *dh = in<float>(out.dhidden);
  const int c = static_cast<int>(C), r = static_cast<int>(R);
  const int taken = hidden_activation == kRelu ? kNone : static_cast<int>(hidden_activation);
  const OuterSums sums{{{dh, in<float>(mean), data<float>(dw1), r, c, kNone},
                        {dz, in<float>(hidden), data<float>(dw2), c, r, taken},
                        {dh, nullptr, data<float>(db1), r, 1, kNone},
                        {dz, nullptr, data<float>(db2), c, 1, kNone}},
                       x.size(0)};
  const int64_t sizes[] = {x.size(0), C, x.size(2), x.size(3)};
  launch_outer_sums("se_bwd", sums, 4, call_on(x, sizes));
  return {out.dx, out.dresidual, dw1, db1, dw2, db2};
}

std::tuple<Tensor, Tensor, Tensor> eca_fwd(Tensor x, Tensor weight, std::optional<Tensor> residual,
                                           int64_t activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const Forward out = forward("eca_fwd", x, eca_weights(weight, keep), 0, residual, activation);
  return {out.y, out.mean, out.gate};
}

std::tuple<Tensor, Tensor, Tensor> eca_bwd(Tensor grad, Tensor x, Tensor weight,
                                           std::optional<Tensor> residual, Tensor mean, Tensor gate,
                                           int64_t activation) {
  const Guard guard(x.get_device_index());
  std::vector<Tensor> keep;
  const Weights w = eca_weights(weight, keep);
  const Backward out = backward("eca_bwd", grad, x, w, residual, gate, gate, 0, activation);
  Tensor dweight = empty_small(x, std::vector<int64_t>(weight.sizes().begin(), weight.sizes().end()));
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const WindowSum sum{in<float>(out.dz),           in<float>(mean),
                      data<float>(dweight),        x.size(0),
                      static_cast<int>(x.size(1)), static_cast<int>(weight.numel())};
  launch_window_sum("eca_bwd", sum, call_on(x, sizes));
  return {out.dx, out.dresidual, dweight};
}

}  // namespace
}  // namespace visattn::cuda

STABLE_TORCH_LIBRARY_IMPL(visattn_fast_cuda, CUDA, m) {
  m.impl("se_fwd", TORCH_BOX(&visattn::cuda::se_fwd));
  m.impl("se_bwd", TORCH_BOX(&visattn::cuda::se_bwd));
  m.impl("eca_fwd", TORCH_BOX(&visattn::cuda::eca_fwd));
  m.impl("eca_bwd", TORCH_BOX(&visattn::cuda::eca_bwd));
}
