// The kernels of cbam_forward.h and cbam_backward.h; each cbam_<dtype>.cu compiles them for one dtype.
#pragma once

#include <type_traits>

#include "../common/geometry.h"
#include "../common/plan.h"
#include "cbam_backward.h"
#include "cbam_forward.h"
#include "device.cuh"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

template <bool kNhwc, int kAccess, bool kInCluster, class Args>
__global__ void __launch_bounds__(kThreads, 1)
    cbam_kernel(const __grid_constant__ Args a, const Workspace workspace) {
  using T = typename Args::Element;
  on_device<kInCluster>(a, workspace, [&](auto& ex) {
    if constexpr (std::is_same_v<Args, CbamForward<PlainMemory, T>>) {
      cbam_forward<kNhwc, kAccess, T>(ex, a);
    } else {
      cbam_backward<kNhwc, kAccess, T>(ex, a);
    }
  });
}

template <class Args>
Kernel cbam_for(const Plan& p, bool nhwc) {
  return choose(p, nhwc, [](auto layout, auto access, auto cluster) {
    return kernel_of(
        cbam_kernel<decltype(layout)::value, decltype(access)::value, decltype(cluster)::value, Args>);
  });
}

}  // namespace visattn::cuda
