// What the thread blocks of a team do together: they meet, read each other's parts, and hold an image between
// them.
//
// A kernel is written over an Exec, which stands for one thread: ClusterExec and SemaphoreExec on the device
// (device.cuh), and the emulation's own. An Exec offers
//   thread, threads, rank, team_size, team, teams   where this thread is
//   sync_block, sync_team                           barriers
//   warp_sum, warp_peak                             over the warp, the same for all of its lanes
//   shared<T>(bytes), exchange(floats), peer(p, r)  memory of the block, of it for its team, and of block r
//   copy_init, copy_async, copy_wait, fence_async   copies into the slabs, and their end (kResident)
#pragma once

#include "plan.h"
#include "portable.h"

namespace visattn::cuda {

// A barrier of `expected` blocks. It is back where it began once all have met, but for its highest bit, which
// flips: nothing has to reset it. Called by one thread of each block; `first` in exactly one.
template <class Exec, class Counter>
VF_DEVICE void meet(Exec& ex, Counter counter, bool first, unsigned expected) {
  constexpr unsigned kTurn = 0x80000000u;
  const unsigned before = ex.add_release(counter, first ? kTurn - (expected - 1) : 1u);
  while (((before ^ ex.load_acquire(counter)) & kTurn) == 0) ex.pause();
}

// The part of each block, `part` values long, one after the other: out [total], of this block alone.
template <class Exec, class Out>
VF_DEVICE void gather(Exec& ex, typename Exec::Exchange from, int part, int total, Out out) {
  for (int i = ex.thread(); i < total; i += ex.threads()) put(out, i, get(ex.peer(from, i / part), i % part));
  ex.sync_block();
}

// The block's rows of the images that its team works on, one image after the other: in shared memory, where
// the next copy is under way while one is in use, or in global memory as they are.
template <class Exec, class T>
class Slabs {
  template <class U>
  using Global = typename Exec::Memory::template Global<U>;

 public:
  VF_DEVICE Slabs(Exec& ex, Global<const T> x, const Geometry& g)
      : ex_(ex), x_(x), g_(g), first_(ex.rank() * g.slab * int64_t{g.cols}) {
    const int rows = g.rows - ex.rank() * g.slab;
    count_ = (rows < 0 ? 0 : rows < g.slab ? rows : g.slab) * g.cols;
    if constexpr (Exec::kResident) {
      ex.copy_init(g.stages);
      for (int ahead = 0; ahead < g.stages; ++ahead) issue(ahead);
    }
  }

  VF_DEVICE int count() const { return count_; }      // elements
  VF_DEVICE int64_t first() const { return first_; }  // where they begin in the image

  // The slab of the team's image number `turn`.
  VF_DEVICE auto acquire(int turn) {
    if constexpr (!Exec::kResident) {
      return x_ + source(turn);
    } else {
      const auto slab = ex_.template shared<T>(kHeader + turn % g_.stages * g_.stage_bytes);
      if (count_) ex_.copy_wait(turn % g_.stages, turn / g_.stages & 1);
      return slab;
    }
  }

  // Nobody needs the slab of `turn` any more.
  VF_DEVICE void release(int turn) {
    if constexpr (Exec::kResident) ex_.fence_async();
    ex_.sync_block();
    if constexpr (Exec::kResident) issue(turn + g_.stages);
  }

 private:
  VF_DEVICE int64_t source(int turn) const {
    return (ex_.team() + int64_t{turn} * ex_.teams()) * g_.stride_n + first_;
  }

  VF_DEVICE void issue(int turn) {
    if (count_ == 0 || ex_.team() + int64_t{turn} * ex_.teams() >= g_.N) return;
    const auto slab = ex_.template shared<T>(kHeader + turn % g_.stages * g_.stage_bytes);
    ex_.copy_async(turn % g_.stages, slab, x_ + source(turn), count_);
  }

  Exec& ex_;
  Global<const T> x_;
  const Geometry& g_;
  int64_t first_;
  int count_;
};

}  // namespace visattn::cuda
