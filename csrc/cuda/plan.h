// How a call is cut into thread blocks, and why: the one place that decides. Plain C++, so that it is tested,
// and printed by `visattn-fast info --shape`, where there is no GPU. The figures are capacities and
// alignments; no rule here rests on a measurement yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace visattn::cuda {

// What a kernel is told of the maps. An image is a matrix [rows, cols]: [C, P] in nchw, [P, C] in nhwc. A
// team of `team` thread blocks works on one image at a time; block k has its rows [k * slab, (k + 1) * slab).
struct Geometry {
  int64_t N = 0, stride_n = 0;  // of x; every other map is dense
  int C = 0, P = 0, R = 0;      // R: hidden units of the gate, 0 if it has none
  int rows = 0, cols = 0, slab = 0, team = 1;
  int W = 0, window = 0;            // of the convolution of the maps; 0 if there is none
  int pixels = 0;                   // how many of P a block computes the gates of
  int channels = 0, hidden = 0;     // how many of C and of R a block computes
  int stages = 0, stage_bytes = 0;  // resident slabs, and their distance in shared memory
};

// Elements are accessed 16 bytes at a time, of which none straddles two rows (kWideRows) or some do
// (kRagged), or one by one (kNarrow).
enum Access : int { kWideRows = 0, kRagged = 1, kNarrow = 2 };

enum Variant : int { kCluster = 0, kSemaphore = 1, kRefused = 2 };

// Floats beside the slabs: first those of one block, then those that its team reads, twice, for alternate
// images.
struct Scratch {
  int partial = 0, mean = 0, hidden = 0, gate = 0, own = 0;  // offsets, and their total
  int sums = 0, mean_part = 0, hidden_part = 0, gate_part = 0, shared = 0;

  // Of the convolution: its maps and gates, and what pools into them.
  int maximum = 0, halo = 0, spatial = 0, max_part = 0, map_part = 0, spatial_part = 0, pixel_stats = 0;

  // With maps there are enough barriers between two uses of the exchange, and it is there once.
  int copies() const { return map_part ? 1 : 2; }
  int floats(bool resident) const { return own + (resident ? copies() * shared : 0); }
};

struct Device {
  int sm = 0;            // 90 for compute capability 9.0
  int count = 0;         // streaming multiprocessors
  int shared_bytes = 0;  // that one block may have
  int64_t l2_bytes = 0;
};

struct Plan {
  Variant variant = kRefused;
  Access access = kNarrow;
  Geometry geometry;
  Scratch scratch;
  int threads = 0, blocks = 0, teams = 0;
  int shared_bytes = 0;
  const char* why = "";
};

// Two blocks share the registers of a multiprocessor: 64 a thread, in which SE's backward and CBAM
// do not fit.
constexpr int kThreads = 512, kFewThreads = 256;
constexpr int kHeader = 128, kMostStages = 2, kLargestCluster = 16;

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int round_up(int64_t a, int64_t b) { return ceil_div(a, b) * static_cast<int>(b); }

// Partial statistics of a block: three of each row, or of each group of threads and column.
inline int stats_of(const Geometry& g, int threads, int pack) {
  const int groups = threads / std::max(g.cols / pack, 1);
  return 3 * std::max({g.slab, threads / 32, groups > 1 ? groups * g.cols : 0});
}

template <class Take>
void add_maps(Scratch& s, const Geometry& g, bool nhwc, const Take& take) {
  const int rows = std::min(g.P / g.W, ceil_div(g.pixels, g.W) + g.window);
  s.maximum = take(s.own, g.C);
  s.halo = take(s.own, 2 * rows * g.W);
  s.spatial = take(s.own, nhwc ? g.slab : g.P);
  s.max_part = take(s.shared, g.channels);
  s.map_part = take(s.shared, 2 * g.pixels);
  s.spatial_part = take(s.shared, nhwc ? 0 : g.pixels);
  s.pixel_stats = take(s.shared, nhwc ? 0 : 3 * g.P);
}

inline Scratch scratch_of(const Geometry& g, bool nhwc, int threads, int pack) {
  Scratch s;
  const int parts = nhwc ? std::max(threads / std::max(g.cols / pack, 1), 1) * g.cols : g.slab;
  const auto take = [](int& total, int count) {
    return total += round_up(count, 4), total - round_up(count, 4);
  };
  // Products with transposed weights sum over groups of threads, too.
  s.partial = take(
      s.own, std::max({parts, threads, g.channels, g.hidden, g.window ? stats_of(g, threads, pack) : 0}));
  s.mean = take(s.own, g.C);
  s.hidden = take(s.own, g.R);
  s.gate = take(s.own, g.C);
  s.sums = take(s.shared, nhwc ? (g.window ? 3 : 1) * g.C : 0);
  s.mean_part = take(s.shared, g.channels);
  s.hidden_part = take(s.shared, g.hidden);
  s.gate_part = take(s.shared, g.channels);
  if (g.window) add_maps(s, g, nhwc, take);
  return s;
}

// How many rows make up whole packs.
inline int row_unit(const Plan& p, int element) {
  return p.access == kNarrow
             ? 1
             : 16 / static_cast<int>(std::gcd<int64_t>(16, int64_t{p.geometry.cols} * element));
}

// Gives each of `team` blocks its rows; the last ones may get fewer, or none.
inline void divide(Plan& p, int team, int element, bool nhwc, int stages) {
  Geometry& g = p.geometry;
  g.team = team;
  g.slab = round_up(ceil_div(g.rows, team), row_unit(p, element));
  g.channels = nhwc ? ceil_div(g.C, team) : g.slab;
  g.hidden = ceil_div(g.R, team);
  g.pixels = nhwc ? g.slab : ceil_div(g.P, team);
  g.stages = stages;
  g.stage_bytes = stages ? round_up(int64_t{g.slab} * g.cols * element, 128) : 0;
  p.scratch = scratch_of(g, nhwc, p.threads, p.access == kWideRows ? 16 / element : 1);
  p.shared_bytes = kHeader + stages * g.stage_bytes + 4 * p.scratch.floats(stages > 0);
}

inline bool fits(Plan& p, int team, int element, bool nhwc, int stages, int bytes) {
  const int64_t slab = int64_t{ceil_div(p.geometry.rows, team)} * p.geometry.cols * element;
  if (slab * stages > bytes) return false;
  divide(p, team, element, nhwc, stages);
  return p.shared_bytes <= bytes;
}

// What each of two blocks on one multiprocessor may have; a block takes 1 KB more than it asks for.
inline int half_of(const Device& d) { return (d.shared_bytes + 1024) / 2 - 1024; }

// The smallest cluster whose blocks hold the image, two blocks to a multiprocessor if that can be.
inline bool plan_cluster(Plan& p, int element, bool nhwc, const Device& d) {
  const Geometry& g = p.geometry;
  const int half = half_of(d);
  for (const int bytes : {half, d.shared_bytes}) {
    for (int team = 1; team <= kLargestCluster; team *= 2) {
      if (!fits(p, team, element, nhwc, 1, bytes)) continue;
      const int64_t image = int64_t{g.rows} * g.cols * element;
      // Few images: more blocks an image, while a block's part is worth a copy.
      while (team < kLargestCluster && g.N * team < d.count && image / (2 * team) >= 4096 &&
             2 * team * row_unit(p, element) <= g.rows) {
        team *= 2;
      }
      const bool twice = g.N * team > 2 * d.count;
      if (!(twice && fits(p, team, element, nhwc, 2, bytes))) divide(p, team, element, nhwc, 1);
      p.variant = kCluster;
      p.teams =
          static_cast<int>(std::min<int64_t>(g.N, std::max(1, (bytes == half ? 2 : 1) * d.count / team)));
      p.why = bytes == half ? "an image fits the shared memory of a cluster, two blocks to a multiprocessor"
                            : "an image fits the shared memory of a cluster";
      return true;
    }
  }
  return false;
}

// Every resident block works at once; as many images are under way as half of the L2 cache holds.
inline bool plan_semaphore(Plan& p, int element, bool nhwc, const Device& d, int to_a_multiprocessor = 2) {
  const int64_t image = int64_t{p.geometry.rows} * p.geometry.cols * element;
  const int resident = to_a_multiprocessor * d.count;
  const int64_t in_cache = std::max<int64_t>(1, d.l2_bytes / 2 / std::max<int64_t>(image, 1));
  p.teams = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({p.geometry.N, in_cache, resident})));
  const int wanted = std::max(1, ceil_div(image, 1 << 14));
  divide(p, std::max(1, std::min({resident / p.teams, wanted, p.geometry.rows})), element, nhwc, 0);
  p.variant = kSemaphore;
  p.why = p.access == kNarrow ? "images do not begin at multiples of 16 bytes: teams of blocks meet at "
                                "semaphores, images stay in L2"
          : d.sm < 90
              ? "no clusters before sm_90: teams of blocks meet at semaphores, images stay in L2"
              : "an image does not fit a cluster: teams of blocks meet at semaphores, images stay in L2";
  if (to_a_multiprocessor == 1) return p.shared_bytes <= d.shared_bytes;
  return p.shared_bytes <= half_of(d) || plan_semaphore(p, element, nhwc, d, 1);
}

// element: bytes. aligned: x and every other map start at a multiple of 16 bytes, and so does each image.
inline Plan plan(int64_t N, int64_t C, int64_t P, int64_t R, int64_t stride_n, int element, bool nhwc,
                 bool aligned, const Device& d, int threads = kThreads, int W = 0, int window = 0) {
  Plan p;
  constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);  // indices may go one turn of all threads too far
  if (C * P > kMost || C * R > kMost || (window && P >= (1 << 24))) {
    p.why = "an image, a map or a weight is too large for 32-bit indices";
    return p;
  }
  Geometry& g = p.geometry;
  g.N = N, g.stride_n = stride_n;
  g.C = static_cast<int>(C), g.P = static_cast<int>(P), g.R = static_cast<int>(R);
  g.rows = nhwc ? g.P : g.C, g.cols = nhwc ? g.C : g.P;
  g.W = W, g.window = window;
  p.threads = threads;
  const bool whole = aligned && C * P * element % 16 == 0 && stride_n * element % 16 == 0;
  p.access = !whole ? kNarrow : g.cols * int64_t{element} % 16 == 0 ? kWideRows : kRagged;
  const bool copies = d.sm >= 90 && whole;  // in bulk, of 16 bytes and multiples
  if (!(copies && plan_cluster(p, element, nhwc, d)) && !plan_semaphore(p, element, nhwc, d)) {
    p.variant = kRefused;
    p.why = "the gates of a map of this size do not fit the shared memory of a thread block";
    return p;
  }
  p.blocks = p.teams * p.geometry.team;
  return p;
}

}  // namespace visattn::cuda
