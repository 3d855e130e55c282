// Where a block's floats lie in shared memory, beside the slabs.
#pragma once

#include <algorithm>

#include "geometry.h"

namespace visattn::cuda {

// Offsets of a block's floats in shared memory: first the block's own, then those that its team reads, which
// exist twice, for alternate images.
struct Scratch {
  int partial = 0, mean = 0, hidden = 0, gate = 0, own = 0;  // offsets, and their total
  int sums = 0, mean_part = 0, hidden_part = 0, gate_part = 0, shared = 0;

  // The convolution of the maps: maps, gates, and the partial statistics that pool into the maps.
  int maximum = 0, halo = 0, taps = 0, spatial = 0, max_part = 0, map_part = 0, spatial_part = 0,
      pixel_stats = 0;

  // Its backward: sums, indices and gradients of the block's rows, and the parts of the maps' gradients.
  int direct = 0, at_channel = 0, lines = 0, grad_part = 0, conv_part = 0;

  // 1 with maps: there are enough barriers between two uses of the exchange.
  int copies = 2;

  // The floats at the end of the block's own that share memory with the start of the exchange. Each is read
  // for the last time before the other is written.
  int overlap = 0;
  int floats(bool resident) const { return own + (resident ? copies * shared - overlap : 0); }
};

// Floats for the partial statistics of a block: three for each part of a row, or one for each group of
// threads and column.
inline int stats_of(const Geometry& g, int threads, int pack) {
  const int groups = threads / std::max(g.cols / pack, 1);
  const Tiling rows = tiling_of(g.cols, pack, threads, kRowLanes, kept_of(g.cols, pack));
  return std::max(
      {3 * std::max(g.slab * rows.chunks, threads / rows.lanes), groups > 1 ? (groups + 1) * g.cols : 0});
}

// Floats of a map within reach of the windows around a block's pixels, with the zeros beside the map.
inline int halo_of(const Geometry& g) {
  return (ceil_div(g.pixels, g.W) + g.window) * (g.W + 2 * (g.window / 2));
}

template <class Take>
void add_map_gradients(Scratch& s, const Geometry& g, bool nhwc, const Take& take) {
  s.maximum = take(s.own, g.C);
  s.halo = take(s.own, halo_of(g));
  s.taps = take(s.own, 2 * g.window * g.window);
  s.spatial = take(s.own, g.pixels);
  s.direct = take(s.own, nhwc ? 0 : g.slab);
  s.at_channel = take(s.own, g.C);
  s.lines = take(s.own, 4 * g.slab);
  s.max_part = take(s.shared, nhwc ? g.channels : 0);
  s.map_part = take(s.shared, g.pixels);
  s.grad_part = take(s.shared, nhwc ? 0 : 2 * g.pixels);
  s.conv_part = take(s.shared, 2 * g.window * g.window + 1);
}

template <class Take>
void add_maps(Scratch& s, const Geometry& g, bool nhwc, const Take& take) {
  s.maximum = take(s.own, g.C);
  s.taps = take(s.own, 2 * g.window * g.window);
  s.spatial = take(s.own, nhwc ? g.slab : 0);
  s.map_part = take(s.shared, 2 * g.pixels);
  s.spatial_part = take(s.shared, nhwc ? 0 : g.pixels);
}

// Floats for the partial sums over rows and columns of a slab; these sums follow one another in the same
// memory.
inline int partial_of(const Geometry& g, const Problem& q, int threads, int pack) {
  // Backward multiplies with transposed weights, by groups of threads.
  const int outputs = q.nhwc && g.computes_all() ? g.C : g.channels;
  const int products = q.backward ? (g.window ? 2 : 1) * std::max({threads, outputs, g.R}) : threads;
  if (g.window && q.backward) {
    const Tiling t = tiling_of(g.cols, pack, threads);
    return std::max(products, round_up(g.slab * t.chunks, 4) + (t.groups > 1 ? t.groups * g.cols : 0));
  }
  const int groups = std::max(threads / std::max(g.cols / pack, 1), 1);
  return std::max({products, q.nhwc ? groups * g.cols : g.slab, g.window ? stats_of(g, threads, pack) : 0});
}

inline Scratch scratch_of(const Geometry& g, const Problem& q, int threads, int pack) {
  Scratch s;
  const int branches = g.window && q.backward ? 2 : 1;
  const auto take = [](int& total, int count) {
    return total += round_up(count, 4), total - round_up(count, 4);
  };
  s.mean = take(s.own, g.C);
  s.hidden = take(s.own, branches * g.R);
  s.gate = take(s.own, g.C);
  if (g.window && !q.backward) s.pixel_stats = take(s.shared, q.nhwc ? 0 : (q.element == 2 ? 2 : 3) * g.P);
  const int pixel_stats = s.shared;
  s.sums = take(s.shared, q.nhwc ? (g.window && !q.backward ? 3 : 1) * g.C : branches == 2 ? g.P : 0);
  s.mean_part = take(s.shared, g.channels);
  s.hidden_part = take(s.shared, (g.window && !q.backward ? 2 : 1) * g.R);
  s.gate_part = take(s.shared, g.channels);
  if (g.window) {
    s.copies = 1;
    q.backward ? add_map_gradients(s, g, q.nhwc, take) : add_maps(s, g, q.nhwc, take);
  }
  // The halo shares memory with the partial sums: it is gathered after them, and read before the next ones.
  const bool convolves = g.window && !q.backward;
  const int partial = std::max(partial_of(g, q, threads, pack), convolves ? 2 * halo_of(g) : 0);
  s.partial = take(s.own, partial);
  if (convolves) s.halo = s.partial;
  // Sums over pixels go straight into the exchange if every thread has a pack.
  if (convolves && !q.nhwc && g.cols / pack > threads / 2)
    s.overlap = std::min(s.own - s.partial, pixel_stats);
  return s;
}

}  // namespace visattn::cuda
