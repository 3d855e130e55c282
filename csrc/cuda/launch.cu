// Launches on torch's current stream: a grid of clusters, or a cooperative grid whose blocks are all
// resident.
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>

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

void launch(const char* name, Kernel kernel, void* args, const Plan& p, float* memory, const Call& call) {
  STD_TORCH_CHECK(p.variant != kRefused, name, " has no CUDA kernel for this shape: ", p.why);
  const auto checked = [&](cudaError_t error, const char* step) { check(error, name, p, call, step); };
  checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes),
          "sizing");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.blocks));
  config.blockDim = dim3(static_cast<unsigned>(p.threads));
  config.dynamicSmemBytes = static_cast<size_t>(p.shared_bytes);
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = attributes;
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
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(p.geometry.team), 1, 1};
  }
  // Blocks that meet outside of their cluster must all be resident.
  if (p.variant == kSemaphore || p.one_launch) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  // Teams of one call meet at semaphores of its own: other streams and replayed graphs have theirs.
  Workspace workspace = {memory, reinterpret_cast<unsigned*>(memory + p.exchange_floats())};
  void* parameters[] = {args, &workspace};
  checked(cudaLaunchKernelExC(&config, kernel, parameters), "the launch");
}

}  // namespace visattn::cuda
