// What a planned launch is given; launch.cu does it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/geometry.h"
#include "../common/plan.h"

namespace visattn::cuda {

using Kernel = const void*;

#ifdef VISATTN_FEW_KERNELS  // the test suite's, to save time
constexpr bool kEveryAccess = false;
#else
constexpr bool kEveryAccess = true;
#endif

template <class Function>
Kernel kernel_of(Function* kernel) {
  return reinterpret_cast<Kernel>(kernel);
}

// find(layout, access, cluster) for what was planned, as constants of the types' `value`.
template <class Find>
Kernel choose(const Plan& p, bool nhwc, const Find& find) {
  const auto of_layout = [&](auto layout) -> Kernel {
    const auto of_access = [&](auto access) -> Kernel {
      if constexpr (decltype(access)::value != kNarrow) {
        if (p.variant == kCluster) return find(layout, access, std::true_type{});
      }
      return find(layout, access, std::false_type{});
    };
    if constexpr (kEveryAccess) {
      if (p.access == kRagged) return of_access(std::integral_constant<int, kRagged>{});
      if (p.access == kNarrow) return of_access(std::integral_constant<int, kNarrow>{});
    }
    return of_access(std::integral_constant<int, kWideRows>{});
  };
  return nhwc ? of_layout(std::true_type{}) : of_layout(std::false_type{});
}

struct Call {
  int device;
  void* stream;
  const int64_t* sizes;  // [4], of x, for messages
};

// Launches kernel(*args, Workspace) as planned, whose workspace is plan.workspace_words() long and holds
// anything. Raises with the name, the shape and CUDA's reason if it cannot.
void launch(const char* name, Kernel kernel, void* args, const Plan& plan, float* workspace,
            const Call& call);

// How many clusters of a plan the device runs at once, asked of it once for each kernel and size. 0: none, or
// the kernel was compiled for devices without clusters.
int resident_clusters(Kernel kernel, const Plan& plan, int device);

// What `plan` asks of the device, once for each.
const Device& device_of(int index);

}  // namespace visattn::cuda
