// What the thread blocks of a team do together: they meet, read each other's parts, and hold an image between
// them.
//
// A kernel is written over an Exec, which stands for one thread: ClusterExec and SemaphoreExec on the device
// (device.cuh), and the emulation's own. An Exec offers
//   thread, threads, rank, team_size, team, teams   where this thread is
//   sync_block, sync_team, sync_grid                barriers
//   warp_sum(v, lanes), warp_peak, warp_sums        over the warp, or `lanes` of it: the same for all of them
//   warp_any(p)                                     whether it is true in any lane
//   shared<T>(bytes), exchange(floats), peer(p, r)  memory of the block, of it for its team, and of block r
//   copy_init, copy_async, copy_wait, fence_async   copies into the slabs, and their end (kResident)
//   prefetch                                        what is copied later, into the L2 cache
#pragma once

#include <cstdint>

#include "../common/geometry.h"
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
#pragma unroll 1
  for (int i = ex.thread(); i < total; i += ex.threads()) put(out, i, get(ex.peer(from, i / part), i % part));
  ex.sync_block();
}

// The block's rows of the images that its team works on, one image after the other: in shared memory, where
// the next copy is under way while one is in use, or in global memory as they are. `number`: of the map, if
// there are two; those from g.held on stay in global memory.
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

  // The slab of the team's image number `turn`, which is held in shared memory if any is.
  VF_DEVICE auto acquire(int turn) {
    if constexpr (!Exec::kResident) {
      return x_ + source(turn);
    } else {
      if (count_) {
        ex_.copy_wait(stage(turn), turn / g_.stages & 1);
        // Without room here the next image comes as far as the L2 cache, while this one is at work.
        if (g_.stages == 1 && exists(turn + 1)) ex_.prefetch(x_ + source(turn + 1), count_);
      }
      return slab(turn);
    }
  }

  // The same where the plan decides whether it is.
  VF_DEVICE Global<const T> find(int turn) {
    if constexpr (Exec::kResident) {
      if (held_) return acquire(turn);
    }
    return x_ + source(turn);
  }

  // In shared memory, to be written.
  VF_DEVICE auto slab(int turn) { return ex_.template shared<T>(kHeader + stage(turn) * g_.stage_bytes); }

  // Nobody needs the slab of `turn` any more.
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
