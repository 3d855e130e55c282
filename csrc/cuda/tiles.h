// Sums along the rows and down the columns of a slab in one reading, by warps that keep their columns' data
// in registers.
#pragma once

#include "../common/geometry.h"
#include "portable.h"
#include "reduce.h"

namespace visattn::cuda {

// Calls visit(row, columns [K], chunk, data [K]) for K packs of every B-th row of a group, in all lanes of a
// warp together. The B rows of a visit are t.groups apart; any of them may lie past the last row. A lane
// without a pack has column -1. begin(column) returns the data of a pack's columns, once for all rows of a
// group; finish(group, columns, data) takes it back.
template <int V, int K, int B, class Exec, class Begin, class Visit, class Finish>
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
    for (int r = group; r - below < rows; r += B * t.groups) visit(r, columns, chunk, data);
    finish(group, columns, data);
  }
}

// A value for each of the V columns of a lane.
template <class U, int V>
struct Lanes {
  U v[V];
};

// The V columns of a pack: begin's data, and the sums down them.
template <class Data, int V>
struct Columns {
  Data data;
  float down[V];
};

// add(row, column, data, along, down [V]) adds a pack's contribution to the sum of its row and to those of
// its columns. finish(row, sum) receives each of the block's rows if kRows, take(column, sum) each column if
// kColumns, in one thread each; no barrier follows.
template <int V, bool kRows, bool kColumns, class Exec, class Partial, class Begin, class Add, class Finish,
          class Take>
VF_DEVICE void cross_sums(Exec& ex, int rows, int cols, Partial partial, const Begin& begin, const Add& add,
                          const Finish& finish, const Take& take) {
  const Tiling t = tiling_of(cols, V, ex.threads());
  const Partial columns = partial + (kRows ? (rows * t.chunks + 3) / 4 * 4 : 0);
  using Data = Columns<decltype(begin(0)), V>;
  constexpr int B = 4;  // rows at a time, whose sums share their shuffles
  for_tiles<V, 1, B>(
      ex, t, rows, cols,
      [&](int column) {
        Data c = {};
        c.data = begin(column);
        return c;
      },
      [&](int row, const int (&column)[1], int chunk, Data(&c)[1]) {
        float along[B] = {};
        if (column[0] >= 0 && row + (B - 1) * t.groups < rows) {
          VF_UNROLL
          for (int b = 0; b < B; ++b) add(row + b * t.groups, column[0], c[0].data, along[b], c[0].down);
        } else if (column[0] >= 0) {
#pragma unroll 1
          for (int b = 0; b < B && row + b * t.groups < rows; ++b) {
            float one = 0;
            add(row + b * t.groups, column[0], c[0].data, one, c[0].down);
            VF_UNROLL
            for (int k = 0; k < B; ++k) along[k] = k == b ? one : along[k];
          }
        }
        if constexpr (kRows) {
          const int lane = ex.thread() & (t.lanes - 1);
          if (t.lanes < B) {
            VF_UNROLL
            for (int b = 0; b < B; ++b) {
              const float sum = ex.template warp_sum<B>(along[b], t.lanes);
              if (lane == 0 && row + b * t.groups < rows)
                put(partial, (row + b * t.groups) * t.chunks + chunk, sum);
            }
          } else {
            const float sum = ex.warp_sums(along, t.lanes);
            const int mine = row + lane * t.groups;
            if (lane < B && mine < rows) put(partial, mine * t.chunks + chunk, sum);
          }
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
