// The emulation's entry point for tools/emulation.py: one call of SE, ECA or CBAM, forward or backward.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../../common/geometry.h"
#include "../../common/plan.h"
#include "../batch_sums.h"
#include "../cbam_backward.h"
#include "../cbam_forward.h"
#include "../cbam_image.h"
#include "../channel_gate.h"
#include "../channel_scale.h"
#include "../portable.h"
#include "exec.h"
#include "memory.h"

namespace visattn::cuda::emulation {
namespace {

// The arguments from Python; the tensors are those of the ops, null if absent.
struct Request {
  int64_t N, C, P, R, stride_n, dtype, nhwc, backward, window, activation, hidden_activation, gate_activation,
      sm, count, shared_bytes, l2_bytes, threads, seed, sabotage, W, maps_window;
  void *x, *grad, *residual, *w1, *b1, *w2, *b2, *wconv, *bias, *y, *dresidual, *mean, *hidden, *gate,
      *argmax_hw, *maps, *argmax_c, *spatial_gate, *dz, *dhidden, *dconv, *dw1, *db1, *dw2, *db2, *dwconv,
      *dbias;
};

struct Report {
  int64_t variant, access, team, teams, held, stages, one_launch;
  int64_t read, written;  // bytes of the large maps
  char faults[4000];
};

class Run {
 public:
  Run(const Request& request, const Plan& planned, Report& report)
      : q(request),
        p(planned),
        out(report),
        x_elements((q.N - 1) * q.stride_n + q.C * q.P),
        activation(static_cast<int>(q.activation)),
        C(static_cast<int>(q.C)),
        R(static_cast<int>(q.R)) {}

  template <class T>
  void channel_forward_of() {
    const ChannelForward<CheckedMemory, T> a{p.geometry,
                                             p.scratch,
                                             weights(),
                                             activation,
                                             map<const T>("x", q.x, x_elements),
                                             map<const T>("residual", q.residual),
                                             map<T>("y", q.y),
                                             result("mean", q.mean, q.N * C),
                                             result("hidden", q.hidden, q.N * R),
                                             result("gate", q.gate, q.N * C)};
    layouts<T>({}, [&](auto nhwc, auto access, auto& ex) {
      channel_forward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
    });
  }

  template <class T>
  void channel_backward_of() {
    ChannelBackward<CheckedMemory, T> a{p.geometry,
                                        p.scratch,
                                        weights(),
                                        activation,
                                        q.stride_n,
                                        map<const T>("grad", q.grad),
                                        map<const T>("x", q.x, x_elements),
                                        map<const T>("residual", q.residual),
                                        map<T>("dx", q.y),
                                        map<T>("dresidual", q.dresidual),
                                        given("hidden", q.hidden, q.N * R),
                                        given("gate", q.gate, q.N * C),
                                        result("dz", q.dz, q.N * C),
                                        result("dhidden", q.dhidden, q.N * R),
                                        {}};
    const auto mean = given("mean", q.mean, q.N * C);
    const auto sums =
        q.window ? eca_sums<CheckedMemory>(q.N, C, static_cast<int>(q.window), a.dz, mean,
                                           result("dw1", q.dw1, q.window))
                 : se_sums<CheckedMemory>(q.N, C, R, a.weights.hidden_activation, a.dz, a.dhidden, mean,
                                          a.hidden, result("dw1", q.dw1, C * R), result("db1", q.db1, R),
                                          result("dw2", q.dw2, C * R), result("db2", q.db2, C));
    if (p.one_launch) a.sums = sums;
    layouts<T>(sums, [&](auto nhwc, auto access, auto& ex) {
      channel_backward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
    });
  }

  template <class T>
  void cbam_forward_of() {
    const CbamForward<CheckedMemory, T> a{p.geometry,
                                          p.scratch,
                                          weights(),
                                          weight("wconv", q.wconv, 2 * q.maps_window * q.maps_window),
                                          weight("bias", q.bias, 1),
                                          activation,
                                          map<const T>("x", q.x, x_elements),
                                          map<const T>("residual", q.residual),
                                          map<T>("y", q.y),
                                          result("pooled", q.mean, q.N * 2 * C),
                                          result("hidden", q.hidden, q.N * 2 * R),
                                          result("channel_gate", q.gate, q.N * C),
                                          result("maps", q.maps, q.N * 2 * q.P),
                                          result("spatial_gate", q.spatial_gate, q.N * q.P),
                                          region("argmax_hw", q.argmax_hw, q.N * C * 4, false),
                                          region("argmax_c", q.argmax_c, q.N * q.P * 4, false)};
    layouts<T>({}, [&](auto nhwc, auto access, auto& ex) {
      cbam_forward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
    });
  }

  template <class T>
  void cbam_backward_of() {
    const int window = static_cast<int>(q.maps_window), taps = 2 * window * window;
    CbamBackward<CheckedMemory, T> a{p.geometry,
                                     p.scratch,
                                     weights(),
                                     weight("wconv", q.wconv, taps),
                                     activation,
                                     map<const T>("grad", q.grad),
                                     map<const T>("x", q.x, x_elements),
                                     map<const T>("residual", q.residual),
                                     map<T>("dx", q.y),
                                     map<T>("dresidual", q.dresidual),
                                     given("hidden", q.hidden, q.N * 2 * R),
                                     given("channel_gate", q.gate, q.N * C),
                                     given("maps", q.maps, q.N * 2 * q.P),
                                     given("spatial_gate", q.spatial_gate, q.N * q.P),
                                     region("argmax_hw", q.argmax_hw, q.N * C * 4, true),
                                     region("argmax_c", q.argmax_c, q.N * q.P * 4, true),
                                     result("dz", q.dz, q.N * C),
                                     result("dhidden", q.dhidden, q.N * 2 * R),
                                     result("dconv", q.dconv, q.N * (taps + 1)),
                                     {}};
    const auto sums = cbam_sums<CheckedMemory>(q.N, C, R, window, a.dz, a.dhidden, a.dconv,
                                               given("pooled", q.mean, q.N * 2 * C), a.hidden,
                                               result("dw1", q.dw1, C * R), result("dw2", q.dw2, C * R),
                                               result("dwconv", q.dwconv, taps), result("dbias", q.dbias, 1));
    if (p.one_launch) a.sums = sums;
    layouts<T>(sums, [&](auto nhwc, auto access, auto& ex) {
      cbam_backward<decltype(nhwc)::value, decltype(access)::value, T>(ex, a);
    });
  }

 private:
  using Sums = BatchSums<CheckedMemory>;

  template <class T, class F>
  void layouts(const Sums& sums, const F& f) {
    q.nhwc ? accesses<T>(std::true_type{}, sums, f) : accesses<T>(std::false_type{}, sums, f);
  }

  template <class T, class Layout, class F>
  void accesses(Layout layout, const Sums& sums, const F& f) {
    if (p.access == kWideRows) return variants(layout, Constant<kWideRows>{}, sums, f);
    if constexpr (sizeof(T) == 2) {
      if (p.access == kRagged) return variants(layout, Constant<kRagged>{}, sums, f);
      return variants(layout, Constant<kNarrow>{}, sums, f);
    }
    snprintf(out.faults, sizeof(out.faults),
             "only two-byte elements are emulated in rows that are not aligned");
  }

  template <class Layout, class AccessKind, class F>
  void variants(Layout layout, AccessKind access, const Sums& sums, const F& f) {
    Grid grid(p, static_cast<uint64_t>(q.seed), static_cast<Sabotage>(q.sabotage));
    const auto body = [&](auto& ex) { f(layout, access, ex); };
    if constexpr (AccessKind::value != kNarrow) {
      if (p.variant == kCluster) launch<true>(grid, body);
    }
    if (p.variant == kSemaphore) launch<false>(grid, body);
    grid.check_end();
    auto& faults = grid.scheduler.faults;
    if (sums.any() && !p.one_launch && faults.empty()) second_launch(sums, faults);
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

  // The sums over the batch, after the whole first launch.
  void second_launch(const Sums& sums, std::vector<std::string>& faults) {
    for (const auto& r : regions) {
      for (Cell& c : r->cells) c.writer = c.reader = {};
    }
    Plan second;
    second.geometry.held = 0;
    second.threads = p.threads, second.teams = second.blocks = 3;
    second.shared_bytes = kHeader + 4 * p.threads;
    Grid grid(second, static_cast<uint64_t>(q.seed), kNothing);
    launch<true>(grid, [&](auto& ex) {
      batch_sums(ex, ex.team(), ex.teams(), sums, ex.template shared<float>(kHeader));
    });
    faults.insert(faults.end(), grid.scheduler.faults.begin(), grid.scheduler.faults.end());
  }

  Region* region(const char* name, void* at, int64_t bytes, bool input) {
    if (!at) return nullptr;
    return regions.emplace_back(new Region(name, at, bytes, input, !input)).get();
  }
  // A map of x's size, unless `elements` gives another one.
  template <class T>
  Checked<T> map(const char* name, void* at, int64_t elements = 0) {
    const int64_t count = elements ? elements : q.N * q.C * q.P;
    Region* r = region(name, at, count * int64_t{sizeof(T)}, std::is_const_v<T>);
    if (r) larges.push_back(r);
    return r;
  }
  Checked<float> given(const char* name, void* at, int64_t count) {
    return region(name, at, count * 4, true);
  }
  Checked<float> result(const char* name, void* at, int64_t count) {
    return region(name, at, count * 4, false);
  }
  Weight<CheckedMemory> weight(const char* name, void* at, int64_t count) {
    return {region(name, at, count * 4, true), kFloatWeight};
  }
  GateWeights<CheckedMemory> weights() {
    return {weight("w1", q.w1, q.window ? q.window : q.C * q.R),
            weight("b1", q.b1, q.R),
            weight("w2", q.w2, q.C * q.R),
            weight("b2", q.b2, q.C),
            static_cast<int>(q.window),
            static_cast<int>(q.hidden_activation),
            static_cast<int>(q.gate_activation)};
  }

  const Request& q;
  const Plan& p;
  Report& out;
  const int64_t x_elements;
  const int activation, C, R;
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<Region*> larges;
};

template <class T>
void run(const Request& q, const Plan& p, Report& out) {
  Run call(q, p, out);
  if (q.maps_window) return q.backward ? call.cbam_backward_of<T>() : call.cbam_forward_of<T>();
  q.backward ? call.channel_backward_of<T>() : call.channel_forward_of<T>();
}

}  // namespace

extern "C" int emulate_call(const Request* q, Report* out) {
  *out = {};
  const int element = q->dtype == kFloatWeight ? 4 : 2;
  bool aligned = q->stride_n * element % 16 == 0;
  for (const void* at : {q->x, q->grad, q->residual, q->y, q->dresidual}) {
    aligned &= reinterpret_cast<uintptr_t>(at) % 16 == 0;
  }
  const Device device{static_cast<int>(q->sm), static_cast<int>(q->count), static_cast<int>(q->shared_bytes),
                      q->l2_bytes};
  const bool grad_first = q->backward && !q->maps_window;  // the map that is held first
  const Plan p = plan({q->N, q->C, q->P, q->R, grad_first ? q->C * q->P : q->stride_n, element, q->nhwc != 0,
                       aligned, q->backward != 0, static_cast<int>(q->W), static_cast<int>(q->maps_window),
                       static_cast<int>(q->threads)},
                      device);
  out->variant = p.variant, out->access = p.access, out->team = p.geometry.team, out->teams = p.teams;
  out->held = p.geometry.held, out->stages = p.geometry.stages, out->one_launch = p.one_launch;
  if (p.variant == kRefused) return 1;
  q->dtype == kFloatWeight ? run<float>(*q, p, *out) : run<BFloat16>(*q, p, *out);
  return 0;
}

}  // namespace visattn::cuda::emulation
