// Decides how a call is cut into thread blocks, and says why. It is plain C++, so that tests and
// `visattn-fast info --shape` run it without a GPU. The rules rest on capacities, alignments and the number
// of clusters that the device runs at once (launch.h), never on a measurement.
//
// A block has a multiprocessor to itself. Rules for a team:
//  - It is the smallest team, of up to sixteen blocks, whose shared memory holds two slabs: an image's part
//    and the next image's, which is copied while this one is summed, gated and stored.
//  - If no team holds two slabs, it is the smallest that holds one, and the next image is prefetched into
//    the L2 cache.
//  - One slab is enough if all images are in work at once.
//  - CBAM's backward holds x and grad, and releases x before it is done with grad.
//  - There are as many teams as run at once, less those that would not shorten the longest queue of images.
//  - If no cluster holds an image, teams of blocks meet at semaphores, and images stay in the L2 cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "geometry.h"
#include "scratch.h"

namespace visattn::cuda {

enum Variant : int { kCluster = 0, kSemaphore = 1, kRefused = 2 };

struct Device {
  int sm = 0;            // compute capability: 90 for 9.0
  int count = 0;         // streaming multiprocessors
  int shared_bytes = 0;  // that one block may have
  int64_t l2_bytes = 0;
};

constexpr int kLargestCluster = 16;  // blocks

// Bytes of x up to which launches cost backward more than memory does.
constexpr int64_t kSmallMaps = 1 << 20;

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

// The smallest number of rows that is a whole number of packs.
inline int row_unit(const Plan& p, int element) {
  return p.access == kNarrow
             ? 1
             : 16 / static_cast<int>(std::gcd<int64_t>(16, int64_t{p.geometry.cols} * element));
}

// Gives each of `team` blocks its rows; the last blocks may get fewer, or none.
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
  if (of_two) return "x of an image fits the shared memory of a cluster; grad is read again from L2";
  return stages == 2 ? "an image and the next one fit the shared memory of a cluster"
                     : "an image fits the shared memory of a cluster";
}

// Plans the smallest cluster whose blocks hold `held` maps of an image, and of the next one if possible.
// clusters(plan) is the number of such clusters that the device runs at once, which may be 0.
template <class Clusters>
bool plan_cluster(Plan& p, const Problem& q, const Device& d, int held, const Clusters& clusters) {
  const Geometry& g = p.geometry;
  const int64_t image = int64_t{g.rows} * g.cols * q.element;
  p.variant = kCluster;
  // All images at once; else the next one on its way; else one after the other.
  struct Choice {
    int stages;
    int64_t most_rounds;
  };
  for (const auto [stages, most_rounds] : {Choice{1, 1}, Choice{2, g.N}, Choice{1, g.N}}) {
    for (int team = 1; team <= kLargestCluster; team *= 2) {
      if (!fits(p, q, team, held, stages, d.shared_bytes)) continue;
      // Few images: more blocks for each, while a block's part is worth a copy.
      while (team < kLargestCluster && 2 * g.N * team <= d.count && image / (2 * team) >= 4096 &&
             2 * team * row_unit(p, q.element) <= g.rows) {
        team *= 2;
      }
      divide(p, q, team, held, stages);
      int64_t teams = std::min<int64_t>(g.N, clusters(p));
      // A barrier of the whole grid needs all clusters resident beside other kernels' blocks: use half of the
      // device.
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

// Plans teams that meet at semaphores. All blocks are resident; the images in work fill at most half of the
// L2 cache.
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

// Assumes one block for each multiprocessor, anywhere on the device; a device knows better (launch.h).
struct AnyPlace {
  const Device& device;
  int operator()(const Plan& p) const { return std::max(1, device.count / p.geometry.team); }
};

template <class Clusters>
Plan plan(const Problem& q, const Device& d, const Clusters& clusters) {
  Plan p;
  constexpr int64_t kMost =
      (int64_t{1} << 31) - (1 << 16);  // an index may pass the end by a turn of all threads
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
  const bool copies = d.sm >= 90 && whole;   // bulk copies: multiples of 16 bytes
  const bool both = q.window && q.backward;  // backward of CBAM reads x and then grad a second time
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
