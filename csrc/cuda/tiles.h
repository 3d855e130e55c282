// A slab seen both ways at once: sums along its rows and down its columns from one reading, by warps that
// keep what belongs to their columns in registers.
#pragma once

#include "reduce.h"

namespace visattn::cuda {

// visit(row, columns [K], chunk, data [K]) for K packs of a row at a time, by all lanes of a warp together,
// where a column is -1 for a pack that a lane has not. begin(column) gives the data of a pack's columns, once
// for all rows of a group; finish(group, columns, data) takes it back.
template <int V, int K, class Exec, class Begin, class Visit, class Finish>
VF_DEVICE void for_tiles(Exec& ex, const Tiling& t, int rows, int cols, const Begin& begin,
                         const Visit& visit, const Finish& finish) {
  const int lane = ex.thread() % kWarp, below = lane / t.lanes, high = kWarp / t.lanes;
#pragma unroll 1
  for (int unit = ex.thread() / kWarp; unit < t.chunks * (t.groups / high); unit += ex.threads() / kWarp) {
    const int chunk = unit % t.chunks, group = unit / t.chunks * high + below;
    int columns[K];
    decltype(begin(0)) data[K];
    VF_UNROLL
    for (int k = 0; k < K; ++k) {
      const int place = ((chunk * K + k) * t.lanes + (lane & (t.lanes - 1))) * V;
      columns[k] = place < cols ? place : -1;
      data[k] = begin(columns[k]);
    }
#pragma unroll 1
    for (int r = group; r - below < rows; r += t.groups) {
      int seen[K];
      VF_UNROLL
      for (int k = 0; k < K; ++k) seen[k] = r < rows ? columns[k] : -1;
      visit(r, seen, chunk, data);
    }
    finish(group, columns, data);
  }
}

// One of each for the V columns of a lane.
template <class U, int V>
struct Lanes {
  U v[V];
};

// Of columns `V` wide: what begin gave, and the sums down them.
template <class Data, int V>
struct Columns {
  Data data;
  float down[V];
};

// add(row, column, data, along, down [V]) adds what a pack gives to the sum of its row and to those of its
// columns. finish(row, sum) sees each of the block's rows if kRows, take(column, sum) each column if
// kColumns, by one thread each; no barrier follows.
template <int V, bool kRows, bool kColumns, class Exec, class Partial, class Begin, class Add, class Finish,
          class Take>
VF_DEVICE void cross_sums(Exec& ex, int rows, int cols, Partial partial, const Begin& begin, const Add& add,
                          const Finish& finish, const Take& take) {
  const Tiling t = tiling_of(cols, V, ex.threads());
  const Partial columns = partial + (kRows ? (rows * t.chunks + 3) / 4 * 4 : 0);
  using Data = Columns<decltype(begin(0)), V>;
  for_tiles<V, 1>(
      ex, t, rows, cols,
      [&](int column) {
        Data c = {};
        c.data = begin(column);
        return c;
      },
      [&](int row, const int (&column)[1], int chunk, Data(&c)[1]) {
        float along = 0;
        if (column[0] >= 0) add(row, column[0], c[0].data, along, c[0].down);
        if constexpr (kRows) {
          along = ex.warp_sum(along, t.lanes);
          if ((ex.thread() & (t.lanes - 1)) == 0 && row < rows) put(partial, row * t.chunks + chunk, along);
        }
      },
      [&](int group, const int (&column)[1], Data(&c)[1]) {
        if constexpr (kColumns) {
          if (column[0] < 0) return;
          if (t.groups > 1) return put_floats(columns, group * cols + column[0], c[0].down);
          VF_UNROLL
          for (int j = 0; j < V; ++j) take(column[0] + j, c[0].down[j]);
        }
      });
  ex.sync_block();
  if constexpr (kColumns) {
#pragma unroll 1
    for (int c = ex.thread(); t.groups > 1 && c < cols; c += ex.threads())
      take(c, sum_of(columns, {t.groups, cols}, c));
  }
  if constexpr (kRows) {
#pragma unroll 1
    for (int r = ex.thread(); r < rows; r += ex.threads()) {
      float total = get(partial, r * t.chunks);
#pragma unroll 1
      for (int k = 1; k < t.chunks; ++k) total += get(partial, r * t.chunks + k);
      finish(r, total);
    }
  }
}

}  // namespace visattn::cuda
