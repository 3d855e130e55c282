// What a call asks for, and how an image is shared by the blocks of a team and the warps of a block.
#pragma once

#include <cstdint>

namespace visattn::cuda {

// Threads of a block. A block has a multiprocessor to itself, with 128 registers a thread and shared memory
// for two slabs: it copies the next image while it sums, gates and stores the current one. Two blocks with
// one slab each would use as much memory, but would load, wait and store in turns.
constexpr int kThreads = 512;

constexpr int kHeader = 128;  // bytes of shared memory before the slabs: the barriers of copies

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int round_up(int64_t a, int64_t b) { return ceil_div(a, b) * static_cast<int>(b); }

// The call. aligned: every map starts at a multiple of 16 bytes, and so does each of its images.
struct Problem {
  int64_t N, C, P, R, stride_n;
  int element;  // bytes
  bool nhwc, aligned, backward;
  int W = 0, window = 0;  // of CBAM; 0 for SE and ECA
  int threads = 0;        // 0: kThreads
};

// The maps as a kernel sees them. An image is a matrix [rows, cols]: [C, P] in nchw, [P, C] in nhwc. A team
// of `team` thread blocks works on one image at a time; block k has the rows [k * slab, (k + 1) * slab).
struct Geometry {
  int64_t N = 0, stride_n = 0;  // of the map that is held first: x if two are
  int C = 0, P = 0, R = 0;      // R: hidden units of the gate, 0 without any
  int rows = 0, cols = 0, slab = 0, team = 1;
  int W = 0, window = 0;            // of the convolution of the maps; 0 without one
  int pixels = 0;                   // pixels whose gates one block computes
  int channels = 0, hidden = 0;     // channels and hidden units that one block computes
  int stages = 0, stage_bytes = 0;  // resident slabs of each map, and their distance in shared memory
  int held = 1;                     // maps that have resident slabs

  constexpr int slab_bytes() const { return held * stages * stage_bytes; }

  // True if every block computes the gates of all channels instead of waiting for the other blocks' part.
  constexpr bool computes_all() const { return int64_t{C} * R <= 1 << 14; }
};

// Elements are accessed 16 bytes at a time, where no access straddles two rows (kWideRows) or some do
// (kRagged), or one by one (kNarrow).
enum Access : int { kWideRows = 0, kRagged = 1, kNarrow = 2 };

// How the warps of a block share its rows in `for_tiles`: a warp's lanes cover `lanes` packs of a row, or a
// few times as many, and several rows if rows are short; `chunks` warps make up a row, and `groups` of lanes
// take turns down the rows. Eight lanes fetch the 128 bytes that shared memory delivers at once.
constexpr int kRowLanes = 8, kWarpLanes = 32;

struct Tiling {
  int lanes = 1, chunks = 1, groups = 1;
};

constexpr Tiling tiling_of(int cols, int pack, int threads, int most_lanes = kWarpLanes, int each = 1) {
  Tiling t;
  const int packs = cols / pack, warps = threads / 32;
  while (t.lanes < packs && t.lanes < most_lanes) t.lanes *= 2;
  t.chunks = packs > t.lanes * each ? ceil_div(packs, t.lanes * each) : 1;
  t.groups = (warps > t.chunks ? warps / t.chunks : 1) * (32 / t.lanes);
  return t;
}

// Packs of a row whose coefficients a lane keeps: with 4, eight lanes hold a row of 256 channels.
constexpr int kKept = 4;
constexpr int kept_of(int cols, int pack) { return cols / pack < kKept * kRowLanes ? 1 : kKept; }

}  // namespace visattn::cuda
