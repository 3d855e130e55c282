// One image in CBAM's backward: what a thread knows of it, and the steps without a pass over the maps, the
// gradients of the convolution and of the perceptron.
#pragma once

#include <cstdint>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "../common/scratch.h"
#include "batch_sums.h"
#include "cbam_conv.h"
#include "channel_gate.h"
#include "channel_scale.h"
#include "gate_math.h"
#include "portable.h"
#include "reduce.h"
#include "stats.h"
#include "team.h"

namespace visattn::cuda {

template <class Memory, class T>
struct CbamBackward {
  using Element = T;
  template <class U>
  using Global = typename Memory::template Global<U>;
  Geometry geometry;  // stride_n is that of x; the other maps are dense
  Scratch scratch;
  GateWeights<Memory> weights;  // without biases
  Weight<Memory> wconv;
  int activation;
  Global<const T> grad, x, residual;  // residual may be null, and is null without an activation
  Global<T> dx, dresidual;            // dresidual is null without an activation
  Global<const float> hidden, channel_gate, maps, spatial_gate;  // as forward left them
  Global<const int> argmax_hw, argmax_c;
  Global<float> dz, dhidden, dconv;  // [N, C], [N, 2, R], [N, 2 window^2 + 1] with the sum of dq last
  BatchSums<Memory> sums;            // of the same launch, or none
};

// The contributions of W pixels to dx of all their channels, or of W channels to dx of all their pixels:
// gates, gradients of the mean and of the maximum, and the index of the maximum.
template <int W>
struct Sides {
  float gate[W], mean[W], peak[W];
  int at[W];
};

// One thread's view of one image. f.lines [slab, 4] holds the sides of the block's rows, one row after the
// other. The sides of columns are read where they lie, once for all rows.
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
  int64_t n, at;  // the image; where the block's part begins in the dense maps
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

  // Loads the gates and the indices of the maxima.
  VF_DEVICE void load() const {
#pragma unroll 1
    for (int c = ex.thread(); c < g.C; c += ex.threads()) {
      put(f.gate, c, get(a.channel_gate, n * g.C + c));
      put(f.at_channel, c, bits_of(get(a.argmax_hw, n * g.C + c)));
    }
#pragma unroll 1
    for (int p = pixels.begin + ex.thread(); p < pixels.end; p += ex.threads())
      put(f.spatial, p - pixels.begin, get(a.spatial_gate, n * g.P + p));
    const int64_t of_rows = n * g.rows + row0;
#pragma unroll 1
    for (int r = ex.thread(); r < rows; r += ex.threads()) {
      put(f.lines, 4 * r, kNhwc ? get(a.spatial_gate, of_rows + r) : get(a.channel_gate, of_rows + r));
      put(f.lines, 4 * r + 3, bits_of(kNhwc ? get(a.argmax_c, of_rows + r) : get(a.argmax_hw, of_rows + r)));
    }
  }

  VF_DEVICE float row_gate(int row) const { return get(f.lines, 4 * row); }
  VF_DEVICE Sides<1> row_sides(int row) const {
    float v[4];
    get_floats(f.lines, 4 * row, v);
    return {{v[0]}, {v[1]}, {v[2]}, {index_of(v[3])}};
  }

  // The gates of a pack's columns.
  template <int W>
  VF_DEVICE void column_gates(int column, float (&gates)[W]) const {
    if constexpr (kNhwc) {
      get_floats(f.gate, column, gates);
    } else {
      get_floats(a.spatial_gate + n * g.P, column, gates);
    }
  }
  // The sides of a pack's columns, without the gates.
  template <int W>
  VF_DEVICE void column_gradients(int column, Sides<W>& s) const {
    float at[W];
    if constexpr (kNhwc) {
      get_floats(f.mean, column, s.mean);
      get_floats(f.maximum, column, s.peak);
      get_floats(f.at_channel, column, at);
    } else {
      const auto maps = ex.peer(f.grad_part, column / g.pixels);
      get_floats(maps, column % g.pixels, s.mean);
      get_floats(maps + g.pixels, column % g.pixels, s.peak);
      get_floats(cast_floats(a.argmax_c + n * g.P), column, at);
    }
    VF_UNROLL
    for (int j = 0; j < W; ++j) s.at[j] = index_of(at[j]);
  }

  // The maps' gradients, in f.lines of the block in nhwc and in f.grad_part of every block in nchw, and the
  // block's share of the weight's gradient, in f.conv_part.
  VF_DEVICE void convolution() const {
    const Halo halo(pixels, g);
    ex.sync_team();
    gather_halo(ex, g, halo, 1, f.map_part, f.halo);
    conv_weight_grads(ex, g, pixels, halo, f.halo, a.maps + 2 * n * g.P,
                      [&](int e, float sum) { put(f.conv_part, e, sum); });
    const float channels_of = static_cast<float>(g.C);
    for_maps(
        ex, pixels,
        [&](int p, int map) {
          const float sum = convolve<-1>(g, halo, f.halo, f.taps + map * g.window * g.window, p);
          return map ? sum : sum / channels_of;
        },
        [&](int p, int map, float value) {
          if (p < 0) return;
          if constexpr (kNhwc) {
            put(f.lines, 4 * (p - pixels.begin) + 1 + map, value);
          } else {
            put(f.grad_part, map * g.pixels + p - pixels.begin, value);
          }
        });
    if constexpr (kNhwc) {
      ex.sync_block();
    } else {
      ex.sync_team();
    }
  }

  // dz of the block's channels, in f.mean -> the gradients of the pooled values for dx, in f.mean and
  // f.maximum. Also sums the blocks' shares of the convolution's gradient.
  VF_DEVICE void perceptron() const {
    const Part units(ex.rank(), g.hidden, g.R);
    const float area = static_cast<float>(g.P);
    const bool spread = kNhwc && !g.computes_all();
    squeeze_backward<2, kNhwc>(
        ex, g, f, a.weights,
        [&](int r, float sum, float (&d)[2]) {
          VF_UNROLL
          for (int branch = 0; branch < 2; ++branch) {
            const int64_t i = (2 * n + branch) * g.R + r;
            d[branch] = activate_grad(sum, get(a.hidden, i), kRelu);
            if (units.has(r)) put(a.dhidden, i, d[branch]);
          }
        },
        [&](int c, const float (&sum)[2]) {
          if (spread) {
            put(f.gate_part, c - channels.begin, sum[0] / area);
            put(f.max_part, c - channels.begin, sum[1]);
          } else {
            put(f.mean, c, sum[0] / area);
            put(f.maximum, c, sum[1]);
            if constexpr (!kNhwc) {
              put(f.lines, 4 * (c - row0) + 1, sum[0] / area);
              put(f.lines, 4 * (c - row0) + 2, sum[1]);
            }
          }
        });
    // The team has met since f.conv_part was written.
    const int elements = 2 * g.window * g.window + 1;
#pragma unroll 1
    for (int e = ex.rank() * ex.threads() + ex.thread(); e < elements; e += ex.team_size() * ex.threads()) {
      put(a.dconv, n * elements + e, over_team(ex, f.conv_part, e));
    }
    if (spread) {
      ex.sync_team();
      gather(ex, f.gate_part, g.channels, g.C, f.mean);
      gather(ex, f.max_part, g.channels, g.C, f.maximum);
    } else {
      ex.sync_block();
    }
  }

 private:
  VF_DEVICE static Geometry of_one_image(Geometry g) {
    g.cols = opaque(g.cols), g.W = opaque(g.W), g.window = opaque(g.window), g.pixels = opaque(g.pixels);
    g.slab = opaque(g.slab), g.R = opaque(g.R), g.hidden = opaque(g.hidden), g.channels = opaque(g.channels);
    return g;
  }
};

}  // namespace visattn::cuda
