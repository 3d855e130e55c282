// The interface of a planned launch; launch.cu implements it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/geometry.h"
#include "../common/plan.h"

namespace visattn::cuda {

using Kernel = const void*;

#ifdef VISATTN_FEW_KERNELS  // the test suite defines it to save time
constexpr bool kEveryAccess = false;
#else
constexpr bool kEveryAccess = true;
#endif

template <class Function>
Kernel kernel_of(Function* kernel) {
  return reinterpret_cast<Kernel>(kernel);
}

// Returns find(layout, access, cluster) for the plan; the arguments' types have the constants as their
// `value`.
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

// Launches kernel(*args, Workspace) as planned. The workspace has plan.workspace_words() words of any
// content. Raises with the name, the shape and CUDA's reason if the launch fails.
void launch(const char* name, Kernel kernel, void* args, const Plan& plan, float* workspace,
            const Call& call);

// The number of clusters of a plan that the device runs at once. The device is asked once for each kernel and
// size. 0: it has room for none, or the kernel was compiled for devices without clusters.
int resident_clusters(Kernel kernel, const Plan& plan, int device);

// The properties of a device that `plan` needs, asked once for each device.
const Device& device_of(int index);

}  // namespace visattn::cuda
