// Sums along both axes of an image: of x, or (kProduct) of g x weighted with the other axis's gate.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/tensor.h"
#include "line_layout.h"
#include "matrix.h"
#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "wide_sums.h"

namespace visattn {

// The first channel, among those up to c1 of an nchw image, past whose rows whole vectors may not be read or
// written. At least a vector's elements follow the rows of earlier channels, in the map and in the lines.
template <class A>
VF_INLINE inline int64_t first_guarded(const Shape& s, int64_t ld, int64_t c1) {
  const int64_t L = s.H + s.W, least = s.P < L ? s.P : L;
  return ld < s.P ? 0 : c1 - (kLanes<A> + least - 1) / least;  // all planes may be the same memory
}

// Adds R rows of a plane to columns [W], which is padded. `rows` receives a vector for each row, whose lanes
// are still to be summed. kLong rows have several chunks.
template <class T, bool kProduct, bool kLong, int R>
VF_INLINE inline void plane_rows(const T* x, const T* g, int64_t W, bool free, const Acc<T>* gate_h,
                                 const Acc<T>* gate_w, Acc<T>* rows, Acc<T>* columns) {
  using A = Acc<T>;
  Vec<A> weight[R];
  Wide<A> total[R] = {};
  for (int r = 0; r < R; ++r) weight[r] = set1<A>(kProduct ? gate_h[r] : A(1));
  Vec<A> part[R] = {};
  for (int64_t w0 = 0; w0 < W; w0 += kChunk * kLanes<A>) {
    const int64_t count = W - w0 < kChunk * kLanes<A> ? W - w0 : kChunk * kLanes<A>;
    const auto add = [&](int64_t i, auto lanes) VF_INLINE {
      const int64_t w = w0 + i;
      Vec<A> across = set1<A>(0), of_column = across;
      if constexpr (kProduct) of_column = load(gate_w + w);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<A> v = load(x + r * W + w, lanes);
        if constexpr (kProduct) {
          v = v * load(g + r * W + w, lanes);
          part[r] += v * of_column;
          across += v * weight[r];
        } else {
          part[r] += v;
          across += v;
        }
      }
      store(columns + w, load(columns + w) + across);
    };
    const int64_t whole = count - count % kLanes<A>;
    const int rest = static_cast<int>(count - whole);
    for (int64_t i = 0; i < whole; i += kLanes<A>) add(i, Full{});
    if (rest && free) add(whole, Masked{rest});
    if (rest && !free) add(whole, Tail{rest});
    for (int r = 0; kLong && r < R; ++r) total[r] += widen<A>(part[r]), part[r] = set1<A>(0);
  }
  for (int r = 0; r < R; ++r) {
    store(rows + r * kLanes<A>, kLong ? __builtin_convertvector(total[r], Vec<A>) : part[r]);
  }
}

// out[i] = the sum of vector i's lanes, in the order of sum_lanes, for as many vectors as a vector has lanes.
template <class A>
VF_INLINE inline Vec<A> sums_of_vectors(const A* vectors) {
  constexpr int L = kLanes<A>;
  Vec<A> v[L];
  for (int i = 0; i < L; ++i) v[i] = load(vectors + i * L);
  transpose(v);
  for (int half = L / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// Sums for channels [c0, c1) of an nchw image: weighted with gate if kProduct, else divided to means; gate is
// then null.
template <class T, bool kProduct, bool kLong>
void plane_sums(const T* x, int64_t ld, const T* g, const Shape& s, Lines<const Acc<T>> gate,
                Lines<Acc<T>> out, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  Buffer<A> columns(s.W), column_gate(s.W), of_rows((s.H + L) * L);
  A *sums = columns.get(), *padded = column_gate.get(), *vectors = of_rows.get();
  const int64_t H = s.H, W = s.W, P = s.P;
  ColumnTotals<A> totals(H, W);
  double* const total[] = {totals.of(0)};
  simd([=]() VF_INLINE {
    const int64_t guarded = first_guarded<A>(s, ld, c1);
    for (int64_t c = c0; c < c1; ++c) {
      const T *px = x + c * ld, *pg = kProduct ? g + c * P : nullptr;
      const A* row_gate = kProduct ? gate.row(c, 0) : nullptr;
      const bool free = c < guarded;
      for (int64_t w = 0; w < W; w += L) store(sums + w, set1<A>(0));
      for (int64_t w = 0; total[0] && w < W; w += L) store_wide<A>(total[0] + w, Wide<A>{});
      if constexpr (kProduct) std::memcpy(padded, gate.column(c, 0), static_cast<size_t>(W) * sizeof(A));
      A* const of_columns[] = {sums};
      add_in_chunks(H, W, of_columns, total, [&](int64_t h, int64_t end) VF_INLINE {
        const auto rows = [&](auto count) VF_INLINE {
          constexpr int R = decltype(count)::value;
          for (; h + R <= end; h += R) {
            plane_rows<T, kProduct, kLong, R>(px + h * W, pg + h * W, W, free, row_gate + h, padded,
                                              vectors + h * L, sums);
          }
        };
        rows(std::integral_constant<int, 4>{});
        rows(std::integral_constant<int, 1>{});
      });
      const auto put = [&](A* to, int64_t i, int64_t count, Vec<A> v, int64_t by) VF_INLINE {
        if constexpr (!kProduct) v = v / static_cast<A>(by);
        if (free || i + L <= count) return store(to + i, v);
        store(to + i, v, Tail{static_cast<int>(count - i)});
      };
      for (int64_t h = 0; h < H; h += L) put(out.row(c, 0), h, H, sums_of_vectors(vectors + h * L), W);
      for (int64_t w = 0; w < W; w += L) put(out.column(c, 0), w, W, load(sums + w), H);
    }
  });
}

// Pixels [w0, w1) of R image rows of an nhwc image, from row h on, for channels [c0, c1). Overwrites the rows'
// sums, and with `fresh` those of the columns; else it adds to the columns.
template <class T, bool kProduct, int R>
VF_INLINE inline void pixel_rows(const T* x, int64_t ld, const T* g, const Shape& s,
                                 const Lines<const Acc<T>>& gate, const Lines<Acc<T>>& out, int64_t h,
                                 int64_t w0, int64_t w1, int64_t c0, int64_t c1, bool fresh) {
  using A = Acc<T>;
  for (int64_t w = w0; w < w1; ++w) {
    const T *px[R], *pg[R];
    A* rows[R];
    const A* row_gate[R];
    for (int r = 0; r < R; ++r) {
      const int64_t pixel = (h + r) * s.W + w;
      px[r] = x + pixel * ld + c0;
      pg[r] = kProduct ? g + pixel * s.C + c0 : nullptr;
      rows[r] = out.row(c0, h + r);
      row_gate[r] = kProduct ? gate.row(c0, h + r) : nullptr;
    }
    A* columns = out.column(c0, w);
    const A* column_gate = kProduct ? gate.column(c0, w) : nullptr;
    const bool first = w == w0;
    for_vectors<A>(c1 - c0, [&](int64_t c, auto lanes) VF_INLINE {
      Vec<A> across = set1<A>(0), of_column = across;
      if constexpr (kProduct) of_column = load(column_gate + c, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<A> v = load(px[r] + c, lanes), along = v;
        if constexpr (kProduct) {
          v = v * load(pg[r] + c, lanes);
          along = v * of_column;
          v = v * load(row_gate[r] + c, lanes);
        }
        across += v;
        store(rows[r] + c, first ? along : load(rows[r] + c, lanes) + along, lanes);
      }
      store(columns + c, fresh ? across : load(columns + c, lanes) + across, lanes);
    });
  }
}

// total = line, or with `add` total += line.
template <class A>
VF_INLINE inline void move_line(const A* line, int64_t channels, double* total, bool add) {
  for_vectors<A>(channels, [&](int64_t c, auto lanes) VF_INLINE {
    const Wide<A> v = widen<A>(load(line + c, lanes));
    store_wide<A>(total + c, add ? load_wide<A>(total + c) + v : v);
  });
}

template <class A>
VF_INLINE inline void round_line(A* line, int64_t channels, const double* total) {
  for_vectors<A>(channels, [&](int64_t c, auto lanes) VF_INLINE {
    store(line + c, __builtin_convertvector(load_wide<A>(total + c), Vec<A>), lanes);
  });
}

constexpr int64_t kPixels = 32;  // that are added up in A, one by one: not in vectors, as along dense rows

// Lines of up to kPixels values are added up in place. Longer ones move to doubles after each kPixels values.
template <class T, bool kProduct>
void pixel_sums(const T* x, int64_t ld, const T* g, const Shape& s, Lines<const Acc<T>> gate,
                Lines<Acc<T>> out, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  const int64_t channels = c1 - c0, pitch = whole_vectors<A>(channels);
  Buffer<double> of_rows(s.W > kPixels ? 4 * pitch : 0), of_columns(s.H > kPixels ? s.W * pitch : 0);
  double *row_totals = of_rows.get(), *column_totals = of_columns.get();
  simd([=]() VF_INLINE {
    const auto rows = [&](int64_t h, auto count) VF_INLINE {
      constexpr int R = decltype(count)::value;
      for (int64_t w = 0; w < s.W; w += kPixels) {
        const int64_t end = w + kPixels < s.W ? w + kPixels : s.W;
        pixel_rows<T, kProduct, R>(x, ld, g, s, gate, out, h, w, end, c0, c1, h % kPixels == 0);
        for (int r = 0; row_totals && r < R; ++r) {
          move_line(out.row(c0, h + r), channels, row_totals + r * pitch, w > 0);
        }
      }
      for (int r = 0; row_totals && r < R; ++r) {
        round_line(out.row(c0, h + r), channels, row_totals + r * pitch);
      }
    };
    for (int64_t h = 0; h < s.H;) {
      const int64_t first = h, end = h + kPixels < s.H ? h + kPixels : s.H;
      for (; h + 4 <= end; h += 4) rows(h, std::integral_constant<int, 4>{});
      for (; h < end; ++h) rows(h, std::integral_constant<int, 1>{});
      for (int64_t w = 0; column_totals && w < s.W; ++w) {
        move_line(out.column(c0, w), channels, column_totals + w * pitch, first > 0);
      }
    }
    for (int64_t w = 0; column_totals && w < s.W; ++w) {
      round_line(out.column(c0, w), channels, column_totals + w * pitch);
    }
  });
}

template <class T, bool kProduct>
void axis_sums(const T* x, int64_t ld, const T* g, const Shape& s, Lines<const Acc<T>> gate,
               Lines<Acc<T>> out, int64_t c0, int64_t c1) {
  if (out.nhwc) {
    pixel_sums<T, kProduct>(x, ld, g, s, gate, out, c0, c1);
  } else if (s.W > kChunk * kLanes<Acc<T>>) {
    plane_sums<T, kProduct, true>(x, ld, g, s, gate, out, c0, c1);
  } else {
    plane_sums<T, kProduct, false>(x, ld, g, s, gate, out, c0, c1);
  }
}

}  // namespace visattn
