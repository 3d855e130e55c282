// Sum, maximum and argmax of each row of a slab.
#pragma once

#include <cmath>

#include "../common/geometry.h"
#include "portable.h"
#include "stats.h"
#include "tiles.h"
#include "walk.h"

namespace visattn::cuda {

// Calls finish(row, Stat) for each of the block's rows; the argmax is the column. values(offset, out [V])
// reads elements.
template <int V, class Exec, class Partial, class Values, class Finish>
VF_DEVICE void row_stats(Exec& ex, int rows, int cols, Partial partial, const Values& values,
                         const Finish& finish) {
  struct Lane {
    float sum[V], most;
    int line, at;  // offset of the row, and of the pack with the maximum
  };
  const RowShare share(rows, cols, V, ex.threads());
  const int lane = (ex.thread() & (share.lanes - 1)), count = rows * share.parts;
  for_rows<V, 4>(
      ex, rows, cols,
      [&](int row) {
        Lane l = {};
        l.most = -INFINITY, l.line = row * cols, l.at = -1;
        return l;
      },
      [&](Lane& l, int offset) {
        float v[V];
        values(offset, v);
        VF_UNROLL
        for (int j = 0; j < V; ++j) l.sum[j] += v[j];
        const float most = most_of(v);
        if (most > l.most || l.at < 0) l.most = most, l.at = offset;
      },
      [&](int unit, Lane& l) {
        VF_UNROLL
        for (int j = 1; j < V; ++j) l.sum[0] += l.sum[j];
        Stat s;
        if (l.at >= 0) {
          float v[V];
          values(l.at, v);
          s.peak = peak_of(v, l.at - l.line);
          if (l.sum[0] != l.sum[0]) {
        // A lane whose first pack is all NaN reports a later one, so look through all of the row.
#pragma unroll 1
            for (int i = lane * V; i < cols; i += share.lanes * V) {
              values(l.line + i, v);
              const Peak other = peak_of(v, i);
              if (beats(other, s.peak)) s.peak = other;
            }
          }
        }
        s.sum = ex.template warp_sum<kRowLanes>(l.sum[0], share.lanes);
        s.peak = ex.template warp_peak<kRowLanes>(s.peak, share.lanes);
        if (unit >= 0) put_stat(partial, count, unit, s);
      });
  ex.sync_block();
  for (int r = ex.thread(); r < rows; r += ex.threads()) {
    Stat s = get_stat(partial, count, r * share.parts);
    for (int k = 1; k < share.parts; ++k) s.merge(get_stat(partial, count, r * share.parts + k));
    finish(r, s);
  }
}

// The same for v = data * a coefficient of its column, for short rows: a lane keeps the coefficients of its
// packs in registers for all of its rows. `factors` [cols] are the coefficients.
template <int V, int K, class Exec, class Partial, class Values, class Finish>
VF_DEVICE void scaled_row_stats(Exec& ex, int rows, int cols, Partial partial,
                                typename Exec::template Shared<float> factors, const Values& values,
                                const Finish& finish) {
  struct Factors {
    float v[V];
  };
  const Tiling t = tiling_of(cols, V, ex.threads(), kRowLanes, K);
  const int lane = (ex.thread() & (t.lanes - 1));
  const auto scaled = [&](int offset, const Factors& f, float (&v)[V]) {
    values(offset, v);
    VF_UNROLL
    for (int j = 0; j < V; ++j) v[j] *= f.v[j];
  };
  for_tiles<V, K, 1>(
      ex, t, rows, cols,
      [&](int column) {
        Factors f = {};
        if (column >= 0) get_floats(factors, column, f.v);
        return f;
      },
      [&](int row, const int (&columns)[K], int chunk, const Factors(&f)[K]) {
        float sum = 0;
        Peak most{-INFINITY, columns[0] < 0 || row >= rows ? Peak{}.at : columns[0]};
        VF_UNROLL
        for (int k = 0; k < K; ++k) {
          const bool has = columns[k] >= 0 && row < rows;
          float v[V];
          scaled(has ? row * cols + columns[k] : 0, f[k], v);
          const float pack = most_of(v);
          if (has && pack > most.value) most = {pack, columns[k]};
          VF_UNROLL
          for (int j = 1; j < V; ++j) v[0] += v[j];
          sum += has ? v[0] : 0.0f;
        }
        const bool odd = sum != sum;
        Stat s;
        s.sum = ex.template warp_sum<kRowLanes>(sum, t.lanes);
        if (ex.warp_any(odd)) {
          most = {};
#pragma unroll 1
          for (int k = 0; k < K; ++k) {
            const int column = (chunk * K + k) * t.lanes * V + lane * V;
            if (row >= rows || column >= cols) continue;
            float v[V], factor[V];
            values(row * cols + column, v);
            get_floats(factors, column, factor);
            VF_UNROLL
            for (int j = 0; j < V; ++j) v[j] *= factor[j];
            const Peak other = peak_of(v, column);
            if (beats(other, most)) most = other;
          }
        }
        s.peak = ex.template warp_peak<kRowLanes>(most, t.lanes);
        if (lane == 0 && row < rows) put_stat(partial, rows * t.chunks, row * t.chunks + chunk, s);
      },
      [](int, const int (&)[K], Factors(&)[K]) {});
  ex.sync_block();
  for (int r = ex.thread(); r < rows; r += ex.threads()) {
    Stat s = get_stat(partial, rows * t.chunks, r * t.chunks);
    for (int k = 1; k < t.chunks; ++k) s.merge(get_stat(partial, rows * t.chunks, r * t.chunks + k));
    // Locate the maximum in its pack: for finite rows only the pack is known so far.
    if (s.peak.value == s.peak.value && s.peak.at < cols) {
      const int pack = s.peak.at / V * V;
      float v[V], factor[V];
      values(r * cols + pack, v);
      get_floats(factors, pack, factor);
      VF_UNROLL
      for (int j = 0; j < V; ++j) v[j] *= factor[j];
      s.peak = peak_of(v, pack);
    }
    finish(r, s);
  }
}

}  // namespace visattn::cuda
