// The Exec of one emulated thread, in a cluster or in a team that meets at a semaphore, and the launch of a
// grid.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../../common/geometry.h"
#include "../../common/plan.h"
#include "../portable.h"
#include "../team.h"
#include "fibers.h"
#include "memory.h"

namespace visattn::cuda::emulation {

// What an Exec can leave out, so that tests see the fault found.
enum Sabotage : int {
  kNothing = 0,
  kNoTeamBarrier,
  kNoBlockBarrier,
  kOneExchange,
  kNoCopyWait,
  kNoFence,
  kMiscounted,  // one arrival too few at a semaphore
  kNoGridBarrier,
};

struct Warp {
  Barrier barrier;
  std::array<float, kWarp> values[2];
  std::array<Peak, kWarp> peaks[2];
};

struct Block {
  std::vector<char> bytes;
  std::unique_ptr<Region> memory;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  int64_t issued[kStages] = {}, completed[kStages] = {};
  int left = 0;
  bool gone = false;
};

struct Team {
  std::vector<Block> blocks;
  Barrier barrier;
  unsigned semaphore = 0xdeadbeef;  // until the kernel clears it
};

struct Grid {
  Scheduler scheduler;
  std::vector<Team> teams;
  Barrier barrier;
  int threads;
  Sabotage sabotage;
  int64_t exchange_floats;
  std::vector<float> exchange_data;
  Region exchange;

  Grid(const Plan& p, uint64_t seed, Sabotage left_out)
      : scheduler(seed),
        teams(p.teams),
        threads(p.threads),
        sabotage(left_out),
        exchange_floats(p.scratch.copies * p.scratch.shared),
        exchange_data(std::max<int64_t>(1, p.blocks * exchange_floats)),
        exchange("the exchange", exchange_data.data(), 4 * static_cast<int64_t>(exchange_data.size()),
                 false) {
    barrier.expected = p.blocks * threads;
    for (int t = 0; t < p.teams; ++t) {
      teams[t].blocks.resize(p.geometry.team);
      teams[t].barrier.expected = p.geometry.team * threads;
      for (int r = 0; r < p.geometry.team; ++r) make(p, t, r);
    }
  }

  // Checks what the launch leaves behind.
  void check_end() {
    for (Team& t : teams) {
      if (t.semaphore != 0xdeadbeef && (t.semaphore & 0x7fffffffu))
        scheduler.faults.push_back("a semaphore was not reset");
      for (Block& b : t.blocks) {
        for (int s = 0; s < kStages; ++s) {
          if (b.issued[s] != b.completed[s]) scheduler.faults.push_back("a copy was not waited for");
        }
      }
    }
  }

 private:
  void make(const Plan& p, int team, int rank) {
    Block& b = teams[team].blocks[rank];
    b.bytes.resize(p.shared_bytes + 128);
    char* aligned = b.bytes.data() + (128 - reinterpret_cast<uintptr_t>(b.bytes.data()) % 128);
    b.memory.reset(new Region("shared memory", aligned, p.shared_bytes, false));
    b.memory->shared = true;
    b.memory->gone = &b.gone;
    b.memory->stage_begin = kHeader;
    b.memory->stage_bytes = p.geometry.stage_bytes;
    b.memory->stages = p.geometry.held * p.geometry.stages;
    b.barrier.expected = b.left = threads;
    b.warps.resize(threads / kWarp);
    for (Warp& w : b.warps) w.barrier.expected = kWarp;
    for (int i = 0; i < threads; ++i) {
      scheduler.fibers.emplace_back(new Fiber{static_cast<int>(scheduler.fibers.size()), team, rank, i});
      b.fibers.push_back(scheduler.fibers.back().get());
    }
  }
};

template <bool kInCluster>
struct EmulatedExec {
  static constexpr bool kResident = kInCluster;
  using Memory = CheckedMemory;
  using Exchange = Checked<float>;
  template <class T>
  using Shared = Checked<T>;

  Grid& grid;
  Fiber& f;
  int shuffles = 0;

  int thread() const { return f.thread; }
  int threads() const { return grid.threads; }
  int rank() const { return f.rank; }
  int team() const { return f.team; }
  int teams() const { return static_cast<int>(grid.teams.size()); }
  int team_size() const { return static_cast<int>(my_team().blocks.size()); }
  Team& my_team() const { return grid.teams[f.team]; }
  Block& block() const { return my_team().blocks[f.rank]; }
  void pause() { grid.scheduler.pause(); }

  void sync_block() {
    if (grid.sabotage == kNoBlockBarrier) return pause();
    grid.scheduler.meet(block().barrier);
    ++f.epochs.warp, ++f.epochs.block;
  }

  template <int kMost = kWarp>
  float warp_sum(float v, int of = kMost) {
    Warp& w = block().warps[f.thread / kWarp];
    auto values = &w.values[shuffles++ & 1];
    (*values)[f.thread % kWarp] = v;
    grid.scheduler.meet(w.barrier);
    ++f.epochs.warp;
    std::array<float, kWarp> sums = *values;
    for (int lanes = 1; lanes < of; lanes *= 2) {
      for (int i = 0; i < kWarp; i += 2 * lanes) sums[i] += sums[i + lanes];
    }
    return sums[f.thread % kWarp / of * of];
  }

  float warp_sums(const float (&v)[4], int of) {
    float sums[4];
    for (int k = 0; k < 4; ++k) sums[k] = warp_sum(v[k], of);
    return sums[f.thread % 4];
  }

  bool warp_any(bool p) { return warp_sum(p ? 1.0f : 0.0f) > 0; }

  template <int kMost = kWarp>
  Peak warp_peak(Peak p, int of = kMost) {
    Warp& w = block().warps[f.thread / kWarp];
    auto peaks = &w.peaks[shuffles++ & 1];
    (*peaks)[f.thread % kWarp] = p;
    grid.scheduler.meet(w.barrier);
    ++f.epochs.warp;
    const int first = f.thread % kWarp / of * of;
    for (int i = first; i < first + of; ++i) {
      if (beats((*peaks)[i], p)) p = (*peaks)[i];
    }
    return p;
  }

  template <class T>
  Checked<T> shared(int bytes) const {
    return {block().memory.get(), bytes};
  }

  Exchange exchange(Checked<float> own, int floats, int which) {
    if (grid.sabotage == kOneExchange) which = 0;
    if constexpr (kInCluster) return own + which * floats;
    const int64_t index = int64_t{f.team} * team_size() + f.rank;
    return Checked<float>(&grid.exchange) + (index * grid.exchange_floats + which * floats);
  }

  Exchange peer(Exchange mine, int r) const {
    if constexpr (kInCluster) return {my_team().blocks[r].memory.get(), mine.offset};
    return mine + (r - f.rank) * grid.exchange_floats;
  }

  void sync_team() {
    if (grid.sabotage == kNoTeamBarrier) return pause();
    if constexpr (kInCluster) {
      grid.scheduler.meet(my_team().barrier);
    } else {
      grid.scheduler.meet(block().barrier);
      if (f.thread == 0) meet(*this, &my_team().semaphore, f.rank == 0, static_cast<unsigned>(team_size()));
      grid.scheduler.meet(block().barrier);
    }
    ++f.epochs.warp, ++f.epochs.block, ++f.epochs.team;
  }

  void sync_grid() {
    if (grid.sabotage == kNoGridBarrier) return pause();
    grid.scheduler.meet(grid.barrier);
    ++f.epochs.warp, ++f.epochs.block, ++f.epochs.team, ++f.epochs.grid;
  }

  void start() {
    if constexpr (kInCluster) return;
    if (f.thread == 0 && f.rank == 0) my_team().semaphore = 0;
    grid.scheduler.meet(grid.barrier);
  }

  unsigned add_release(unsigned* p, unsigned v) {
    pause();
    const unsigned before = *p;
    *p += grid.sabotage == kMiscounted && f.team == 0 && f.rank == 1 ? 0 : v;
    return before;
  }
  unsigned load_acquire(unsigned* p) { return *p; }

  void copy_init(int, int) { sync_block(); }

  template <class T>
  void copy_async(int stage, Checked<T> to, Checked<const T> from, int count) {
    Block& b = block();
    if (f.thread != 0) return;
    const int64_t bytes = int64_t{count} * static_cast<int64_t>(sizeof(T));
    if (b.issued[stage] != b.completed[stage])
      grid.scheduler.fault("a copy into a stage that one is under way to");
    for (Fiber* other : b.fibers) {
      if (other->touched[stage])
        grid.scheduler.fault("a copy into a slab that was accessed without a fence since");
    }
    const char* source = from.region->data + from.offset;
    if (reinterpret_cast<uintptr_t>(source) % 16 || to.offset % 16 || bytes % 16) {
      grid.scheduler.fault("a copy that is not aligned to 16 bytes");
    }
    const int64_t number = ++b.issued[stage];
    for (int64_t i = 0; i < bytes; i += sizeof(T)) {
      if (touch(from.region, from.offset + i, sizeof(T), false) &&
          touch(to.region, to.offset + i, sizeof(T), true, stage, number)) {
        memcpy(to.region->data + to.offset + i, source + i, sizeof(T));
      }
    }
  }

  void copy_wait(int stage, int parity) {
    if (grid.sabotage == kNoCopyWait) return;
    Block& b = block();
    while ((b.completed[stage] & 1) == parity) {
      if (b.issued[stage] > b.completed[stage] && grid.scheduler.chance()) ++b.completed[stage];
      pause();
    }
    f.seen[stage] = b.completed[stage];
  }

  template <class T>
  void prefetch(Checked<const T> from, int count) {  // no traffic: the later copy counts it
    const int64_t bytes = int64_t{count} * static_cast<int64_t>(sizeof(T));
    if (from.offset < 0 || from.offset + bytes > from.region->bytes || bytes % 16 ||
        reinterpret_cast<uintptr_t>(from.region->data + from.offset) % 16)
      grid.scheduler.fault("a prefetch out of bounds or not aligned to 16 bytes");
  }

  void fence_async() {
    if (grid.sabotage != kNoFence) std::fill_n(f.touched, kStages, false);
  }

  void finish() {
    if constexpr (kInCluster) sync_team();
    Block& b = block();
    b.gone = --b.left == 0;
  }
};

// Calls kernel(exec) in every thread of the grid.
template <bool kInCluster, class Body>
void launch(Grid& grid, const Body& kernel) {
  grid.scheduler.run([&](Fiber& f) {
    EmulatedExec<kInCluster> ex{grid, f};
    ex.start();
    kernel(ex);
    ex.finish();
  });
}

}  // namespace visattn::cuda::emulation
