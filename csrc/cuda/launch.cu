// Launches on torch's current stream: a grid of clusters, or a cooperative grid whose blocks are all
// resident.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>
#include <string>

#include "device.cuh"
#include "launch.h"

namespace visattn::cuda {
namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t error, const char* name, const Plan& p, const Call& call, const char* step) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch that was refused is not the next one's error
  STD_TORCH_CHECK(false, name, " on x [", call.sizes[0], ", ", call.sizes[1], ", ", call.sizes[2], ", ",
                  call.sizes[3], "]: ", step, " failed: ", cudaGetErrorString(error), " (", p.blocks,
                  " blocks of ", p.threads, " threads in teams of ", p.geometry.team, ", ", p.shared_bytes,
                  " bytes of shared memory each)");
}

// Memory of torch's allocator on the current stream: it may be given back at once, for it is reused in stream
// order.
torch::stable::Tensor scratchpad(int64_t words, int device) {
  const int64_t stride = 1;
  const int32_t code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(torch::headeronly::ScalarType::Int));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &words, &stride, code, aoti_torch_device_type_cuda(), device, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace

const Device& device_of(int index) {
  static std::array<Device, kMostDevices> devices;
  static std::mutex mutex;
  STD_TORCH_CHECK(index >= 0 && index < kMostDevices, "no such CUDA device: ", index);
  const std::lock_guard<std::mutex> lock(mutex);
  Device& d = devices[static_cast<size_t>(index)];
  if (d.sm) return d;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", index, ": ", cudaGetErrorString(error));
    return value;
  };
  d.count = ask(cudaDevAttrMultiProcessorCount);
  d.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.l2_bytes = ask(cudaDevAttrL2CacheSize);
  d.sm = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  return d;
}

void launch(const char* name, Kernel kernel, void* args, const Plan& p, const Call& call) {
  STD_TORCH_CHECK(p.variant != kRefused, name, " has no CUDA kernel for this shape: ", p.why);
  const auto checked = [&](cudaError_t error, const char* step) { check(error, name, p, call, step); };
  const auto stream = static_cast<cudaStream_t>(call.stream);
  checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes),
          "sizing");
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.blocks));
  config.blockDim = dim3(static_cast<unsigned>(p.threads));
  config.dynamicSmemBytes = static_cast<size_t>(p.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  Workspace workspace = {};
  void* parameters[] = {args, &workspace};
  if (p.variant == kCluster) {
    cudaFuncAttributes compiled = {};
    checked(cudaFuncGetAttributes(&compiled, kernel), "asking for the kernel");
    STD_TORCH_CHECK(compiled.ptxVersion >= 90, name, ": the CUDA library was compiled for sm_",
                    compiled.ptxVersion,
                    ", and clusters need sm_90: build it with 9.0 or later in TORCH_CUDA_ARCH_LIST");
    if (p.geometry.team > 8) {
      checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
              "sizing the cluster");
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(p.geometry.team), 1, 1};
    return checked(cudaLaunchKernelExC(&config, kernel, parameters), "the launch");
  }
  // Teams of one call meet at semaphores of its own: other streams and replayed graphs have theirs.
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  const int64_t exchange = int64_t{2} * p.blocks * p.scratch.shared;
  const torch::stable::Tensor memory = scratchpad(exchange + p.teams, call.device);
  workspace.exchange = static_cast<float*>(memory.data_ptr());
  workspace.semaphores = static_cast<unsigned*>(memory.data_ptr()) + exchange;
  const size_t bytes = sizeof(unsigned) * static_cast<size_t>(p.teams);
  checked(cudaMemsetAsync(workspace.semaphores, 0, bytes, stream), "clearing semaphores");
  checked(cudaLaunchKernelExC(&config, kernel, parameters), "the cooperative launch");
}

}  // namespace visattn::cuda
