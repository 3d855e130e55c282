// A slab seen both ways at once: sums along its rows and down its columns from one reading, by warps that
// keep what belongs to their columns in registers.
#pragma once

#include "reduce.h"

namespace visattn::cuda {

// visit(row, column, chunk, data) for each pack of the slab, by all lanes of a warp together, with column -1
// in those that have none. begin(column) gives the data of a pack's columns, once for all rows of a group;
// finish(group, column, data) takes it back.
template <int V, class Exec, class Begin, class Visit, class Finish>
VF_DEVICE void for_tiles(Exec& ex, const Tiling& t, int rows, int cols, const Begin& begin,
                         const Visit& visit, const Finish& finish) {
  const int lane = ex.thread() % kWarp, below = lane / t.lanes, high = kWarp / t.lanes;
#pragma unroll 1
  for (int unit = ex.thread() / kWarp; unit < t.chunks * (t.groups / high); unit += ex.threads() / kWarp) {
    const int chunk = unit % t.chunks, group = unit / t.chunks * high + below;
    const int place = (chunk * t.lanes + lane % t.lanes) * V, column = place < cols ? place : -1;
    auto data = begin(column);
#pragma unroll 1
    for (int r = group; r - below < rows; r += t.groups) visit(r, r < rows ? column : -1, chunk, data);
    if (column >= 0) finish(group, column, data);
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
  const Partial columns = partial + (kRows ? rows * t.chunks : 0);
  for_tiles<V>(
      ex, t, rows, cols, [&](int column) { return Columns<decltype(begin(column)), V>{begin(column), {}}; },
      [&](int row, int column, int chunk, auto& c) {
        float along = 0;
        if (column >= 0) add(row, column, c.data, along, c.down);
        if constexpr (kRows) {
          along = ex.warp_sum(along, t.lanes);
          if (ex.thread() % t.lanes == 0 && row < rows) put(partial, row * t.chunks + chunk, along);
        }
      },
      [&](int group, int column, auto& c) {
        if constexpr (kColumns) {
          VF_UNROLL
          for (int j = 0; j < V; ++j) {
            if (t.groups == 1) {
              take(column + j, c.down[j]);
            } else {
              put(columns, group * cols + column + j, c.down[j]);
            }
          }
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
