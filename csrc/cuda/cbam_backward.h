// CBAM backward, resident: reads x and grad and writes dx (with an activation also grad * act', which is
// dresidual). With s_c and s_p the gates of a channel and of a pixel, and g = grad * act':
//   dq[p] = s_p (1 - s_p) sum_c g x s_c             whose transposed convolution gives the maps' gradients
//   du = g s_p + dmean[p] + [argmax_c[p] == c] dmax[p]
//   dz[c] = s_c (1 - s_c) sum_p du x                which the MLP takes to those of the pooled values
//   dx = du s_c + dpooled_mean[c] + [argmax_hw[c] == p] dpooled_max[c]
// g and x meet once, in one pass that sums both ways; du is never stored.
#pragma once

#include "cbam_conv.h"
#include "channel_scale.h"
#include "stats.h"
#include "tiles.h"

namespace visattn::cuda {

template <class Memory, class T>
struct CbamBackward {
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;  // stride_n is that of x; the rest is dense
  Scratch scratch;
  GateWeights<Memory> weights;  // without biases
  Weight<Memory> wconv;
  int activation;
  Global<const T> grad, x, residual;  // residual may be null, and is without an activation
  Global<T> dx, dresidual;            // dresidual is null without an activation
  Global<const float> hidden, channel_gate, maps, spatial_gate;  // as forward left them
  Global<const int> argmax_hw, argmax_c;
  Global<float> dz, dhidden, dconv;  // [N, C], [N, 2, R], [N, 2 window^2 + 1]: the last is dq's sum
  BatchSums<Memory> sums;            // of the same launch, or none
};

// What a pixel gives dx of all its channels, or a channel of all its pixels: the gate, the gradients of the
// mean and of the maximum, and where that was.
struct Side {
  float gate, mean, peak;
  int at;
};

VF_DEVICE float input_grad(float g, const Side& pixel, const Side& channel, int p, int c) {
  const float du = g * pixel.gate + pixel.mean + (pixel.at == c ? pixel.peak : 0.0f);
  return du * channel.gate + channel.mean + (channel.at == p ? channel.peak : 0.0f);
}

// One thread's view of one image: the rows' data are in shared memory, those of columns come from where they
// are once for all rows.
template <bool kNhwc, int kAccess, class T, class Exec>
struct CbamImage {
  static constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  using Args = CbamBackward<typename Exec::Memory, T>;
  template <class U>
  using Global = typename Exec::Memory::template Global<U>;

  Exec& ex;
  const Args& a;
  const CbamFloats<Exec>& f;
  const Geometry g;
  int row0, rows;
  int64_t n, at;  // the image; where the block's part of it begins in the dense maps
  Part channels, pixels;

  VF_DEVICE CbamImage(Exec& exec, const Args& args, const CbamFloats<Exec>& floats, int64_t image, int count,
                      int64_t first)
      : ex(exec),
        a(args),
        f(floats),
        g(of_one_image(args.geometry)),
        row0(exec.rank() * g.slab),
        rows(count / g.cols),
        n(image),
        at(image * g.C * g.P + first),
        channels(exec.rank(), g.channels, g.C),
        pixels(exec.rank(), g.pixels, g.P) {}

  VF_DEVICE int channel_of(int row, int column) const { return kNhwc ? column : row0 + row; }
  VF_DEVICE int pixel_of(int row, int column) const { return kNhwc ? row0 + row : column; }

  // The gates, and where the maxima were.
  VF_DEVICE void load() const {
#pragma unroll 1
    for (int c = ex.thread(); c < g.C; c += ex.threads()) {
      put(f.gate, c, get(a.channel_gate, n * g.C + c));
      put(f.at_channel, c, bits_of(get(a.argmax_hw, n * g.C + c)));
    }
    if constexpr (kNhwc) {
#pragma unroll 1
      for (int p = ex.thread(); p < rows; p += ex.threads()) {
        put(f.spatial, p, get(a.spatial_gate, n * g.P + row0 + p));
        put(f.at_pixel, p, bits_of(get(a.argmax_c, n * g.P + row0 + p)));
      }
    }
  }

  VF_DEVICE float pixel_gate(int p) const {
    return kNhwc ? get(f.spatial, p - row0) : get(a.spatial_gate, n * g.P + p);
  }
  // Of a pixel's maps: the gradient of the mean, and of the maximum.
  VF_DEVICE float map_grad(int which, int p) const {
    if constexpr (kNhwc) {
      return get(f.map_grad, which * g.slab + p - row0);
    } else {
      return get(ex.peer(f.grad_part, p / g.pixels), which * g.pixels + p % g.pixels);
    }
  }
  VF_DEVICE Side pixel(int p) const {
    const int at = kNhwc ? index_of(get(f.at_pixel, p - row0)) : get(a.argmax_c, n * g.P + p);
    return {pixel_gate(p), map_grad(0, p), map_grad(1, p), at};
  }
  VF_DEVICE Side channel(int c) const {
    return {get(f.gate, c), get(f.mean, c), get(f.maximum, c), index_of(get(f.at_channel, c))};
  }

  // Pass 1: f.map_part, dq of the block's pixels. What g gives each channel is left in f.direct in nchw, and
  // in f.sums in nhwc, of the block's pixels alone. upstream(offset, x) is g.
  template <class X, class Upstream>
  VF_DEVICE void sum_both_ways(X x, const Upstream& upstream) const {
    cross_sums<S, true, true>(
        ex, rows, g.cols, f.partial,
        [&](int column) {
          Lanes<float> gates = {};
          VF_UNROLL
          for (int j = 0; j < S && column >= 0; ++j) {
            gates.v[j] = kNhwc ? get(f.gate, column + j) : pixel_gate(column + j);
          }
          return gates;
        },
        [&](int row, int column, const Lanes<float>& gates, float& along, float (&down)[S]) {
          const int offset = row * g.cols + column;
          const float gate = kNhwc ? get(f.spatial, row) : get(f.gate, row0 + row);
          const Pack<T, S> xs = get_pack<S>(x, offset);
          const Pack<T, S> gs = upstream(offset, xs, gate, gates.v);
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            const float product = static_cast<float>(gs.v[j]) * static_cast<float>(xs.v[j]);
            along += product * gates.v[j];
            down[j] += product * gate;
          }
        },
        [&](int row, float sum) {
          if constexpr (kNhwc) {
            put(f.map_part, row, gate_grad(sum, get(f.spatial, row), kSigmoid));
          } else {
            put(f.direct, row, sum);
          }
        },
        [&](int column, float sum) { put(f.sums, column, sum); });
    if constexpr (!kNhwc) {
      ex.sync_team();
#pragma unroll 1
      for (int p = pixels.begin + ex.thread(); p < pixels.end; p += ex.threads()) {
        put(f.map_part, p - pixels.begin, gate_grad(over_team(f.sums, p), pixel_gate(p), kSigmoid));
      }
    }
  }

  VF_DEVICE float over_team(typename Exec::Exchange part, int i) const {
    float total = get(ex.peer(part, 0), i);
#pragma unroll 1
    for (int r = 1; r < ex.team_size(); ++r) total += get(ex.peer(part, r), i);
    return total;
  }

  // The maps' gradients, in f.map_grad of the block in nhwc and f.grad_part of every block in nchw, and the
  // block's share of the weight's in f.conv_part.
  VF_DEVICE void convolution() const {
    const Halo halo(pixels, g);
    ex.sync_team();
    gather_halo(ex, g, halo, 1, f.map_part, f.halo);
    conv_weight_grads(ex, g, pixels, halo, f.halo, a.maps + 2 * n * g.P,
                      [&](int e, float sum) { put(f.conv_part, e, sum); });
    const float channels_of = static_cast<float>(g.C);
#pragma unroll 1
    for (int p = pixels.begin + ex.thread(); p < pixels.end; p += ex.threads()) {
      const int i = p - pixels.begin;
      const float mean = convolve<-1>(g, halo, f.halo, a.wconv, 0, p, 0.0f) / channels_of;
      const float peak = convolve<-1>(g, halo, f.halo, a.wconv, 1, p, 0.0f);
      if constexpr (kNhwc) {
        put(f.map_grad, i, mean);
        put(f.map_grad, g.slab + i, peak);
      } else {
        put(f.grad_part, i, mean);
        put(f.grad_part, g.pixels + i, peak);
      }
    }
    if constexpr (kNhwc) {
      ex.sync_block();
    } else {
      ex.sync_team();
    }
  }

  // Pass 2: what the maps give each channel, and with it f.mean_part, dz of the block's channels.
  template <class X>
  VF_DEVICE void sum_through_maps(X x) const {
    const auto keep = [&](int c, float dgate) {
      const float dz = gate_grad(dgate, get(f.gate, c), kSigmoid);
      put(f.mean_part, c - channels.begin, dz);
      put(a.dz, n * g.C + c, dz);
    };
    cross_sums<S, !kNhwc, kNhwc>(
        ex, rows, g.cols, f.partial,
        [&](int column) {
          Lanes<MapGrad> grads = {};
          if constexpr (!kNhwc) {
            VF_UNROLL
            for (int j = 0; j < S && column >= 0; ++j) grads.v[j] = map_grads(column + j);
          }
          return grads;
        },
        [&](int row, int column, const Lanes<MapGrad>& grads, float& along, float (&down)[S]) {
          const Pack<T, S> xs = get_pack<S>(x, row * g.cols + column);
          const MapGrad own = kNhwc ? map_grads(row0 + row) : MapGrad{};
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            const MapGrad& d = kNhwc ? own : grads.v[j];
            const float du = d.mean + (d.at == (kNhwc ? column + j : row0 + row) ? d.peak : 0.0f);
            (kNhwc ? down[j] : along) += static_cast<float>(xs.v[j]) * du;
          }
        },
        [&](int row, float sum) { keep(row0 + row, get(f.direct, row) + sum); },
        [&](int c, float sum) { put(f.sums, c, get(f.sums, c) + sum); });
    if constexpr (kNhwc) {
      ex.sync_team();
#pragma unroll 1
      for (int c = channels.begin + ex.thread(); c < channels.end; c += ex.threads()) {
        keep(c, over_team(f.sums, c));
      }
    }
  }

  // f.mean_part of every block -> f.mean and f.maximum: the gradients of the pooled values that dx needs.
  VF_DEVICE void perceptron() const {
    const Part units(ex.rank(), g.hidden, g.R);
    const float area = static_cast<float>(g.P);
    ex.sync_team();
    const int elements = 2 * g.window * g.window + 1;
#pragma unroll 1
    for (int e = ex.rank() * ex.threads() + ex.thread(); e < elements; e += ex.team_size() * ex.threads()) {
      put(a.dconv, n * elements + e, over_team(f.conv_part, e));
    }
    gather(ex, f.mean_part, g.channels, g.C, f.mean);
    product_transposed(ex, a.weights.w2, units.begin, units.end, g.C, g.R, f.mean, f.partial,
                       [&](int r, float sum) {
                         for (int branch = 0; branch < 2; ++branch) {
                           const int64_t i = (2 * n + branch) * g.R + r;
                           const float d = activate_grad(sum, get(a.hidden, i), kRelu);
                           put(a.dhidden, i, d);
                           put(f.hidden_part, branch * g.hidden + r - units.begin, d);
                         }
                       });
    ex.sync_team();
    for (int branch = 0; branch < 2; ++branch) {
      gather(ex, f.hidden_part + branch * g.hidden, g.hidden, g.R, f.hidden + branch * g.R);
    }
#pragma unroll 1
    for (int branch = 0; branch < 2; ++branch) {
      product_transposed(ex, a.weights.w1, channels.begin, channels.end, g.R, g.C, f.hidden + branch * g.R,
                         f.partial, [&](int c, float sum) {
                           const float d = branch ? sum : sum / area;
                           if constexpr (kNhwc) {
                             put(branch ? f.max_part : f.gate_part, c - channels.begin, d);
                           } else {
                             put(branch ? f.maximum : f.mean, c, d);
                           }
                         });
      ex.sync_block();
    }
    if constexpr (kNhwc) {
      ex.sync_team();
      gather(ex, f.gate_part, g.channels, g.C, f.mean);
      gather(ex, f.max_part, g.channels, g.C, f.maximum);
    }
  }

  // Pass 3.
  VF_DEVICE void write(Global<const T> upstream) const {
    for_tiles<S>(
        ex, tiling_of(g.cols, S, ex.threads()), rows, g.cols,
        [&](int column) {
          Lanes<Side> sides = {};
          VF_UNROLL
          for (int j = 0; j < S && column >= 0; ++j) {
            sides.v[j] = kNhwc ? channel(column + j) : pixel(column + j);
          }
          return sides;
        },
        [&](int row, int column, int, const Lanes<Side>& sides) {
          if (column < 0) return;
          const int offset = row * g.cols + column;
          const Side own = kNhwc ? pixel(row0 + row) : channel(row0 + row);
          const Pack<T, S> gs = get_pack<S>(upstream, offset);
          Pack<T, S> dx;
          VF_UNROLL
          for (int j = 0; j < S; ++j) {
            const Side &p = kNhwc ? own : sides.v[j], &c = kNhwc ? sides.v[j] : own;
            dx.v[j] =
                static_cast<T>(input_grad(static_cast<float>(gs.v[j]), p, c, kNhwc ? row0 + row : column + j,
                                          kNhwc ? column + j : row0 + row));
          }
          put_map<true>(a.dx, at + offset, dx);
        },
        [](int, int, const Lanes<Side>&) {});
  }

 private:
  VF_DEVICE static Geometry of_one_image(Geometry g) {
    g.cols = opaque(g.cols), g.W = opaque(g.W), g.window = opaque(g.window), g.pixels = opaque(g.pixels);
    g.slab = opaque(g.slab), g.R = opaque(g.R), g.hidden = opaque(g.hidden), g.channels = opaque(g.channels);
    return g;
  }

  template <class U>
  struct Lanes {
    U v[S];
  };
  struct MapGrad {
    float mean, peak;
    int at;
  };
  VF_DEVICE MapGrad map_grads(int p) const {
    const Side s = pixel(p);
    return {s.mean, s.peak, s.at};
  }
};

template <bool kNhwc, int kAccess, class T, class Exec>
VF_DEVICE void cbam_backward(Exec& ex, const CbamBackward<typename Exec::Memory, T>& a) {
  constexpr int V = kPack<kAccess, T>, S = kSumPack<kAccess, T>;
  using Global = typename Exec::Memory::template Global<const T>;
  const Geometry& g = a.geometry;
  const CbamFloats<Exec> f(ex, g, a.scratch);
  Slabs<Exec, T> xs(ex, a.x, g, g.stride_n), grads(ex, a.grad, g, int64_t{g.C} * g.P, 1);
  int turn = 0;
  for (int64_t n = ex.team(); n < g.N; n += ex.teams(), ++turn) {
    const CbamImage<kNhwc, kAccess, T, Exec> image(ex, a, f, n, xs.count(), xs.first());
    image.load();
    const auto x = xs.acquire(turn);
    const Global given = grads.find(turn);
    // g comes to be where grad is held, or else in dresidual.
    const bool act = a.activation != kNone;
    Global upstream = given;
    if (act && !grads.held()) upstream = a.dresidual + image.at;
    const auto apply = [&](int i, const auto& gated) {
      constexpr int W = sizeof(gated) / sizeof(float);
      const auto through = through_activation<W, T>(a, get_pack<W>(given, i), gated, image.at + i);
      if (grads.held()) put_pack(grads.slab(turn), i, through);
      put_map<false>(a.dresidual, image.at + i, through);
      return through;
    };
    ex.sync_block();
    // Sums that see single elements come after a pass of wide stores.
    if (S != V && act) {
#pragma unroll 1
      for (int i = ex.thread() * V; i < xs.count(); i += ex.threads() * V) {
        const Pack<T, V> pack = get_pack<V>(x, i);
        float gated[V];
        for_elements<V, kNhwc, kAccess>(i, image.row0, g.cols, [&](int j, int c, int p) {
          const float gate = image.pixel_gate(kNhwc ? image.row0 + p : p);
          gated[j] = static_cast<float>(pack.v[j]) * get(f.gate, c) * gate;
        });
        apply(i, gated);
      }
      ex.sync_block();
    }
    image.sum_both_ways(x, [&](int i, const Pack<T, S>& pack, float row_gate, const float (&gates)[S]) {
      if (S != V || !act) return get_pack<S>(upstream, i);
      float gated[S];
      VF_UNROLL
      for (int j = 0; j < S; ++j) {
        gated[j] =
            static_cast<float>(pack.v[j]) * (kNhwc ? gates[j] : row_gate) * (kNhwc ? row_gate : gates[j]);
      }
      return apply(i, gated);
    });
    image.convolution();
    image.sum_through_maps(x);
    image.perceptron();
    image.write(upstream);
    grads.release(turn);
    xs.release(turn);
  }
  if (a.sums.any()) sums_of_grid(ex, a.sums);
}

}  // namespace visattn::cuda
