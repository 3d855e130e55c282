// The emulation's entry points, called from tools/emulation.py: one call of SE or ECA forward or backward.
#include <cstdio>

#include "../cbam.h"
#include "exec.h"

namespace visattn::cuda::emulation {
namespace {

// What Python passes; the tensors are those of the ops, null where there is none.
struct Request {
  int64_t N, C, P, R, stride_n, dtype, nhwc, backward, window, activation, hidden_activation, gate_activation,
      sm, count, shared_bytes, l2_bytes, threads, seed, sabotage, W, maps_window;
  void *x, *grad, *residual, *w1, *b1, *w2, *b2, *y, *dresidual, *mean, *hidden, *gate, *dz, *dhidden, *wconv,
      *argmax_hw, *maps, *argmax_c, *spatial_gate;
};

struct Report {
  int64_t variant, access, team, teams, stages, read, written;  // read and written: bytes of the large maps
  char faults[4000];
};

class Run {
 public:
  Run(const Request& request, const Plan& planned, Report& report) : q(request), p(planned), out(report) {}

  template <class T>
  void channel_scale() {
    const int64_t maps = q.N * q.C * q.P * int64_t{sizeof(T)};
    const int64_t strided = (q.N ? (q.N - 1) * q.stride_n + q.C * q.P : 0) * int64_t{sizeof(T)};
    const auto x = large<const T>("x", q.x, strided, true),
               residual = large<const T>("residual", q.residual, maps, true);
    const GateWeights<CheckedMemory> weights{weight("w1", q.w1, q.window ? q.window : q.C * q.R),
                                             weight("b1", q.b1, q.R),
                                             weight("w2", q.w2, q.C * q.R),
                                             weight("b2", q.b2, q.C),
                                             static_cast<int>(q.window),
                                             static_cast<int>(q.hidden_activation),
                                             static_cast<int>(q.gate_activation)};
    const int activation = static_cast<int>(q.activation);
    if (!q.backward) {
      const ChannelForward<CheckedMemory, T> a{p.geometry,
                                               p.scratch,
                                               weights,
                                               activation,
                                               x,
                                               residual,
                                               large<T>("y", q.y, maps, false),
                                               small("mean", q.mean, q.C, false),
                                               small("hidden", q.hidden, q.R, false),
                                               small("gate", q.gate, q.C, false)};
      layouts<T>([&](auto nhwc, auto access, auto& ex) {
        channel_forward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
      });
    } else {
      const auto grad = large<const T>("grad", q.grad, maps, true);
      const ChannelBackward<CheckedMemory, T> a{p.geometry,
                                                p.scratch,
                                                weights,
                                                activation,
                                                q.stride_n,
                                                grad,
                                                x,
                                                residual,
                                                large<T>("dx", q.y, maps, false),
                                                large<T>("dresidual", q.dresidual, maps, false),
                                                small("hidden", q.hidden, q.R, true),
                                                small("gate", q.gate, q.C, true),
                                                small("dz", q.dz, q.C, false),
                                                small("dhidden", q.dhidden, q.R, false)};
      layouts<T>([&](auto nhwc, auto access, auto& ex) {
        channel_backward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
      });
    }
  }

  template <class T>
  void cbam() {
    const int64_t maps = q.N * q.C * q.P * int64_t{sizeof(T)};
    const int64_t strided = (q.N ? (q.N - 1) * q.stride_n + q.C * q.P : 0) * int64_t{sizeof(T)};
    const CbamForward<CheckedMemory, T> a{
        p.geometry,
        p.scratch,
        {weight("w1", q.w1, q.C * q.R), {}, weight("w2", q.w2, q.C * q.R), {}, 0, kRelu, kSigmoid},
        weight("wconv", q.wconv, 2 * q.maps_window * q.maps_window),
        static_cast<int>(q.activation),
        large<const T>("x", q.x, strided, true),
        large<const T>("residual", q.residual, maps, true),
        large<T>("y", q.y, maps, false),
        small("pooled", q.mean, 2 * q.C, false),
        small("hidden", q.hidden, 2 * q.R, false),
        small("channel_gate", q.gate, q.C, false),
        small("maps", q.maps, 2 * q.P, false),
        small("spatial_gate", q.spatial_gate, q.P, false),
        region("argmax_hw", q.argmax_hw, q.N * q.C * 4, false),
        region("argmax_c", q.argmax_c, q.N * q.P * 4, false)};
    layouts<T>([&](auto nhwc, auto access, auto& ex) {
      cbam_forward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
    });
  }

 private:
  template <class T, class F>
  void layouts(const F& f) {
    q.nhwc ? accesses<T>(std::true_type{}, f) : accesses<T>(std::false_type{}, f);
  }

  template <class T, class Layout, class F>
  void accesses(Layout layout, const F& f) {
    if (p.access == kWideRows) return variants(layout, Constant<kWideRows>{}, f);
    if constexpr (sizeof(T) == 2) {
      if (p.access == kRagged) return variants(layout, Constant<kRagged>{}, f);
      return variants(layout, Constant<kNarrow>{}, f);
    }
    snprintf(out.faults, sizeof(out.faults),
             "only two-byte elements are emulated in rows that are not aligned");
  }

  template <class Layout, class AccessKind, class F>
  void variants(Layout layout, AccessKind access, const F& f) {
    Grid grid(p, static_cast<uint64_t>(q.seed), static_cast<Sabotage>(q.sabotage));
    const auto body = [&](auto& ex) { f(layout, access, ex); };
    if constexpr (AccessKind::value != kNarrow) {
      if (p.variant == kCluster) launch<true>(grid, body);
    }
    if (p.variant == kSemaphore) launch<false>(grid, body);
    grid.check_end();
    auto& faults = grid.scheduler.faults;
    for (const auto& r : regions) {
      const bool whole =
          std::all_of(r->cells.begin(), r->cells.end(), [](const Cell& c) { return c.written; });
      if (r->once && !whole) faults.push_back(r->name + " was not written everywhere");
    }
    for (const Region* r : larges) out.read += r->read, out.written += r->written;
    std::string all;
    for (const auto& fault : faults) all += fault + "\n";
    snprintf(out.faults, sizeof(out.faults), "%s", all.c_str());
  }

  Region* region(const char* name, void* at, int64_t bytes, bool input) {
    if (!at) return nullptr;
    return regions.emplace_back(new Region(name, at, bytes, input, !input)).get();
  }
  template <class T>
  Checked<T> large(const char* name, void* at, int64_t bytes, bool input) {
    Region* r = region(name, at, bytes, input);
    if (r) larges.push_back(r);
    return r;
  }
  Checked<float> small(const char* name, void* at, int64_t width, bool input) {
    return region(name, at, q.N * width * 4, input);
  }
  Weight<CheckedMemory> weight(const char* name, void* at, int64_t count) {
    return {region(name, at, count * 4, true), kFloatWeight};
  }

  const Request& q;
  const Plan& p;
  Report& out;
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<Region*> larges;
};

}  // namespace

extern "C" int emulate_channel_scale(const Request* q, Report* out) {
  *out = {};
  const int element = q->dtype == kFloatWeight ? 4 : 2;
  bool aligned = true;
  for (const void* at : {q->x, q->grad, q->residual, q->y, q->dresidual}) {
    aligned &= reinterpret_cast<uintptr_t>(at) % 16 == 0;
  }
  const Device device{static_cast<int>(q->sm), static_cast<int>(q->count), static_cast<int>(q->shared_bytes),
                      q->l2_bytes};
  const int64_t stride = q->backward ? q->C * q->P : q->stride_n;
  const bool x_fits = q->stride_n * element % 16 == 0;
  const Plan p = plan(q->N, q->C, q->P, q->R, stride, element, q->nhwc, aligned && x_fits, device,
                      static_cast<int>(q->threads), static_cast<int>(q->W), static_cast<int>(q->maps_window));
  out->variant = p.variant, out->access = p.access, out->team = p.geometry.team, out->teams = p.teams;
  out->stages = p.geometry.stages;
  if (p.variant == kRefused) return 1;
  Run run(*q, p, *out);
  if (q->maps_window) {
    q->dtype == kFloatWeight ? run.cbam<float>() : run.cbam<BFloat16>();
    return 0;
  }
  q->dtype == kFloatWeight ? run.channel_scale<float>() : run.channel_scale<BFloat16>();
  return 0;
}

}  // namespace visattn::cuda::emulation
