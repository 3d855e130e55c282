// The resident kernels of gates that scale whole channels, SE and ECA: a team of thread blocks pools an
// image, computes its gates, and scales it while it still holds it. Forward reads x and writes y; backward
// reads grad and x and writes dx (with an activation also grad * act', which is dresidual). Written once, for
// the device and for the emulation.
#pragma once

#include "batch_sums.h"
#include "channel_gate.h"

namespace visattn::cuda {

template <class Memory, class T>
struct ChannelForward {
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
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;  // stride_n is that of grad, which is dense
  Scratch scratch;
  GateWeights<Memory> weights;
  int activation;
  int64_t x_stride_n;
  Global<const T> grad, x, residual;  // residual may be null, and is without an activation
  Global<T> dx, dresidual;            // dresidual is null without an activation
  Global<const float> hidden, gate;
  Global<float> dz, dhidden;  // [N, C], [N, R]: the gradients before both activations
  BatchSums<Memory> sums;     // of the same launch, or none
};

template <int kAccess, class T>
constexpr int kPack = kAccess == kNarrow ? 1 : kWide<T>;
// Rows of which packs would straddle two are summed one element at a time.
template <int kAccess, class T>
constexpr int kSumPack = kAccess == kWideRows ? kWide<T> : 1;

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
    channel_sums<S, 2, kNhwc>(
        ex, g, f, slabs.count(),
        [&](int offset, float (&v)[S]) {
          const Pack<T, S> x = get_pack<S>(slab, offset);
          VF_UNROLL
          for (int j = 0; j < S; ++j) v[j] = static_cast<float>(x.v[j]);
        },
        [&](int c, float sum) {
          put(f.mean_part, c - first_channel, sum / area);
          put(a.mean, n * g.C + c, sum / area);
        });
    gate_forward<kNhwc>(
        ex, g, f, a.weights, [&](int r, float v) { put(a.hidden, n * g.R + r, v); },
        [&](int c, float v) { put(a.gate, n * g.C + c, v); });
    const int64_t at = n * g.C * g.P + slabs.first();
#pragma unroll 2
    for (int i = ex.thread() * V; i < slabs.count(); i += ex.threads() * V) {
      const Pack<T, V> x = get_pack<V>(slab, i);
      Pack<T, V> more = {};
      if (a.residual) more = get_pack<V>(a.residual, at + i);
      Pack<T, V> y;
      for_channels<V, kNhwc, kAccess>(i, ex.rank() * g.slab, g.cols, [&](int j, int c) {
        float v = static_cast<float>(x.v[j]) * get(f.gate, c);
        if (a.residual) v += static_cast<float>(more.v[j]);
        y.v[j] = static_cast<T>(activate(v, a.activation));
      });
      put_map<true>(a.y, at + i, y);
    }
    slabs.release(turn);
  }
}

// grad * act'(x * gate + residual) of V elements, as T holds it; gated [V] is x * gate. at: in the maps.
template <int V, class T, class Args>
VF_DEVICE Pack<T, V> through_activation(const Args& a, Pack<T, V> grad, const float (&gated)[V], int64_t at) {
  Pack<T, V> more = {};
  if (a.residual) more = get_pack<V>(a.residual, at);
  VF_UNROLL
  for (int j = 0; j < V; ++j) {
    const float v = gated[j] + static_cast<float>(more.v[j]);
    grad.v[j] = static_cast<T>(activate_grad(static_cast<float>(grad.v[j]), v, a.activation));
  }
  return grad;
}

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void channel_backward(Exec& ex, const ChannelBackward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  const Geometry& g = a.geometry;
  const int row0 = ex.rank() * g.slab, first_channel = ex.rank() * g.channels;
  Slabs<Exec, T> slabs(ex, a.grad, g, g.stride_n);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const Floats<Exec> f(ex, g, a.scratch, turn);
    const int64_t at = n * g.C * g.P + slabs.first(), x_at = n * a.x_stride_n + slabs.first();
    for (int c = ex.thread(); c < g.C; c += ex.threads()) put(f.gate, c, get(a.gate, n * g.C + c));
    const auto slab = slabs.acquire(turn);
    ex.sync_block();
    const auto apply = [&](int i,
                           const auto& x) {  // grad * act' of a pack, which it leaves where upstream looks
      constexpr int W = sizeof(x) / sizeof(T);
      float gated[W];
      for_channels<W, kNhwc, kAccess>(
          i, row0, g.cols, [&](int j, int c) { gated[j] = static_cast<float>(x.v[j]) * get(f.gate, c); });
      const auto through = through_activation<W, T>(a, get_pack<W>(slab, i), gated, at + i);
      if constexpr (Exec::kResident) put_pack(slab, i, through);
      put_map<false>(a.dresidual, at + i, through);
      return through;
    };
    // Sums that see single elements come after a pass of wide stores.
    if (S != V && a.activation != kNone) {
#pragma unroll 1
      for (int i = ex.thread() * V; i < slabs.count(); i += ex.threads() * V)
        apply(i, get_pack<V>(a.x, x_at + i));
      ex.sync_block();
    }
    // What follows an activation is dresidual; it is at hand in the slab, or read back.
    const auto upstream = [&](int i, auto pack) {
      constexpr int W = decltype(pack)::value;
      if constexpr (!Exec::kResident) {
        if (a.activation != kNone) return get_pack<W>(a.dresidual, at + i);
      }
      return get_pack<W>(slab, i);
    };
    channel_sums<S, 2, kNhwc>(
        ex, g, f, slabs.count(),
        [&](int offset, float (&v)[S]) {
          const Pack<T, S> x = get_pack<S>(a.x, x_at + offset);
          const bool now = S == V && a.activation != kNone;
          const Pack<T, S> grad = now ? apply(offset, x) : upstream(offset, Constant<S>());
          VF_UNROLL
          for (int j = 0; j < S; ++j) v[j] = static_cast<float>(grad.v[j]) * static_cast<float>(x.v[j]);
        },
        [&](int c, float sum) {
          const float dz = gate_grad(sum, get(f.gate, c), a.weights.gate_activation);
          put(f.mean_part, c - first_channel, dz);
          put(a.dz, n * g.C + c, dz);
        });
    gate_backward<kNhwc>(
        ex, g, f, a.weights, [&](int r) { return get(a.hidden, n * g.R + r); },
        [&](int r, float v) { put(a.dhidden, n * g.R + r, v); });
#pragma unroll 2
    for (int i = ex.thread() * V; i < slabs.count(); i += ex.threads() * V) {
      const Pack<T, V> grad = upstream(i, Constant<V>());
      Pack<T, V> dx;
      for_channels<V, kNhwc, kAccess>(i, row0, g.cols, [&](int j, int c) {
        dx.v[j] = static_cast<T>(static_cast<float>(grad.v[j]) * get(f.gate, c) + get(f.mean, c));
      });
      put_map<true>(a.dx, at + i, dx);
    }
    slabs.release(turn);
  }
  if (a.sums.any()) sums_of_grid(ex, a.sums);
}

}  // namespace visattn::cuda
