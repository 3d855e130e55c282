// Sum, maximum and its index, over the rows and down the columns of an image. NaN wins a maximum, and of
// equal values the first does, so that no order of merging matters.
#pragma once

#include "channel_gate.h"

namespace visattn::cuda {

struct Stat {
  float sum = 0;
  Peak peak;

  VF_DEVICE void add(float v, int at) {
    sum += v;
    const Peak other{v, at};
    if (beats(other, peak)) peak = other;
  }
  VF_DEVICE void merge(const Stat& other) {
    sum += other.sum;
    if (beats(other.peak, peak)) peak = other.peak;
  }
};

VF_DEVICE float bits_of(int i) {
  float f;
  memcpy(&f, &i, sizeof(f));
  return f;
}
VF_DEVICE int index_of(float f) {
  int i;
  memcpy(&i, &f, sizeof(i));
  return i;
}

// Stat i of `count`, kept as three vectors.
template <class Memory>
VF_DEVICE void put_stat(Memory m, int count, int i, const Stat& s) {
  put(m, i, s.sum);
  put(m, count + i, s.peak.value);
  put(m, 2 * count + i, bits_of(s.peak.at));
}
template <class Memory>
VF_DEVICE Stat get_stat(Memory m, int count, int i) {
  Stat s;
  s.sum = get(m, i);
  s.peak = {get(m, count + i), index_of(get(m, 2 * count + i))};
  return s;
}

// finish(row, Stat) for each of the block's rows; the index is the column. values(offset, out [V]) as in
// row_sums.
template <int V, class Exec, class Partial, class Values, class Finish>
VF_DEVICE void row_stats(Exec& ex, int rows, int cols, Partial partial, const Values& values,
                         const Finish& finish) {
  const int warps = ex.threads() / kWarp, warp = ex.thread() / kWarp, lane = ex.thread() % kWarp;
  const int parts = rows < 1 || rows >= warps ? 1 : warps / rows;
  const int packs = cols / V, part_packs = (packs + parts - 1) / parts;
  for (int unit = warp; unit < rows * parts; unit += warps) {
    const int begin = unit % parts * part_packs;
    const int end = begin + part_packs < packs ? begin + part_packs : packs, row = unit / parts * cols;
    Stat s;
#pragma unroll 1
    for (int i = begin + lane; i < end; i += kWarp) {
      float v[V];
      values(row + i * V, v);
      VF_UNROLL
      for (int j = 0; j < V; ++j) s.add(v[j], i * V + j);
    }
    s.sum = ex.warp_sum(s.sum);
    s.peak = ex.warp_peak(s.peak);
    if (lane == 0) put_stat(partial, rows * parts, unit, s);
  }
  ex.sync_block();
  for (int r = ex.thread(); r < rows; r += ex.threads()) {
    Stat s = get_stat(partial, rows * parts, r * parts);
    for (int k = 1; k < parts; ++k) s.merge(get_stat(partial, rows * parts, r * parts + k));
    finish(r, s);
  }
}

// finish(column, Stat) for the columns of `part`, down the rows of all blocks of the team; the index is the
// row of the image, of which the block's first is row0. `stats` is the exchange, three vectors [cols].
template <int V, class Exec, class Partial, class Values, class Finish>
VF_DEVICE void column_stats(Exec& ex, int rows, int cols, int row0, const Part& part, Partial partial,
                            typename Exec::Exchange stats, const Values& values, const Finish& finish) {
  const int packs = cols / V, groups = packs < 1 || packs >= ex.threads() ? 1 : ex.threads() / packs;
  for (int unit = ex.thread(); unit < packs * groups; unit += ex.threads()) {
    const int group = unit / packs, column = unit % packs * V;
    Stat s[V];
#pragma unroll 1
    for (int r = group; r < rows; r += groups) {
      float v[V];
      values(r * cols + column, v);
      VF_UNROLL
      for (int j = 0; j < V; ++j) s[j].add(v[j], row0 + r);
    }
    VF_UNROLL
    for (int j = 0; j < V; ++j) {
      if (groups == 1) {
        put_stat(stats, cols, column + j, s[j]);
      } else {
        put_stat(partial, groups * cols, group * cols + column + j, s[j]);
      }
    }
  }
  if (groups > 1) {
    ex.sync_block();
    for (int c = ex.thread(); c < cols; c += ex.threads()) {
      Stat s = get_stat(partial, groups * cols, c);
      for (int k = 1; k < groups; ++k) s.merge(get_stat(partial, groups * cols, k * cols + c));
      put_stat(stats, cols, c, s);
    }
  }
  ex.sync_team();
  for (int c = part.begin + ex.thread(); c < part.end; c += ex.threads()) {
    Stat s = get_stat(ex.peer(stats, 0), cols, c);
    for (int r = 1; r < ex.team_size(); ++r) s.merge(get_stat(ex.peer(stats, r), cols, c));
    finish(c, s);
  }
}

}  // namespace visattn::cuda
