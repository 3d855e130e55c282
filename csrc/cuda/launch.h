// What a planned launch is given; launch.cu does it.
#pragma once

#include "plan.h"

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

struct Call {
  int device;
  void* stream;
  const int64_t* sizes;  // [4], of x, for messages
};

// Launches kernel(*args, Workspace) as planned, whose workspace is plan.workspace_words() long and holds
// anything. Raises with the name, the shape and CUDA's reason if it cannot.
void launch(const char* name, Kernel kernel, void* args, const Plan& plan, float* workspace,
            const Call& call);

// What `plan` asks of the device, once for each.
const Device& device_of(int index);

}  // namespace visattn::cuda
