// Sums over the rows and the columns of a block's slab, in an order that the shape alone decides.
#pragma once

#include "team.h"

namespace visattn::cuda {

// partial [rows, parts], where parts is returned: sums of values(offset, out [V]) over each row [cols].
template <int V, int kUnroll, class Exec, class Partial, class Values>
VF_DEVICE int row_sums(Exec& ex, int rows, int cols, Partial partial, const Values& values) {
  const int warps = ex.threads() / kWarp, warp = ex.thread() / kWarp, lane = ex.thread() % kWarp;
  const int parts = rows < 1 || rows >= warps ? 1 : warps / rows;
  const int packs = cols / V, part_packs = (packs + parts - 1) / parts;
  for (int unit = warp; unit < rows * parts; unit += warps) {
    const int begin = unit % parts * part_packs;
    const int end = begin + part_packs < packs ? begin + part_packs : packs, row = unit / parts * cols;
    float total[V] = {};
#pragma unroll kUnroll
    for (int i = begin + lane; i < end; i += kWarp) {
      float v[V];
      values(row + i * V, v);
      VF_UNROLL
      for (int j = 0; j < V; ++j) total[j] += v[j];
    }
    VF_UNROLL
    for (int j = 1; j < V; ++j) total[0] += total[j];
    const float sum = ex.warp_sum(total[0]);
    if (lane == 0) put(partial, unit, sum);
  }
  ex.sync_block();
  return parts;
}

// partial [groups, cols], where groups is returned: sums of values(offset, out [V]) down the columns.
template <int V, int kUnroll, class Exec, class Partial, class Values>
VF_DEVICE int column_sums(Exec& ex, int rows, int cols, Partial partial, const Values& values) {
  const int packs = cols / V, groups = packs < 1 || packs >= ex.threads() ? 1 : ex.threads() / packs;
#pragma unroll 1
  for (int unit = ex.thread(); unit < packs * groups; unit += ex.threads()) {
    const int group = unit / packs, column = unit % packs * V;
    float total[V] = {};
#pragma unroll kUnroll
    for (int r = group; r < rows; r += groups) {
      float v[V];
      values(r * cols + column, v);
      VF_UNROLL
      for (int j = 0; j < V; ++j) total[j] += v[j];
    }
    VF_UNROLL
    for (int j = 0; j < V; ++j) put(partial, group * cols + column + j, total[j]);
  }
  ex.sync_block();
  return groups;
}

// Element i of the sum over `count` rows [width] of partial sums.
template <class Partial>
VF_DEVICE float down(Partial partial, int count, int width, int i) {
  float total = get(partial, i);
  for (int k = 1; k < count; ++k) total += get(partial, k * width + i);
  return total;
}

// finish(o, sum over i of w[o, i] x[i]) for each row o of [begin, end) of w [outputs, inputs], by one lane.
template <class Exec, class W, class X, class Finish>
VF_DEVICE void product(Exec& ex, const W& w, int begin, int end, int inputs, X x, const Finish& finish) {
  const int warps = ex.threads() / kWarp, lane = ex.thread() % kWarp;
  for (int o = begin + ex.thread() / kWarp; o < end; o += warps) {
    float total = 0;
#pragma unroll 4
    for (int i = lane; i < inputs; i += kWarp) total += get(w, int64_t{o} * inputs + i) * get(x, i);
    const float sum = ex.warp_sum(total);
    if (lane == 0) finish(o, sum);
  }
}

// finish(o, sum over i of w[i, o] x[i]) for each column o of [begin, end) of w [inputs, outputs].
template <class Exec, class W, class X, class Partial, class Finish>
VF_DEVICE void product_transposed(Exec& ex, const W& w, int begin, int end, int inputs, int outputs, X x,
                                  Partial partial, const Finish& finish) {
  const int width = end > begin ? end - begin : 0;
  const int groups = column_sums<1, 2>(ex, inputs, width, partial, [&](int offset, float (&v)[1]) {
    const int i = offset / width, o = begin + offset % width;
    v[0] = get(w, int64_t{i} * outputs + o) * get(x, i);
  });
#pragma unroll 1
  for (int o = ex.thread(); o < width; o += ex.threads()) finish(begin + o, down(partial, groups, width, o));
}

// The channels of the V elements from `offset` on of a slab whose first row is `row0`: f(j, channel).
template <int V, bool kNhwc, int kAccess, class F>
VF_DEVICE void for_channels(int offset, int row0, int cols, const F& f) {
  if constexpr (kAccess != kRagged) {
    const int channel = kNhwc ? offset % cols : row0 + offset / cols;
    VF_UNROLL
    for (int j = 0; j < V; ++j) f(j, kNhwc ? channel + j : channel);
  } else {
    int channel = kNhwc ? offset % cols : row0 + offset / cols, left = cols - offset % cols;
    VF_UNROLL
    for (int j = 0; j < V; ++j) {
      f(j, channel);
      if (kNhwc) {
        channel = channel + 1 == cols ? 0 : channel + 1;
      } else if (--left == 0) {
        ++channel, left = cols;
      }
    }
  }
}

// The same with each element's pixel, as the block counts them: of the image in nchw, of its slab in nhwc.
template <int V, bool kNhwc, int kAccess, class F>
VF_DEVICE void for_elements(int offset, int row0, int cols, const F& f) {
  const int line = offset / cols;
  for_channels<V, kNhwc, kAccess>(offset, row0, cols, [&](int j, int c) {
    f(j, c, !kNhwc ? offset + j - (c - row0) * cols : kAccess == kRagged ? (offset + j) / cols : line);
  });
}

}  // namespace visattn::cuda
