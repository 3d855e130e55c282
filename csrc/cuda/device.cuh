// The two Execs of the device: one thread of a cluster that holds an image in shared memory, or of a team of
// blocks that meets at a semaphore and leaves the image in the L2 cache.
#pragma once

#include <cooperative_groups.h>

#include "../common/geometry.h"
#include "../common/scratch.h"
#include "portable.h"
#include "team.h"

namespace visattn::cuda {

// Memory that the other blocks of a team read. Accesses bypass the L1 caches, which do not see each other's
// writes. A 32-bit offset from one base pointer saves registers: a 64-bit pointer for each part would cost
// two.
struct InL2 {
  float* p;
  int at;
  __device__ InL2 operator+(int i) const { return {p, at + i}; }
};
VF_DEVICE float get(InL2 m, int i) { return __ldcg(m.p + (m.at + i)); }
VF_DEVICE void put(InL2 m, int i, float v) { __stcg(m.p + (m.at + i), v); }

template <int W>
VF_DEVICE void get_floats(const InL2& m, int i, float (&v)[W]) {
  VF_UNROLL
  for (int j = 0; j < W; ++j) v[j] = get(m, i + j);
}

struct Workspace {
  float* exchange;       // [blocks, Scratch::copies, Scratch::shared]; null in a cluster
  unsigned* semaphores;  // [teams]; the kernel clears them
};

// The part that both Execs share. The number of threads is a compile-time constant, which saves registers.
template <int kCount>
struct DeviceThread {
  using Memory = PlainMemory;
  template <class T>
  using Shared = T*;

  unsigned char* memory;

  VF_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  VF_DEVICE static constexpr int threads() { return kCount; }
  VF_DEVICE void sync_block() const { __syncthreads(); }
  // Merges the values of `lanes` lanes (at most kMost) with merge(a, b); every lane receives the result.
  template <int kMost, class U, class Merge>
  VF_DEVICE static U over_warp(U v, int lanes, const Merge& merge) {
    VF_UNROLL
    for (int step = 1; step < kMost; step *= 2) {
      const U both = merge(v, __shfl_xor_sync(0xffffffffu, v, step));
      if (step < lanes) v = both;
    }
    return v;
  }
  template <int kMost = kWarp>
  VF_DEVICE float warp_sum(float v, int lanes = kMost) const {
    return over_warp<kMost>(v, lanes, [](float a, float b) { return a + b; });
  }
  // Sums four values over 4 or more lanes; lane l receives the sum of number l % 4.
  VF_DEVICE float warp_sums(const float (&v)[4], int lanes) const {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    float two[2];
    VF_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float kept = odd ? v[2 * k + 1] : v[2 * k], sent = odd ? v[2 * k] : v[2 * k + 1];
      two[k] = kept + __shfl_xor_sync(0xffffffffu, sent, 1);
    }
    float sum = (high ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, high ? two[0] : two[1], 2);
    VF_UNROLL
    for (int step = 4; step < kWarp; step *= 2) {
      const float both = sum + __shfl_xor_sync(0xffffffffu, sum, step);
      if (step < lanes) sum = both;
    }
    return sum;
  }
  VF_DEVICE bool warp_any(bool p) const { return __any_sync(0xffffffffu, p); }
  VF_DEVICE void sync_grid() const { cooperative_groups::this_grid().sync(); }  // of a cooperative launch
  template <int kMost = kWarp>
  VF_DEVICE Peak warp_peak(Peak p, int lanes = kMost) const {
    const float most = over_warp<kMost>(p.value, lanes, [](float a, float b) { return larger(a, b); });
    const bool has = p.value == most || (p.value != p.value && most != most);
    return {most,
            over_warp<kMost>(has ? p.at : Peak{}.at, lanes, [](int a, int b) { return a < b ? a : b; })};
  }
  template <class T>
  VF_DEVICE T* shared(int bytes) const {
    return reinterpret_cast<T*>(memory + bytes);
  }
};

template <int kCount>
struct SemaphoreExec : DeviceThread<kCount> {
  static constexpr bool kResident = false;
  using Exchange = InL2;

  Workspace workspace;
  int size, distance;  // blocks of the team; the distance between two blocks' floats

  VF_DEVICE SemaphoreExec(unsigned char* shared_memory, Workspace w, int team_size, const Scratch& s)
      : DeviceThread<kCount>{shared_memory}, workspace(w), size(team_size), distance(s.copies * s.shared) {
    if (threadIdx.x == 0 && rank() == 0) workspace.semaphores[team()] = 0;
    this->sync_grid();
  }

  VF_DEVICE int rank() const { return static_cast<int>(blockIdx.x) % size; }
  VF_DEVICE int team() const { return static_cast<int>(blockIdx.x) / size; }
  VF_DEVICE int team_size() const { return size; }
  VF_DEVICE int teams() const { return static_cast<int>(gridDim.x) / size; }

  VF_DEVICE InL2 exchange(float*, int floats, int which) const {
    return {workspace.exchange, static_cast<int>(blockIdx.x) * distance + which * floats};
  }
  VF_DEVICE InL2 peer(InL2 mine, int r) const { return mine + (r - rank()) * distance; }

  // Every thread's writes come before the block's arrival, and its reads after the arrival of all other
  // blocks.
  VF_DEVICE void sync_team() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
      meet(*this, workspace.semaphores + team(), rank() == 0, static_cast<unsigned>(size));
    __syncthreads();
  }
  VF_DEVICE unsigned add_release(unsigned* p, unsigned v) const {
    unsigned before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
    return before;
  }
  VF_DEVICE unsigned load_acquire(unsigned* p) const {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
  }
  VF_DEVICE void pause() const { __nanosleep(32); }
  VF_DEVICE void finish() const {}
};

#if __CUDA_ARCH__ >= 900
template <int kCount>
struct ClusterExec : DeviceThread<kCount> {
  static constexpr bool kResident = true;
  using Exchange = float*;

  VF_DEVICE explicit ClusterExec(unsigned char* shared_memory) : DeviceThread<kCount>{shared_memory} {}

  VF_DEVICE static auto cluster() { return cooperative_groups::this_cluster(); }
  VF_DEVICE int rank() const { return static_cast<int>(cluster().block_rank()); }
  VF_DEVICE int team_size() const { return static_cast<int>(cluster().num_blocks()); }
  VF_DEVICE int team() const { return static_cast<int>(blockIdx.x) / team_size(); }
  VF_DEVICE int teams() const { return static_cast<int>(gridDim.x) / team_size(); }
  VF_DEVICE void sync_team() const { cluster().sync(); }
  VF_DEVICE void finish() const { cluster().sync(); }  // a block's memory outlives its readers

  VF_DEVICE float* exchange(float* own, int floats, int which) const { return own + which * floats; }
  VF_DEVICE float* peer(float* mine, int r) const { return cluster().map_shared_rank(mine, r); }

  // Stage s is complete when the bytes that were announced at the barrier at memory + 8 s have arrived.
  VF_DEVICE unsigned barrier(int stage) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(this->memory + 8 * stage));
  }
  VF_DEVICE void copy_init(int first, int stages) const {
    if (threadIdx.x == 0) {
      for (int s = first; s < first + stages; ++s) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier(s)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      fence_async();
    }
    __syncthreads();
  }
  template <class T>
  VF_DEVICE void copy_async(int stage, T* to, const T* from, int count) const {
    if (threadIdx.x != 0) return;
    const unsigned bytes = static_cast<unsigned>(count) * sizeof(T);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier(stage)), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            static_cast<unsigned>(__cvta_generic_to_shared(to))),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier(stage))
        : "memory");
  }
  VF_DEVICE void copy_wait(int stage, int parity) const {
    unsigned done = 0;
    while (!done) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(barrier(stage)), "r"(parity)
          : "memory");
    }
  }
  template <class T>
  VF_DEVICE void prefetch(const T* from, int count) const {
    if (threadIdx.x != 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
                 "r"(static_cast<unsigned>(count) * static_cast<unsigned>(sizeof(T)))
                 : "memory");
  }
  // Orders the threads' reads and writes here before copies that are issued later.
  VF_DEVICE void fence_async() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
};
#endif

// Calls run(exec) in each thread of a kernel with kThreads threads a block.
template <bool kInCluster, class Args, class Run>
VF_DEVICE void on_device(const Args& a, const Workspace& workspace, const Run& run) {
  extern __shared__ __align__(128) unsigned char memory[];
  if constexpr (kInCluster) {
#if __CUDA_ARCH__ >= 900
    ClusterExec<kThreads> ex(memory);
    run(ex);
    ex.finish();
#else
    __trap();  // the host refuses to launch it
#endif
  } else {
    SemaphoreExec<kThreads> ex(memory, workspace, a.geometry.team, a.scratch);
    run(ex);
    ex.finish();
  }
}

}  // namespace visattn::cuda
