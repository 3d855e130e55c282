// Sum, maximum and argmax down each column of an image, over the blocks of a team.
#pragma once

#include <cmath>
#include <cstring>

#include "channel_gate.h"
#include "portable.h"
#include "reduce.h"
#include "stats.h"
#include "walk.h"

namespace visattn::cuda {

// The exchange of column statistics between blocks as three vectors [cols].
template <class Exec>
struct PlainStats {
  Exec& ex;
  typename Exec::Exchange stats;
  int cols;

  VF_DEVICE void put_sum(int c, float sum) const { put(stats, c, sum); }
  VF_DEVICE void put_peak(int c, const Peak& p) const {
    put(stats, cols + c, p.value);
    put(stats, 2 * cols + c, bits_of(p.at));
  }
  VF_DEVICE int blocks() const { return ex.team_size(); }
  VF_DEVICE Stat of_block(int r, int c) const { return get_stat(ex.peer(stats, r), cols, c); }
};

// The exchange for x [rows, cols] times `gates` of its rows, where x has two bytes: the sums, and one word
// for the maximum's x and row. Every block has the gates of its rows.
template <class Exec, class Slab>
struct GatedStats {
  Exec& ex;
  typename Exec::Exchange stats, gates;
  int cols, row0, slab_rows, all_rows;
  Slab slab;

  VF_DEVICE void put_sum(int c, float sum) const { put(stats, c, sum); }
  VF_DEVICE void put_peak(int c, const Peak& p) const {
    if (row0 >= all_rows) return;
    const auto x = get_pack<1>(slab, (p.at - row0) * cols + c);
    unsigned short bits;
    memcpy(&bits, &x, sizeof(bits));
    put(stats, cols + c, bits_of(static_cast<int>(static_cast<unsigned>(bits) << 16 | (p.at - row0))));
  }
  VF_DEVICE int blocks() const { return (all_rows + slab_rows - 1) / slab_rows; }  // blocks with rows
  VF_DEVICE Stat of_block(int r, int c) const {
    const unsigned word = static_cast<unsigned>(index_of(get(ex.peer(stats, r), cols + c)));
    const unsigned short bits = static_cast<unsigned short>(word >> 16);
    const int row = word & 0xffff;
    auto x = decltype(get_pack<1>(slab, 0)){};
    memcpy(&x, &bits, sizeof(bits));
    Stat s;
    s.sum = get(ex.peer(stats, r), c);
    s.peak = {static_cast<float>(x.v[0]) * get(ex.peer(gates, r), row), r * slab_rows + row};
    return s;
  }
};

// Calls finish(column, Stat) for the columns of `part`, over the rows of all blocks of the team. The argmax
// is the row of the image; the block's first row is row0. `stats`: one of the exchanges above. values(row,
// offset, out [V]) reads elements.
template <int V, class Exec, class Partial, class Stats, class Values, class Finish>
VF_DEVICE void column_stats(Exec& ex, int rows, int cols, int row0, const Part& part, Partial partial,
                            const Stats& stats, const Values& values, const Finish& finish) {
  struct Lane {
    float sum[V], most[V];
    int at[V];
  };
  const int packs = cols / V, groups = packs < 1 || packs >= ex.threads() ? 1 : ex.threads() / packs;
  const Partial winners = partial + groups * cols;  // [cols]: the maxima over all groups
  // Groups pass one vector after the other through `partial`; a thread then has one pack of columns.
  Lane mine = {};
  int my_group = 0, my_column = -1;
  for_columns<V, 2>(
      ex, rows, cols,
      [&](int group, int) {
        Lane l = {};
        VF_UNROLL
        for (int j = 0; j < V; ++j) l.most[j] = -INFINITY, l.at[j] = row0 + group;
        return l;
      },
      [&](Lane& l, int row, int offset) {
        float v[V];
        values(row, offset, v);
        VF_UNROLL
        for (int j = 0; j < V; ++j) {
          l.sum[j] += v[j];
          if (v[j] > l.most[j]) l.most[j] = v[j], l.at[j] = row0 + row;
        }
      },
      [&](int group, int column, Lane& l) {
        bool odd = false;
        VF_UNROLL
        for (int j = 0; j < V; ++j) odd |= l.sum[j] != l.sum[j];
        if (odd) {
          Peak peaks[V];
#pragma unroll 1
          for (int r = group; r < rows; r += groups) {
            float v[V];
            values(r, r * cols + column, v);
            VF_UNROLL
            for (int j = 0; j < V; ++j) {
              const Peak other{v[j], row0 + r};
              if (beats(other, peaks[j])) peaks[j] = other;
            }
          }
          VF_UNROLL
          for (int j = 0; j < V; ++j) l.most[j] = peaks[j].value, l.at[j] = peaks[j].at;
        }
        if (groups == 1) {
          VF_UNROLL
          for (int j = 0; j < V; ++j) {
            stats.put_sum(column + j, l.sum[j]);
            stats.put_peak(column + j, {l.most[j], l.at[j]});
          }
        } else {
          mine = l, my_group = group, my_column = column;
        }
      });
  if (groups > 1) {
    const Partials all{groups, cols};
    const int place = my_group * cols + my_column;
    if (my_column >= 0) put_floats(partial, place, mine.sum);
    ex.sync_block();
    for (int c = ex.thread(); c < cols; c += ex.threads()) stats.put_sum(c, sum_of(partial, all, c));
    ex.sync_block();
    if (my_column >= 0) put_floats(partial, place, mine.most);
    ex.sync_block();
    for (int c = ex.thread(); c < cols; c += ex.threads()) {
      float most = get(partial, c);
#pragma unroll 4
      for (int k = 1; k < groups; ++k) most = larger(most, get(partial, k * cols + c));
      put(winners, c, most);
    }
    ex.sync_block();
    if (my_column >= 0) {
      float most[V], at[V];
      get_floats(winners, my_column, most);
      VF_UNROLL
      for (int j = 0; j < V; ++j) {
        const bool wins = mine.most[j] == most[j] || (most[j] != most[j] && mine.most[j] != mine.most[j]);
        at[j] = bits_of(wins ? mine.at[j] : Peak{}.at);
      }
      put_floats(partial, place, at);
    }
    ex.sync_block();
    for (int c = ex.thread(); c < cols; c += ex.threads()) {
      int at = index_of(get(partial, c));
#pragma unroll 4
      for (int k = 1; k < groups; ++k) {
        const int other = index_of(get(partial, k * cols + c));
        at = other < at ? other : at;
      }
      stats.put_peak(c, {get(winners, c), at});
    }
  }
  ex.sync_team();
  // Two lanes share a column's blocks.
#pragma unroll 1
  for (int i = ex.thread() / kWarp * kWarp; i < 2 * (part.end - part.begin); i += ex.threads()) {
    const int c = part.begin + (i + ex.thread() % kWarp) / 2;
    Stat s;
    if (c < part.end) {
#pragma unroll 4
      for (int r = ex.thread() % 2; r < stats.blocks(); r += 2) s.merge(stats.of_block(r, c));
    }
    s.sum = ex.template warp_sum<2>(s.sum);
    s.peak = ex.template warp_peak<2>(s.peak);
    if (c < part.end && ex.thread() % 2 == 0) finish(c, s);
  }
}

}  // namespace visattn::cuda
