// The resident kernels of gates that scale whole channels, SE and ECA: a team of thread blocks pools an
// image, computes its gates, and scales it while it still holds it. Forward reads x and writes y. Backward
// reads grad and x and writes dx, and with an activation also grad * act', which is dresidual. The code is
// the same on the device and in the emulation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "../common/scratch.h"
#include "batch_sums.h"
#include "channel_gate.h"
#include "gate_math.h"
#include "portable.h"
#include "reduce.h"
#include "team.h"
#include "walk.h"

namespace visattn::cuda {

template <class Memory, class T>
struct ChannelForward {
  using Element = T;
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;
  Scratch scratch;
  GateWeights<Memory> weights;
  int activation;
  Global<const T> x, residual;  // residual may be null
  Global<T> y;
  Global<float> mean, hidden, gate;  // [N, C], [N, R], [N, C]; hidden is null in ECA
};

template <class Memory, class T>
struct ChannelBackward {
  using Element = T;
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;  // stride_n is that of grad, which is dense
  Scratch scratch;
  GateWeights<Memory> weights;
  int activation;
  int64_t x_stride_n;
  Global<const T> grad, x, residual;  // residual may be null, and is null without an activation
  Global<T> dx, dresidual;            // dresidual is null without an activation
  Global<const float> hidden, gate;
  Global<float> dz, dhidden;  // [N, C], [N, R]: the gradients before both activations
  BatchSums<Memory> sums;     // of the same launch, or none
};

template <int kAccess, class T>
constexpr int kPack = kAccess == kNarrow ? 1 : kWide<T>;
// If packs would straddle two rows, sums take one element at a time.
template <int kAccess, class T>
constexpr int kSumPack = kAccess == kWideRows ? kWide<T> : 1;

struct Nothing {};

// Calls f with the condition as a compile-time constant, so that f's loops do not test it again.
template <class F>
VF_DEVICE void decided(bool condition, const F& f) {
  condition ? f(std::true_type{}) : f(std::false_type{});
}

// y = act(x * gate + residual) of V elements, from v = x * gate; with kPlain y = v. at: the index in the
// maps.
template <bool kPlain, int V, class Args>
VF_DEVICE void put_result(const Args& a, int64_t at, float (&v)[V]) {
  using T = std::remove_cvref_t<decltype(get(a.y, 0))>;
  if constexpr (!kPlain) {
    if (a.residual) {
      float more[V];
      to_floats(get_map<V>(a.residual, at), more);
      VF_UNROLL
      for (int j = 0; j < V; ++j) v[j] += more[j];
    }
    activate(v, a.activation);
  }
  put_map<true>(a.y, at, of_floats<T>(v));
}

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void channel_forward(Exec& ex, const ChannelForward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  const Geometry& g = a.geometry;
  Slabs<Exec, T> slabs(ex, a.x, g, g.stride_n);
  const float area = static_cast<float>(g.P);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const Floats<Exec> f(ex, g, a.scratch, turn);
    const auto slab = slabs.acquire(turn);
    const int first_channel = ex.rank() * g.channels;
    channel_sums<S, 4, kNhwc>(
        ex, g, f, slabs.count(), [](int) { return Nothing{}; },
        [&](Nothing, int offset, float (&v)[S]) { to_floats(get_pack<S>(slab, offset), v); },
        [&](int c, float sum) {
          put(f.mean, c, sum / area);
          if (a.weights.window) put(f.mean_part, c - first_channel, sum / area);
          put(a.mean, n * g.C + c, sum / area);
        });
    gate_forward<kNhwc>(
        ex, g, f, a.weights, [&](int r, float v) { put(a.hidden, n * g.R + r, v); },
        [&](int c, float v) { put(a.gate, n * g.C + c, v); });
    const int64_t at = n * g.C * g.P + slabs.first();
    const typename Floats<Exec>::Shared gates[] = {f.gate};
    decided(a.activation == kNone && !a.residual, [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      for_scaled<V, 4, kNhwc, kAccess>(ex, g, slabs.count(), gates, [&](int i, const auto& gate) {
        float v[V];
        to_floats(get_pack<V>(slab, i), v);
        VF_UNROLL
        for (int j = 0; j < V; ++j) v[j] *= gate(0, j);
        put_result<kPlain>(a, at + i, v);
      });
    });
    slabs.release(turn);
  }
}

// grad * act'(x * gate + residual) of V elements, as T holds it. gated [V] is x * gate; at: the index in the
// maps.
template <int V, class T, class Args>
VF_DEVICE Pack<T, V> through_activation(const Args& a, const Pack<T, V>& grad, float (&gated)[V],
                                        int64_t at) {
  if (a.residual) {
    float more[V];
    to_floats(get_map<V>(a.residual, at), more);
    VF_UNROLL
    for (int j = 0; j < V; ++j) gated[j] += more[j];
  }
  float g[V];
  to_floats(grad, g);
  activate_grad(g, gated, a.activation);
  return of_floats<T>(g);
}

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void channel_backward(Exec& ex, const ChannelBackward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  const Geometry& g = a.geometry;
  const int first_channel = ex.rank() * g.channels;
  Slabs<Exec, T> slabs(ex, a.grad, g, g.stride_n);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const Floats<Exec> f(ex, g, a.scratch, turn);
    const int64_t at = n * g.C * g.P + slabs.first();
    const auto x_map = a.x + (n * a.x_stride_n + slabs.first());
    const typename Floats<Exec>::Shared gates[] = {f.gate}, slopes[] = {f.gate, f.mean};
    for (int c = ex.thread(); c < g.C; c += ex.threads()) put(f.gate, c, get(a.gate, n * g.C + c));
    const auto slab = slabs.acquire(turn);
    ex.sync_block();
    // grad * act' of a pack, which it stores where upstream reads it.
    const auto apply = [&](int i, const auto& x, const auto& gate) {
      constexpr int W = sizeof(x) / sizeof(T);
      float gated[W];
      to_floats(x, gated);
      VF_UNROLL
      for (int j = 0; j < W; ++j) gated[j] *= gate(0, j);
      const auto through = through_activation<W, T>(a, get_pack<W>(slab, i), gated, at + i);
      if constexpr (Exec::kResident) put_pack(slab, i, through);
      put_map<false>(a.dresidual, at + i, through);
      return through;
    };
    // Sums over single elements follow a pass of wide stores.
    if constexpr (S != V) {
      if (a.activation != kNone) {
        for_scaled<V, 1, kNhwc, kAccess>(ex, g, slabs.count(), gates, [&](int i, const auto& gate) {
          apply(i, get_pack<V>(x_map, i), gate);
        });
        ex.sync_block();
      }
    }
    // With an activation, upstream is dresidual: still in the slab, or read back.
    const auto upstream = [&](int i, auto pack) {
      constexpr int W = decltype(pack)::value;
      if constexpr (!Exec::kResident) {
        if (a.activation != kNone) return get_pack<W>(a.dresidual, at + i);
      }
      return get_pack<W>(slab, i);
    };
    const auto keep = [&](int c, float sum) {
      const float dz = gate_grad(sum, get(f.gate, c), a.weights.gate_activation);
      put(f.mean, c, dz);
      if (a.weights.window) put(f.mean_part, c - first_channel, dz);
      put(a.dz, n * g.C + c, dz);
    };
    const auto product = [&](const Pack<T, S>& x, const Pack<T, S>& grad, float (&v)[S]) {
      float xs[S];
      to_floats(grad, v);
      to_floats(x, xs);
      VF_UNROLL
      for (int j = 0; j < S; ++j) v[j] *= xs[j];
    };
    if (S == V && a.activation != kNone) {
      channel_sums<S, 1, kNhwc>(
          ex, g, f, slabs.count(), [&](int c) { return coefficients<kNhwc ? S : 1>(gates, c); },
          [&](const Coefficients<1, kNhwc ? S : 1>& gate, int i, float (&v)[S]) {
            const Pack<T, S> x = get_map<S>(x_map, i);
            product(x, apply(i, x, gate), v);
          },
          keep);
    } else {
      channel_sums<S, 4, kNhwc>(
          ex, g, f, slabs.count(), [](int) { return Nothing{}; },
          [&](Nothing, int i, float (&v)[S]) {
            product(get_map<S>(x_map, i), upstream(i, Constant<S>()), v);
          },
          keep);
    }
    gate_backward<kNhwc>(
        ex, g, f, a.weights, [&](int r) { return get(a.hidden, n * g.R + r); },
        [&](int r, float v) { put(a.dhidden, n * g.R + r, v); });
    for_scaled<V, 4, kNhwc, kAccess>(ex, g, slabs.count(), slopes, [&](int i, const auto& slope) {
      float v[V];
      to_floats(upstream(i, Constant<V>()), v);
      VF_UNROLL
      for (int j = 0; j < V; ++j) v[j] = v[j] * slope(0, j) + slope(1, j);
      put_map<true>(a.dx, at + i, of_floats<T>(v));
    });
    slabs.release(turn);
  }
  if (a.sums.any()) sums_of_grid(ex, a.sums);
}

}  // namespace visattn::cuda
