// Walks over a block's slab [rows, cols], V elements at a time. What belongs to a line is fetched once for
// the whole line, and no loop divides.
#pragma once

#include "../common/geometry.h"
#include "portable.h"

namespace visattn::cuda {

// How the lanes of a block share rows: `lanes` of them walk along a row, or along one of its `parts`, 128
// bytes at a time. So no two lanes meet in a bank of shared memory, and few are idle in short rows.
struct RowShare {
  int lanes = 1, parts = 1, packs = 0;  // packs: of a part

  VF_DEVICE RowShare(int rows, int cols, int V, int threads) {
    const int all = cols / V;
    while (lanes < all && lanes < kRowLanes) lanes *= 2;
    const int slots = threads / lanes;
    if (rows > 0 && rows < slots) parts = slots / rows;
    packs = (all + parts * lanes - 1) / (parts * lanes) * lanes;
  }
};

// Calls data = begin(row) once for each part of a row, visit(data, offset) for its packs, and finish(unit,
// data) in all lanes of the warp together. unit is row * parts + part in the first lane of a part, -1 in the
// others. `rows` may be 0; begin always sees an existing row.
template <int V, int kUnroll, class Exec, class Begin, class Visit, class Finish>
VF_DEVICE RowShare for_rows(Exec& ex, int rows, int cols, const Begin& begin, const Visit& visit,
                            const Finish& finish) {
  const RowShare share(rows, cols, V, ex.threads());
  const int lane = (ex.thread() & (share.lanes - 1)), units = rows * share.parts;
  const int step = ex.threads() / share.lanes, inside = kWarp / share.lanes;
#pragma unroll 1
  for (int first = ex.thread() / kWarp * inside; first < units; first += step) {
    const int wanted = first + ex.thread() % kWarp / share.lanes, unit = wanted < units ? wanted : units - 1;
    const int row = unit / share.parts, from = unit % share.parts * share.packs * V;
    const int end = wanted >= units ? 0 : from + share.packs * V < cols ? from + share.packs * V : cols;
    auto data = begin(row);
    const int line = row * cols;
#pragma unroll kUnroll
    for (int i = from + lane * V; i < end; i += share.lanes * V) visit(data, line + i);
    finish(lane == 0 && wanted < units ? unit : -1, data);
  }
  return share;
}

// Calls data = begin(group, column) once for a pack's columns, visit(data, row, offset) for the thread's
// share of the rows, then finish(group, column, data). Returns the number of groups that share the rows: row
// r belongs to group r % groups.
template <int V, int kUnroll, class Exec, class Begin, class Visit, class Finish>
VF_DEVICE int for_columns(Exec& ex, int rows, int cols, const Begin& begin, const Visit& visit,
                          const Finish& finish) {
  const int packs = cols / V, groups = packs < 1 || packs >= ex.threads() ? 1 : ex.threads() / packs;
#pragma unroll 1
  for (int unit = ex.thread(); unit < packs * groups; unit += ex.threads()) {
    const int group = unit / packs, column = unit % packs * V;
    auto data = begin(group, column);
#pragma unroll kUnroll
    for (int r = group; r < rows; r += groups) visit(data, r, r * cols + column);
    finish(group, column, data);
  }
  return groups;
}

// K coefficients for each element of a pack: of its row (W = 1) or of its columns.
template <int K, int W>
struct Coefficients {
  float v[K][W];
  VF_DEVICE float operator()(int k, int j) const { return v[k][W == 1 ? 0 : j]; }
};

template <int W, int K, class Vector>
VF_DEVICE Coefficients<K, W> coefficients(const Vector (&vectors)[K], int i) {
  Coefficients<K, W> c;
  VF_UNROLL
  for (int k = 0; k < K; ++k) get_floats(vectors[k], i, c.v[k]);
  return c;
}

}  // namespace visattn::cuda
