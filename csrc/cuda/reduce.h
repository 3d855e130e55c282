// Sums over the rows and the columns of a block's slab, in an order that the shape alone decides.
#pragma once

#include <cstdint>

#include "../common/geometry.h"
#include "portable.h"
#include "walk.h"

namespace visattn::cuda {

// Partial sums of the rows of a slab [rows, cols] or, with kDown, of its columns: `count` for each,
// `distance` apart.
struct Partials {
  int count, distance;
};

template <class Data, int V>
struct LineSum {
  Data data;
  float total[V];
};

// Writes sums of values(data, offset, out [V]) along rows, or with kDown down columns, to `partial`. data =
// begin(line) belongs to the row, or to the V columns from `line` on.
template <int V, int kUnroll, bool kDown, class Exec, class Partial, class Begin, class Values>
VF_DEVICE Partials line_sums(Exec& ex, int rows, int cols, Partial partial, const Begin& begin,
                             const Values& values) {
  using Sum = LineSum<decltype(begin(0)), V>;
  const auto start = [&](int line) {
    Sum sum = {};
    sum.data = begin(line);
    return sum;
  };
  const auto visit = [&](Sum& sum, int offset) {
    float v[V];
    values(sum.data, offset, v);
    VF_UNROLL
    for (int j = 0; j < V; ++j) sum.total[j] += v[j];
  };
  Partials p;
  if constexpr (kDown) {
    p.count = for_columns<V, kUnroll>(
        ex, rows, cols, [&](int, int column) { return start(column); },
        [&](Sum& sum, int, int offset) { visit(sum, offset); },
        [&](int group, int column, Sum& sum) { put_floats(partial, group * cols + column, sum.total); });
    p.distance = cols;
  } else {
    const int lanes = RowShare(rows, cols, V, ex.threads()).lanes;
    p.count = for_rows<V, kUnroll>(ex, rows, cols, start, visit, [&](int unit, Sum& sum) {
                VF_UNROLL
                for (int j = 1; j < V; ++j) sum.total[0] += sum.total[j];
                const float total = ex.template warp_sum<kRowLanes>(sum.total[0], lanes);
                if (unit >= 0) put(partial, unit, total);
              }).parts;
    p.distance = 1;
  }
  ex.sync_block();
  return p;
}

// The sum of `count` values from `i` on, `distance` apart.
template <class Partial>
VF_DEVICE float sum_of(Partial partial, const Partials& p, int i) {
  float total = get(partial, i);
#pragma unroll 4
  for (int k = 1; k < p.count; ++k) total += get(partial, i + k * p.distance);
  return total;
}

// Element i of `part`, summed over the team's blocks.
template <class Exec>
VF_DEVICE float over_team(Exec& ex, typename Exec::Exchange part, int i) {
  float total = get(ex.peer(part, 0), i);
#pragma unroll 8
  for (int r = 1; r < ex.team_size(); ++r) total += get(ex.peer(part, r), i);
  return total;
}

// A range [begin, end) of the inputs or the outputs of a product.
struct Span {
  int begin, end;
};

// Calls finish(o, sum over the inputs of w[o, i] x[i]) for rows o of w [.., width], by one lane.
template <class Exec, class W, class X, class Finish>
VF_DEVICE void product(Exec& ex, const W& w, Span outputs, Span inputs, int width, X x,
                       const Finish& finish) {
  // As few lanes for a row as keep all threads busy and read 32 adjacent bytes, or eight loads in flight for
  // a short row.
  const int count = inputs.end - inputs.begin, least = count > 64 ? 8 : count / 8;
  int lanes = kWarp;
  while (lanes > 1 &&
         (lanes / 2 >= count || (lanes > least && lanes * (outputs.end - outputs.begin) > ex.threads()))) {
    lanes /= 2;
  }
  const int lane = ex.thread() % lanes, inside = kWarp / lanes;
  with_elements(w, [&](const auto& elements) {
#pragma unroll 1
    for (int first = outputs.begin + ex.thread() / kWarp * inside; first < outputs.end;
         first += ex.threads() / lanes) {
      const int o = first + ex.thread() % kWarp / lanes;
      float total = 0;
#pragma unroll 8
      for (int i = inputs.begin + lane; i < (o < outputs.end ? inputs.end : 0); i += lanes)
        total += static_cast<float>(get(elements, int64_t{o} * width + i)) * get(x, i);
      const float sum = ex.warp_sum(total, lanes);
      if (lane == 0 && o < outputs.end) finish(o, sum);
    }
  });
}

// Calls finish(o, sums [B]), the sums over the inputs of w[i, o] x[b, i], for columns o of w [.., width], by
// one thread. The B vectors x begin `stride` apart.
template <int B, class Exec, class W, class X, class Partial, class Finish>
VF_DEVICE void product_transposed(Exec& ex, const W& w, Span outputs, Span inputs, int width, X x, int stride,
                                  Partial partial, const Finish& finish) {
  const int count = outputs.end > outputs.begin ? outputs.end - outputs.begin : 0;
  const int groups = count < 1 || count >= ex.threads() ? 1 : ex.threads() / count;
  with_elements(w, [&](const auto& elements) {
#pragma unroll 1
    for (int unit = ex.thread(); unit < count * groups; unit += ex.threads()) {
      const int o = outputs.begin + unit % count;
      float total[B] = {};
#pragma unroll 4
      for (int i = inputs.begin + unit / count; i < inputs.end; i += groups) {
        const float weight = static_cast<float>(get(elements, int64_t{i} * width + o));
        VF_UNROLL
        for (int b = 0; b < B; ++b) total[b] += weight * get(x, b * stride + i);
      }
      VF_UNROLL
      for (int b = 0; b < B; ++b) put(partial, b * count * groups + unit, total[b]);
    }
  });
  ex.sync_block();
#pragma unroll 1
  for (int o = ex.thread(); o < count; o += ex.threads()) {
    float sums[B];
    VF_UNROLL
    for (int b = 0; b < B; ++b) sums[b] = sum_of(partial, {groups, count}, b * count * groups + o);
    finish(outputs.begin + o, sums);
  }
}

// Calls f(j, channel) for the V elements from `offset` on of a slab whose first row is `row0`.
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

// Calls visit(offset, coefficients) for each pack of the block's slab. The vectors [C] hold coefficients of
// the channels.
template <int V, int kUnroll, bool kNhwc, int kAccess, int K, class Exec, class Vector, class Visit>
VF_DEVICE void for_scaled(Exec& ex, const Geometry& g, int count, const Vector (&vectors)[K],
                          const Visit& visit) {
  const int row0 = ex.rank() * g.slab, rows = count / g.cols;
  if constexpr (kAccess == kRagged) {
#pragma unroll 1
    for (int i = ex.thread() * V; i < count; i += ex.threads() * V) {
      Coefficients<K, V> c;
      for_channels<V, kNhwc, kAccess>(i, row0, g.cols, [&](int j, int channel) {
        VF_UNROLL
        for (int k = 0; k < K; ++k) c.v[k][j] = get(vectors[k], channel);
      });
      visit(i, c);
    }
  } else if constexpr (kNhwc) {
    for_columns<V, kUnroll>(
        ex, rows, g.cols, [&](int, int column) { return coefficients<V>(vectors, column); },
        [&](const Coefficients<K, V>& c, int, int offset) { visit(offset, c); },
        [](int, int, const auto&) {});
  } else {
    for_rows<V, kUnroll>(
        ex, rows, g.cols, [&](int row) { return coefficients<1>(vectors, row0 + row); },
        [&](const Coefficients<K, 1>& c, int offset) { visit(offset, c); }, [](int, const auto&) {});
  }
}

// Like for_channels, with each element's pixel as the block counts them: from the image's first in nchw, from
// the slab's first in nhwc.
template <int V, bool kNhwc, int kAccess, class F>
VF_DEVICE void for_elements(int offset, int row0, int cols, const F& f) {
  const int line = offset / cols;
  for_channels<V, kNhwc, kAccess>(offset, row0, cols, [&](int j, int c) {
    f(j, c, !kNhwc ? offset + j - (c - row0) * cols : kAccess == kRagged ? (offset + j) / cols : line);
  });
}

}  // namespace visattn::cuda
