// The kernels of cbam.h and their launch; cbam_<dtype>.cu compile them, one dtype each.
#pragma once

#include "cbam.h"
#include "device.cuh"
#include "launch.h"

namespace visattn::cuda {

template <class T, bool kNhwc, int kAccess, bool kInCluster>
__global__ void __launch_bounds__(kFewThreads, 2)
    cbam_kernel(const __grid_constant__ CbamForward<PlainMemory, T> a, const Workspace workspace) {
  extern __shared__ __align__(128) unsigned char memory[];
  if constexpr (kInCluster) {
#if __CUDA_ARCH__ >= 900
    ClusterExec ex(memory);
    cbam_forward<kNhwc, kAccess, T>(ex, a);
    ex.finish();
#else
    __trap();  // the host refuses to launch it
#endif
  } else {
    SemaphoreExec ex(memory, workspace, a.geometry.team, a.scratch.shared);
    cbam_forward<kNhwc, kAccess, T>(ex, a);
  }
}

template <class T, bool kNhwc, int kAccess>
Kernel cbam_variant(const Plan& p) {
  if constexpr (kAccess != kNarrow) {
    if (p.variant == kCluster) return kernel_of(cbam_kernel<T, kNhwc, kAccess, true>);
  }
  return kernel_of(cbam_kernel<T, kNhwc, kAccess, false>);
}

template <class T>
void launch_cbam(const char* name, CbamForward<PlainMemory, T>& a, const Plan& p, bool nhwc,
                 const Call& call) {
  const auto find = [&](auto layout) -> Kernel {
    constexpr bool kNhwc = decltype(layout)::value;
    if constexpr (kEveryAccess) {
      if (p.access == kRagged) return cbam_variant<T, kNhwc, kRagged>(p);
      if (p.access == kNarrow) return cbam_variant<T, kNhwc, kNarrow>(p);
    }
    return cbam_variant<T, kNhwc, kWideRows>(p);
  };
  a.geometry = p.geometry;
  a.scratch = p.scratch;
  launch(name, nhwc ? find(std::true_type{}) : find(std::false_type{}), &a, p, call);
}

}  // namespace visattn::cuda
