// How a call is cut into thread blocks, and why: the one place that decides. Plain C++, so that it is tested,
// and printed by `visattn-fast info --shape`, where there is no GPU. The figures are capacities and
// alignments, and what the device says of the clusters that it runs at once (launch.h); no rule here rests on
// a measurement.
//
// A block has a multiprocessor to itself. Its shared memory holds its part of an image and of the next one,
// so that the next is on its way while this one is summed, gated and stored; where all images are at work at
// once, none follows and one part is enough. So the smallest team is taken that leaves room for both, up to
// sixteen blocks, or else for one, and the next comes as far as the L2 cache. CBAM's backward holds x and
// grad, and gives x back before it is done with grad. Teams are as many as run at once, less those that would
// not shorten the longest queue of images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace visattn::cuda {

// What a kernel is told of the maps. An image is a matrix [rows, cols]: [C, P] in nchw, [P, C] in nhwc. A
// team of `team` thread blocks works on one image at a time; block k has its rows [k * slab, (k + 1) * slab).
struct Geometry {
  int64_t N = 0, stride_n = 0;  // of the first map that is held; of two, x
  int C = 0, P = 0, R = 0;      // R: hidden units of the gate, 0 if it has none
  int rows = 0, cols = 0, slab = 0, team = 1;
  int W = 0, window = 0;            // of the convolution of the maps; 0 if there is none
  int pixels = 0;                   // how many of P a block computes the gates of
  int channels = 0, hidden = 0;     // how many of C and of R a block computes
  int stages = 0, stage_bytes = 0;  // resident slabs of each map, and their distance in shared memory
  int held = 1;                     // how many maps have resident slabs

  constexpr int slab_bytes() const { return held * stages * stage_bytes; }

  // Whether every block of a team computes the gates of all channels, rather than wait for the others' part.
  constexpr bool computes_all() const { return int64_t{C} * R <= 1 << 14; }
};

// What is asked for. aligned: every map starts at a multiple of 16 bytes, and so does each of its images.
struct Problem {
  int64_t N, C, P, R, stride_n;
  int element;  // bytes
  bool nhwc, aligned, backward;
  int W = 0, window = 0;  // of CBAM: 0 for SE and ECA
  int threads = 0;        // 0: as many as the kernels are compiled for
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
  int maximum = 0, halo = 0, taps = 0, spatial = 0, max_part = 0, map_part = 0, spatial_part = 0,
      pixel_stats = 0;

  // Of its backward: sums, indices and gradients of the block's rows, and what the maps get.
  int direct = 0, at_channel = 0, lines = 0, grad_part = 0, conv_part = 0;

  // With maps there are enough barriers between two uses of the exchange, and it is there once.
  int copies = 2;

  // The end of a block's own floats, where shared memory has the beginning of the exchange, too: each is done
  // with when the other is written.
  int overlap = 0;
  int floats(bool resident) const { return own + (resident ? copies * shared - overlap : 0); }
};

// How the warps of a block share its rows in `for_tiles`: a warp's lanes lie over `lanes` packs of a row, or
// a few times as many, and over several rows where those are short; `chunks` of them make up a row, and
// `groups` of lanes take turns down the rows. Eight lanes fetch the 128 bytes that shared memory gives at
// once.
constexpr int kRowLanes = 8, kWarpLanes = 32;

struct Tiling {
  int lanes = 1, chunks = 1, groups = 1;
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
  bool one_launch = false;  // backward sums the weights' gradients over the batch in the same launch
  const char* why = "";

  // Floats that the blocks of semaphore teams exchange in global memory, and their semaphores.
  int64_t exchange_floats() const {
    return variant == kSemaphore ? int64_t{scratch.copies} * blocks * scratch.shared : 0;
  }
  int64_t workspace_words() const { return variant == kSemaphore ? exchange_floats() + teams : 0; }
};

// One block has a multiprocessor to itself, 128 registers for each thread, and shared memory for two slabs:
// the next image comes while the last is summed, gated and stored. Two blocks with a slab each would have as
// much memory and would load, wait and store by turns.
constexpr int kThreads = 512;
constexpr int kHeader = 128, kMostStages = 2, kLargestCluster = 16;

// Bytes of x up to which backward is a matter of launches more than of memory.
constexpr int64_t kSmallMaps = 1 << 20;

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int round_up(int64_t a, int64_t b) { return ceil_div(a, b) * static_cast<int>(b); }

constexpr Tiling tiling_of(int cols, int pack, int threads, int most_lanes = kWarpLanes, int each = 1) {
  Tiling t;
  const int packs = cols / pack, warps = threads / 32;
  while (t.lanes < packs && t.lanes < most_lanes) t.lanes *= 2;
  t.chunks = packs > t.lanes * each ? ceil_div(packs, t.lanes * each) : 1;
  t.groups = (warps > t.chunks ? warps / t.chunks : 1) * (32 / t.lanes);
  return t;
}

// How many packs of a row a lane keeps the coefficients of: eight lanes have all of a row of 256 channels.
constexpr int kKept = 4;
constexpr int kept_of(int cols, int pack) { return cols / pack < kKept * kRowLanes ? 1 : kKept; }

// Partial statistics of a block: three of each part of a row, or one of each group of threads and column.
inline int stats_of(const Geometry& g, int threads, int pack) {
  const int groups = threads / std::max(g.cols / pack, 1);
  const Tiling rows = tiling_of(g.cols, pack, threads, kRowLanes, kept_of(g.cols, pack));
  return std::max(
      {3 * std::max(g.slab * rows.chunks, threads / rows.lanes), groups > 1 ? (groups + 1) * g.cols : 0});
}

// What the windows around a block's pixels reach of a map, and zeros beside it.
inline int halo_of(const Geometry& g) {
  return (ceil_div(g.pixels, g.W) + g.window) * (g.W + 2 * (g.window / 2));
}

template <class Take>
void add_map_gradients(Scratch& s, const Geometry& g, bool nhwc, const Take& take) {
  s.maximum = take(s.own, g.C);
  s.halo = take(s.own, halo_of(g));
  s.taps = take(s.own, 2 * g.window * g.window);
  s.spatial = take(s.own, g.pixels);
  s.direct = take(s.own, nhwc ? 0 : g.slab);
  s.at_channel = take(s.own, g.C);
  s.lines = take(s.own, 4 * g.slab);
  s.max_part = take(s.shared, nhwc ? g.channels : 0);
  s.map_part = take(s.shared, g.pixels);
  s.grad_part = take(s.shared, nhwc ? 0 : 2 * g.pixels);
  s.conv_part = take(s.shared, 2 * g.window * g.window + 1);
}

template <class Take>
void add_maps(Scratch& s, const Geometry& g, bool nhwc, const Take& take) {
  s.maximum = take(s.own, g.C);
  s.taps = take(s.own, 2 * g.window * g.window);
  s.spatial = take(s.own, nhwc ? g.slab : 0);
  s.map_part = take(s.shared, 2 * g.pixels);
  s.spatial_part = take(s.shared, nhwc ? 0 : g.pixels);
}

// Floats that sums over rows and columns of a slab pass through, none of which needs another's.
inline int partial_of(const Geometry& g, const Problem& q, int threads, int pack) {
  // With transposed weights, which only backward has, by groups.
  const int outputs = q.nhwc && g.computes_all() ? g.C : g.channels;
  const int products = q.backward ? (g.window ? 2 : 1) * std::max({threads, outputs, g.R}) : threads;
  if (g.window && q.backward) {
    const Tiling t = tiling_of(g.cols, pack, threads);
    return std::max(products, round_up(g.slab * t.chunks, 4) + (t.groups > 1 ? t.groups * g.cols : 0));
  }
  const int groups = std::max(threads / std::max(g.cols / pack, 1), 1);
  return std::max({products, q.nhwc ? groups * g.cols : g.slab, g.window ? stats_of(g, threads, pack) : 0});
}

inline Scratch scratch_of(const Geometry& g, const Problem& q, int threads, int pack) {
  Scratch s;
  const int branches = g.window && q.backward ? 2 : 1;
  const auto take = [](int& total, int count) {
    return total += round_up(count, 4), total - round_up(count, 4);
  };
  s.mean = take(s.own, g.C);
  s.hidden = take(s.own, branches * g.R);
  s.gate = take(s.own, g.C);
  if (g.window && !q.backward) s.pixel_stats = take(s.shared, q.nhwc ? 0 : (q.element == 2 ? 2 : 3) * g.P);
  const int pixel_stats = s.shared;
  s.sums = take(s.shared, q.nhwc ? (g.window && !q.backward ? 3 : 1) * g.C : branches == 2 ? g.P : 0);
  s.mean_part = take(s.shared, g.channels);
  s.hidden_part = take(s.shared, (g.window && !q.backward ? 2 : 1) * g.R);
  s.gate_part = take(s.shared, g.channels);
  if (g.window) {
    s.copies = 1;
    q.backward ? add_map_gradients(s, g, q.nhwc, take) : add_maps(s, g, q.nhwc, take);
  }
  // What the convolution reaches is gathered when the sums before it are done, and the other way round.
  const bool convolves = g.window && !q.backward;
  const int partial = std::max(partial_of(g, q, threads, pack), convolves ? 2 * halo_of(g) : 0);
  s.partial = take(s.own, partial);
  if (convolves) s.halo = s.partial;
  // Sums over pixels go straight into the exchange where there is a pack for every thread.
  if (convolves && !q.nhwc && g.cols / pack > threads / 2)
    s.overlap = std::min(s.own - s.partial, pixel_stats);
  return s;
}

// How many rows make up whole packs.
inline int row_unit(const Plan& p, int element) {
  return p.access == kNarrow
             ? 1
             : 16 / static_cast<int>(std::gcd<int64_t>(16, int64_t{p.geometry.cols} * element));
}

// Gives each of `team` blocks its rows; the last ones may get fewer, or none.
inline void divide(Plan& p, const Problem& q, int team, int held, int stages) {
  Geometry& g = p.geometry;
  g.team = team;
  g.slab = round_up(ceil_div(g.rows, team), row_unit(p, q.element));
  g.channels = q.nhwc ? ceil_div(g.C, team) : g.slab;
  g.hidden = ceil_div(g.R, team);
  g.pixels = q.nhwc ? g.slab : round_up(ceil_div(g.P, team), 8);  // no pack has two owners
  g.held = held;
  g.stages = stages;
  g.stage_bytes = stages ? round_up(int64_t{g.slab} * g.cols * q.element, 128) : 0;
  p.scratch = scratch_of(g, q, p.threads, p.access == kWideRows ? 16 / q.element : 1);
  p.shared_bytes = kHeader + g.slab_bytes() + 4 * p.scratch.floats(stages > 0);
}

inline bool fits(Plan& p, const Problem& q, int team, int held, int stages, int bytes) {
  const int64_t slab = int64_t{ceil_div(p.geometry.rows, team)} * p.geometry.cols * q.element;
  if (slab * held * stages > bytes) return false;
  divide(p, q, team, held, stages);
  return p.shared_bytes <= bytes;
}

inline const char* why_cluster(int held, bool of_two, int stages) {
  if (held == 2) return "x and grad of an image fit the shared memory of a cluster";
  if (of_two) return "x of an image fits the shared memory of a cluster, grad comes again from L2";
  return stages == 2 ? "an image and the next one fit the shared memory of a cluster"
                     : "an image fits the shared memory of a cluster";
}

// The smallest cluster whose blocks hold `held` maps of an image, and of the next one if that can be.
// clusters(plan): how many of them the device runs at once; it may have no room for a single one.
template <class Clusters>
bool plan_cluster(Plan& p, const Problem& q, const Device& d, int held, const Clusters& clusters) {
  const Geometry& g = p.geometry;
  const int64_t image = int64_t{g.rows} * g.cols * q.element;
  p.variant = kCluster;
  // Every image at once, or else the next one on its way, or one after the other.
  struct Choice {
    int stages;
    int64_t most_rounds;
  };
  for (const auto [stages, most_rounds] : {Choice{1, 1}, Choice{2, g.N}, Choice{1, g.N}}) {
    for (int team = 1; team <= kLargestCluster; team *= 2) {
      if (!fits(p, q, team, held, stages, d.shared_bytes)) continue;
      // Few images: more blocks an image, while a block's part is worth a copy.
      while (team < kLargestCluster && 2 * g.N * team <= d.count && image / (2 * team) >= 4096 &&
             2 * team * row_unit(p, q.element) <= g.rows) {
        team *= 2;
      }
      divide(p, q, team, held, stages);
      int64_t teams = std::min<int64_t>(g.N, clusters(p));
      // A barrier of the whole grid, of clusters that may not find room beside others: half of what is there.
      if (p.one_launch) teams = std::min<int64_t>(teams, std::max(1, d.count / 2 / team));
      if (teams < 1) continue;
      const int64_t rounds = (g.N + teams - 1) / teams;
      if (rounds > most_rounds) continue;
      p.teams = ceil_div(g.N, rounds);  // the same work for each
      p.one_launch = p.one_launch && p.teams * team <= d.count;
      p.why = why_cluster(held, q.window && q.backward, g.stages);
      return true;
    }
  }
  return false;
}

// Every resident block works at once; as many images are under way as half of the L2 cache holds.
inline bool plan_semaphore(Plan& p, const Problem& q, const Device& d) {
  const int64_t image = int64_t{p.geometry.rows} * p.geometry.cols * q.element;
  const int64_t in_cache = std::max<int64_t>(1, d.l2_bytes / 2 / std::max<int64_t>(image, 1));
  p.teams = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({p.geometry.N, in_cache, d.count})));
  const int wanted = std::max(1, ceil_div(image, 1 << 14));
  divide(p, q, std::max(1, std::min({d.count / p.teams, wanted, p.geometry.rows})), 0, 0);
  p.variant = kSemaphore;
  p.why = p.access == kNarrow ? "images do not begin at multiples of 16 bytes: teams of blocks meet at "
                                "semaphores, images stay in L2"
          : d.sm < 90 ? "no clusters before sm_90: teams of blocks meet at semaphores, images stay in L2"
                      : "no cluster holds an image: teams of blocks meet at semaphores, images stay in L2";
  return p.shared_bytes <= d.shared_bytes;
}

// One block to a multiprocessor, wherever it is: the device may know better (launch.h).
struct AnyPlace {
  const Device& device;
  int operator()(const Plan& p) const { return std::max(1, device.count / p.geometry.team); }
};

template <class Clusters>
Plan plan(const Problem& q, const Device& d, const Clusters& clusters) {
  Plan p;
  constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);  // indices may go one turn of all threads too far
  if (q.C * q.P > kMost || q.C * q.R > kMost || q.C > (1 << 24) || (q.window && q.P >= (1 << 24))) {
    p.why = "an image, a map or a weight is too large for 32-bit indices";
    return p;
  }
  Geometry& g = p.geometry;
  g.N = q.N, g.stride_n = q.stride_n;
  g.C = static_cast<int>(q.C), g.P = static_cast<int>(q.P), g.R = static_cast<int>(q.R);
  g.rows = q.nhwc ? g.P : g.C, g.cols = q.nhwc ? g.C : g.P;
  g.W = q.W, g.window = q.window;
  p.threads = q.threads ? q.threads : kThreads;
  const int64_t image = q.C * q.P * q.element;
  const bool whole = q.aligned && image % 16 == 0 && q.stride_n * q.element % 16 == 0;
  p.access = !whole ? kNarrow : g.cols * int64_t{q.element} % 16 == 0 ? kWideRows : kRagged;
  const bool copies = d.sm >= 90 && whole;   // in bulk, of 16 bytes and multiples
  const bool both = q.window && q.backward;  // which comes back to x, and then to grad
  p.one_launch = q.backward && q.N * image <= kSmallMaps;
  if (!(copies && ((both && plan_cluster(p, q, d, 2, clusters)) || plan_cluster(p, q, d, 1, clusters))) &&
      !plan_semaphore(p, q, d)) {
    p.variant = kRefused;
    p.why = "the gates of a map of this size do not fit the shared memory of a thread block";
    return p;
  }
  p.blocks = p.teams * p.geometry.team;
  if (p.exchange_floats() > kMost) {
    p.variant = kRefused;
    p.why = "what the blocks exchange is too large for 32-bit indices";
  }
  return p;
}

inline Plan plan(const Problem& q, const Device& d) { return plan(q, d, AnyPlace{d}); }

}  // namespace visattn::cuda
