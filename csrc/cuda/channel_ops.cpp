// SE and ECA on CUDA: the ops' checks, results and launches. The ops of this namespace are declared in
// Python, with the schemas of visattn_fast, and chosen there.
#include "channel_scale.h"
#include "tensors.h"

namespace visattn::cuda {

template <class Args>
Kernel channel_scale_for(const Plan& p, bool nhwc);

namespace {

using Guard = torch::stable::accelerator::DeviceGuard;
using Weights = GateWeights<PlainMemory>;

template <class Args>
Plan plan_of(Args& a, const Map& x, int64_t hidden, int64_t stride_n, bool aligned, const Call& call) {
  const int element = static_cast<int>(x.tensor.element_size());
  constexpr bool kBackward = !std::is_same_v<Args, ChannelForward<PlainMemory, typename Args::Element>>;
  const Plan p = plan(
      {x.s.N, x.s.C, x.s.P, hidden, stride_n, element, x.nhwc, aligned, kBackward}, device_of(call.device),
      [&](const Plan& p) { return resident_clusters(channel_scale_for<Args>(p, x.nhwc), p, call.device); });
  a.geometry = p.geometry, a.scratch = p.scratch;
  return p;
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
    const Plan p = plan_of(a, x, hidden_units, x.stride_n, is_aligned({a.x, a.residual, a.y}), call);
    Scratchpad scratch(x.tensor, p.workspace_words());
    launch(name, channel_scale_for<decltype(a)>(p, x.nhwc), &a, p, scratch.take(p.workspace_words()), call);
  });
  return out;
}

struct Backward {
  Tensor dx, dresidual;
};

// hidden (empty in ECA) and gate are those that forward kept. sums_of(N, dz, dhidden) are the weights'.
template <class SumsOf>
Backward backward(const char* name, const Tensor& grad, const Tensor& given, const Weights& weights,
                  const std::optional<Tensor>& residual, const Tensor& hidden, const Tensor& gate,
                  int64_t hidden_units, int64_t activation, const SumsOf& sums_of) {
  const Map x = map_of(given);
  const Tensor g = dense(grad, x.nhwc);
  const bool act = activation != kNone;
  const auto res = act ? dense_residual(residual, x) : std::nullopt;
  Backward out{empty_map(x), act ? empty_map(x) : empty_on(x.tensor, {0}, {1}, x.tensor.scalar_type())};
  const int64_t sizes[] = {x.s.N, x.s.C, x.s.H, x.s.W};
  const Call call = call_on(x.tensor, sizes);
  if (x.tensor.numel() == 0) return launch_batch_sums(name, sums_of(0, nullptr, nullptr), call), out;
  dispatch_cuda(x.tensor, [&](auto type) {
    using T = decltype(type);
    ChannelBackward<PlainMemory, T> a{};
    a.weights = weights;
    a.activation = static_cast<int>(activation);
    a.x_stride_n = x.stride_n;
    a.grad = in<T>(g), a.x = in<T>(x.tensor), a.residual = in<T>(res);
    a.dx = data<T>(out.dx), a.dresidual = act ? data<T>(out.dresidual) : nullptr;
    a.hidden = in<float>(hidden), a.gate = in<float>(gate);
    const bool x_images = x.stride_n * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool aligned = is_aligned({a.grad, a.x, a.residual, a.dx, a.dresidual}) && x_images;
    const Plan p = plan_of(a, x, hidden_units, x.s.C * x.s.P, aligned, call);
    const int64_t dz = x.s.N * x.s.C, dhidden = x.s.N * hidden_units;
    Scratchpad scratch(x.tensor, dz + dhidden + p.workspace_words());
    a.dz = scratch.take(dz), a.dhidden = scratch.take(dhidden);
    const Sums sums = sums_of(x.s.N, a.dz, a.dhidden);
    if (p.one_launch) a.sums = sums;
    launch(name, channel_scale_for<decltype(a)>(p, x.nhwc), &a, p, scratch.take(p.workspace_words()), call);
    if (!p.one_launch) launch_batch_sums(name, sums, call);
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
  Tensor dw1 = empty_as(x, w1), db1 = empty_small(x, {R}), dw2 = empty_as(x, w2), db2 = empty_small(x, {C});
  const Backward out = backward(
      "se_bwd", grad, x, w, residual, hidden, gate, R, activation, [&](int64_t N, float* dz, float* dhidden) {
        return se_sums<PlainMemory>(N, static_cast<int>(C), static_cast<int>(R),
                                    static_cast<int>(hidden_activation), dz, dhidden, in<float>(mean),
                                    in<float>(hidden), data<float>(dw1), data<float>(db1), data<float>(dw2),
                                    data<float>(db2));
      });
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
  Tensor dweight = empty_as(x, weight);
  const Backward out =
      backward("eca_bwd", grad, x, w, residual, gate, gate, 0, activation, [&](int64_t N, float* dz, float*) {
        return eca_sums<PlainMemory>(N, static_cast<int>(x.size(1)), w.window, dz, in<float>(mean),
                                     data<float>(dweight));
      });
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
