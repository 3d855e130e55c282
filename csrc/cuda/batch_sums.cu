// The sums over the batch as a launch of their own.
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "../common/geometry.h"
#include "batch_sums.h"
#include "device.cuh"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {
namespace {

constexpr int kTile = 256;

__global__ void __launch_bounds__(kTile) batch_sums_kernel(const __grid_constant__ Sums sums) {
  __shared__ float partial[kTile / kWarp];
  DeviceThread<kTile> ex{nullptr};
  batch_sums(ex, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), sums, partial);
}

}  // namespace

void launch_batch_sums(const char* name, const Sums& sums, const Call& call) {
  int64_t largest = int64_t{sums.windowed.window} * kTile;
  for (int k = 0; k < sums.count; ++k) {
    largest = std::max(largest, int64_t{sums.outer[k].rows} * sums.outer[k].cols);
  }
  if (largest == 0) return;
  const auto stream = static_cast<cudaStream_t>(call.stream);
  batch_sums_kernel<<<static_cast<unsigned>(ceil_div(largest, kTile)), kTile, 0, stream>>>(sums);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " on x [", call.sizes[0], ", ", call.sizes[1], ", ",
                  call.sizes[2], ", ", call.sizes[3],
                  "]: the sum over the batch failed: ", cudaGetErrorString(error));
}

}  // namespace visattn::cuda
