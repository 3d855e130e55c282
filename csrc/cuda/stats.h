// Sum, maximum and its index, over the rows and down the columns of an image. NaN wins a maximum, and of
// equal values the first does, so that no order of merging matters.
#pragma once

#include "channel_gate.h"
#include "tiles.h"

namespace visattn::cuda {

struct Stat {
  float sum = 0;
  Peak peak;

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

// A maximum that NaN has no part in, whose place is that of the first pack, or row, that has it. A sum is NaN
// where any element is (and may be where none is): then the elements are gone through again.
template <int V>
VF_DEVICE float most_of(const float (&v)[V]) {
  float most = v[0];
  VF_UNROLL
  for (int j = 1; j < V; ++j) most = fmaxf(most, v[j]);
  return most;
}

// The first of a pack's elements that beats all others of it; the first one is number `first`.
template <int V>
VF_DEVICE Peak peak_of(const float (&v)[V], int first) {
  Peak peak;
  VF_UNROLL
  for (int j = 0; j < V; ++j) {
    const Peak other{v[j], first + j};
    if (beats(other, peak)) peak = other;
  }
  return peak;
}

// finish(row, Stat) for each of the block's rows; the index is the column. values(offset, out [V]).
template <int V, class Exec, class Partial, class Values, class Finish>
VF_DEVICE void row_stats(Exec& ex, int rows, int cols, Partial partial, const Values& values,
                         const Finish& finish) {
  struct Lane {
    float sum[V], most;
    int line, at;  // of the row, and of the pack with the maximum
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
        // A lane whose first pack has only NaN is at a later one, hence all of the row.
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

// The same of v = data * a coefficient of its column, for rows that are short: a lane keeps the coefficients
// of its packs in registers for all of its rows. factors(column, out [V]).
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
        const bool odd = sum != sum;  // in any lane
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
    // Where in its pack: where all is finite, only that has been found so far.
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

// How blocks exchange the statistics of their columns: as three vectors [cols].
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

// Of x [rows, cols] times `gates` of its rows, where x has two bytes: as the sums, and x with its row in one
// word. Every block has the gates of its rows.
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
  VF_DEVICE int blocks() const { return (all_rows + slab_rows - 1) / slab_rows; }  // those with rows
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

// finish(column, Stat) for the columns of `part`, down the rows of all blocks of the team; the index is the
// row of the image, of which the block's first is row0. `stats`: one of those above; values(row, offset, out
// [V]).
template <int V, class Exec, class Partial, class Stats, class Values, class Finish>
VF_DEVICE void column_stats(Exec& ex, int rows, int cols, int row0, const Part& part, Partial partial,
                            const Stats& stats, const Values& values, const Finish& finish) {
  struct Lane {
    float sum[V], most[V];
    int at[V];
  };
  const int packs = cols / V, groups = packs < 1 || packs >= ex.threads() ? 1 : ex.threads() / packs;
  const Partial winners = partial + groups * cols;  // [cols]: the maxima of all groups
  // Of groups, one vector after the other passes through `partial`; a thread has one pack of columns then.
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
