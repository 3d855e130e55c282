// The (shifted) windows of a map of tokens: where each window's tokens lie, and how work is split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace visattn {

// One axis of a map, padded to whole windows and shifted: which token stands at each position.
struct WindowAxis {
  int64_t window, count;
  bool seam;                    // in the last window
  std::vector<int64_t> source;  // -1 for padding
  std::vector<char> beyond;     // past the seam

  WindowAxis(int64_t size, int64_t window, int64_t shift, bool pad_first)
      : window(window),
        count((size + window - 1) / window),
        seam(shift > 0),
        source(count * window),
        beyond(source.size()) {
    const int64_t padded = count * window, cycle = pad_first ? padded : size;
    for (int64_t p = 0; p < padded; ++p) {
      const int64_t from = p < cycle ? (p + shift) % cycle : size;
      source[p] = from < size ? from : -1;
      beyond[p] = seam && p >= padded - shift;
    }
  }
};

struct Windows {
  int64_t N, H, W, heads, d;
  WindowAxis rows, columns;
  int64_t L;  // tokens of a window

  int64_t C() const { return heads * d; }
  int64_t per_image() const { return rows.count * columns.count; }
  int64_t table_rows() const { return (2 * rows.window - 1) * (2 * columns.window - 1); }

  // The token at each place of a window, counted from its image's first token, -1 for padding; and its
  // region, of four.
  void places(int64_t window, int64_t* token, int32_t* region) const {
    const int64_t at = window % per_image(), h0 = at / columns.count * rows.window,
                  w0 = at % columns.count * columns.window;
    for (int64_t h = h0; h < h0 + rows.window; ++h) {
      for (int64_t w = w0; w < w0 + columns.window; ++w) {
        const bool there = rows.source[h] >= 0 && columns.source[w] >= 0;
        *token++ = there ? rows.source[h] * W + columns.source[w] : -1;
        *region++ = 2 * rows.beyond[h] + columns.beyond[w];
      }
    }
  }

  bool has_seam(int64_t window) const {
    const int64_t at = window % per_image();
    return (rows.seam && at / columns.count == rows.count - 1) ||
           (columns.seam && at % columns.count == columns.count - 1);
  }

  // Calls f(offset in [L, ld], offset in a head's reversed table, count) for runs of adjacent biases. The
  // table is reversed, so that both offsets increase along a row of keys.
  template <class F>
  void each_bias(int64_t ld, const F& f) const {
    const int64_t wh = rows.window, ww = columns.window;
    for (int64_t i = 0; i < L; ++i) {
      const int64_t first = (wh - 1 - i / ww) * (2 * ww - 1) + ww - 1 - i % ww;
      for (int64_t h = 0; h < wh; ++h) f(i * ld + h * ww, first + h * (2 * ww - 1), ww);
    }
  }
};

// Work is split by heads and runs of windows. The number of runs depends on sizes alone, since each run has
// partial sums.
struct WindowRuns {
  int64_t windows, size, count;

  explicit WindowRuns(const Windows& w) : windows(w.N * w.per_image()) {
    constexpr int64_t kItems = 64;
    const int64_t wanted = std::max<int64_t>((kItems + w.heads - 1) / w.heads, 1);
    size = std::max<int64_t>((windows + wanted - 1) / wanted, 1);
    count = (windows + size - 1) / size;
  }
  int64_t begin(int64_t run) const { return run * size; }
  int64_t end(int64_t run) const { return std::min(windows, (run + 1) * size); }
};

}  // namespace visattn
