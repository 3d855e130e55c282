#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include "batch_sums.h"

namespace visattn::cuda {
namespace {

constexpr int kTile = 256;

__global__ void __launch_bounds__(kTile) outer_sums_kernel(const __grid_constant__ OuterSums all) {
  const OuterSum& s = all.sums[blockIdx.y];
  const int64_t i = int64_t{blockIdx.x} * kTile + threadIdx.x;
  if (i >= int64_t{s.rows} * s.cols) return;
  const int row = static_cast<int>(i / s.cols), col = static_cast<int>(i % s.cols);
  float total = 0;
#pragma unroll 4
  for (int64_t n = 0; n < all.batch; ++n) {
    const float v = s.b ? activate(s.b[n * s.cols + col], s.activation) : 1.0f;
    total += s.a[n * s.rows + row] * v;
  }
  s.out[i] = total;
}

// One block for each element of the window; a thread's terms, then the threads' sums, in a fixed order.
__global__ void __launch_bounds__(kTile) window_sum_kernel(const __grid_constant__ WindowSum s) {
  __shared__ float sums[kTile];
  const int shift = static_cast<int>(blockIdx.x) - s.window / 2;
  float total = 0;
  for (int64_t i = threadIdx.x; i < s.batch * s.channels; i += kTile) {
    const int from = static_cast<int>(i % s.channels) + shift;
    if (from >= 0 && from < s.channels) total += s.dz[i] * s.mean[i + shift];
  }
  sums[threadIdx.x] = total;
  for (int half = kTile / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) s.out[blockIdx.x] = sums[0];
}

void check(const char* name, const Call& call) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " on x [", call.sizes[0], ", ", call.sizes[1], ", ",
                  call.sizes[2], ", ", call.sizes[3],
                  "]: the sum over the batch failed: ", cudaGetErrorString(error));
}

}  // namespace

void launch_outer_sums(const char* name, const OuterSums& sums, int count, const Call& call) {
  int64_t largest = 0;
  for (int k = 0; k < count; ++k) largest = std::max(largest, int64_t{sums.sums[k].rows} * sums.sums[k].cols);
  if (largest == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(largest, kTile)), static_cast<unsigned>(count));
  outer_sums_kernel<<<grid, kTile, 0, static_cast<cudaStream_t>(call.stream)>>>(sums);
  check(name, call);
}

void launch_window_sum(const char* name, const WindowSum& sum, const Call& call) {
  window_sum_kernel<<<static_cast<unsigned>(sum.window), kTile, 0, static_cast<cudaStream_t>(call.stream)>>>(
      sum);
  check(name, call);
}

}  // namespace visattn::cuda
