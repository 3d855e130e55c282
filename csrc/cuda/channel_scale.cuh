// The kernels of channel_scale.h and their launches; channel_scale_<dtype>.cu compile them, one dtype each.
#pragma once

#include "channel_scale.h"
#include "device.cuh"
#include "launch.h"

namespace visattn::cuda {

template <class T, class Args>
constexpr bool kIsForward = std::is_same_v<Args, ChannelForward<PlainMemory, T>>;

template <class T, class Args>
constexpr int kThreadsOf = kIsForward<T, Args> ? kThreads : kFewThreads;

template <class T, bool kNhwc, int kAccess, bool kInCluster, class Args>
__global__ void __launch_bounds__(kThreadsOf<T, Args>, 2)
    channel_scale_kernel(const __grid_constant__ Args a, const Workspace workspace) {
  extern __shared__ __align__(128) unsigned char memory[];
  const auto run = [&](auto& ex) {
    if constexpr (kIsForward<T, Args>) {
      channel_forward<kNhwc, kAccess, T>(ex, a);
    } else {
      channel_backward<kNhwc, kAccess, T>(ex, a);
    }
    ex.finish();
  };
  if constexpr (kInCluster) {
#if __CUDA_ARCH__ >= 900
    ClusterExec<kThreadsOf<T, Args>> ex(memory);
    run(ex);
#else
    __trap();  // the host refuses to launch it
#endif
  } else {
    SemaphoreExec<kThreadsOf<T, Args>> ex(memory, workspace, a.geometry.team, a.scratch);
    run(ex);
  }
}

template <class T, bool kNhwc, int kAccess, class Args>
Kernel channel_scale_variant(const Plan& p) {
  if constexpr (kAccess != kNarrow) {
    if (p.variant == kCluster) return kernel_of(channel_scale_kernel<T, kNhwc, kAccess, true, Args>);
  }
  return kernel_of(channel_scale_kernel<T, kNhwc, kAccess, false, Args>);
}

template <class T, class Args>
void launch_channel_scale(const char* name, Args& a, const Plan& p, bool nhwc, float* workspace,
                          const Call& call) {
  const auto find = [&](auto layout) -> Kernel {
    constexpr bool kNhwc = decltype(layout)::value;
    if constexpr (kEveryAccess) {
      if (p.access == kRagged) return channel_scale_variant<T, kNhwc, kRagged, Args>(p);
      if (p.access == kNarrow) return channel_scale_variant<T, kNhwc, kNarrow, Args>(p);
    }
    return channel_scale_variant<T, kNhwc, kWideRows, Args>(p);
  };
  a.geometry = p.geometry;
  a.scratch = p.scratch;
  launch(name, nhwc ? find(std::true_type{}) : find(std::false_type{}), &a, p, workspace, call);
}

}  // namespace visattn::cuda
