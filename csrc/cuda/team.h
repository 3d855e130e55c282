// What the thread blocks of a team do together: meet, read each other's parts, and hold an image between
// them.
//
// A kernel is a template over an Exec, which stands for one thread: ClusterExec and SemaphoreExec on the
// device (device.cuh), or the emulation's. An Exec offers
//   thread, threads, rank, team_size, team, teams   the thread's position
//   sync_block, sync_team, sync_grid                barriers
//   warp_sum(v, lanes), warp_peak, warp_sums        over the warp, or `lanes` of it: the same in each lane
//   warp_any(p)                                     true if p is true in any lane
//   shared<T>(bytes), exchange(floats), peer(p, r)  memory of the block, of it for its team, of block r
//   copy_init, copy_async, copy_wait, fence_async   bulk copies into the slabs, with kResident
//   prefetch                                        into the L2 cache, what is copied later
#pragma once

#include <cstdint>

#include "../common/geometry.h"
#include "portable.h"

namespace visattn::cuda {

// A barrier of `expected` blocks. Once all have met, the counter is back where it began, except for its
// highest bit, which flips: nothing has to reset it. One thread of each block calls it; `first` is true in
// exactly one block.
template <class Exec, class Counter>
VF_DEVICE void meet(Exec& ex, Counter counter, bool first, unsigned expected) {
  constexpr unsigned kTurn = 0x80000000u;
  const unsigned before = ex.add_release(counter, first ? kTurn - (expected - 1) : 1u);
  while (((before ^ ex.load_acquire(counter)) & kTurn) == 0) ex.pause();
}

// Gathers the parts of all blocks, `part` values each, one after the other: out [total], in this block's
// memory.
template <class Exec, class Out>
VF_DEVICE void gather(Exec& ex, typename Exec::Exchange from, int part, int total, Out out) {
#pragma unroll 1
  for (int i = ex.thread(); i < total; i += ex.threads()) put(out, i, get(ex.peer(from, i / part), i % part));
  ex.sync_block();
}

// The block's rows of the images that its team works on, one image after the other: in shared memory, where
// the next copy is in flight while one is in use, or in global memory as they are. `number` counts the maps
// if there are two; those from g.held on stay in global memory.
template <class Exec, class T>
class Slabs {
  template <class U>
  using Global = typename Exec::Memory::template Global<U>;

 public:
  VF_DEVICE Slabs(Exec& ex, Global<const T> x, const Geometry& g, int64_t stride_n, int number = 0)
      : ex_(ex),
        x_(x),
        g_(g),
        stride_n_(stride_n),
        first_(ex.rank() * g.slab * int64_t{g.cols}),
        stage_(number * g.stages),
        held_(Exec::kResident && number < g.held) {
    const int rows = g.rows - ex.rank() * g.slab;
    count_ = (rows < 0 ? 0 : rows < g.slab ? rows : g.slab) * g.cols;
    if constexpr (Exec::kResident) {
      if (!held_) return;
      ex.copy_init(stage_, g.stages);
      for (int ahead = 0; ahead < g.stages; ++ahead) issue(ahead);
    }
  }

  VF_DEVICE int count() const { return count_; }      // elements
  VF_DEVICE int64_t first() const { return first_; }  // where they begin in the image

  VF_DEVICE bool held() const { return held_; }

  // The slab of the team's image number `turn`, in shared memory if it is resident.
  VF_DEVICE auto acquire(int turn) {
    if constexpr (!Exec::kResident) {
      return x_ + source(turn);
    } else {
      if (count_) {
        ex_.copy_wait(stage(turn), turn / g_.stages & 1);
        // Without room for two slabs the next image is prefetched into the L2 cache while this one is in
        // work.
        if (g_.stages == 1 && exists(turn + 1)) ex_.prefetch(x_ + source(turn + 1), count_);
      }
      return slab(turn);
    }
  }

  // The same if the plan decides whether the map is held.
  VF_DEVICE Global<const T> find(int turn) {
    if constexpr (Exec::kResident) {
      if (held_) return acquire(turn);
    }
    return x_ + source(turn);
  }

  // The slab in shared memory, to be written.
  VF_DEVICE auto slab(int turn) { return ex_.template shared<T>(kHeader + stage(turn) * g_.stage_bytes); }

  // Ends the use of the slab of `turn`, and issues the next copy into its memory.
  VF_DEVICE void release(int turn) {
    if constexpr (Exec::kResident) {
      if (held_) ex_.fence_async();
    }
    ex_.sync_block();
    if constexpr (Exec::kResident) {
      if (held_) issue(turn + g_.stages);
    }
  }

 private:
  VF_DEVICE int stage(int turn) const { return stage_ + turn % g_.stages; }

  VF_DEVICE int64_t source(int turn) const {
    return (ex_.team() + int64_t{turn} * ex_.teams()) * stride_n_ + first_;
  }

  VF_DEVICE bool exists(int turn) const { return ex_.team() + int64_t{turn} * ex_.teams() < g_.N; }

  VF_DEVICE void issue(int turn) {
    if (count_ == 0 || !exists(turn)) return;
    ex_.copy_async(stage(turn), slab(turn), x_ + source(turn), count_);
  }

  Exec& ex_;
  Global<const T> x_;
  const Geometry& g_;
  int64_t stride_n_, first_;
  int stage_, count_;
  bool held_;
};

}  // namespace visattn::cuda
