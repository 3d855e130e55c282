// Launches on torch's current stream: a grid of clusters, or a cooperative grid whose blocks are all
// resident.
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "../common/plan.h"
#include "device.cuh"
#include "launch.h"

namespace visattn::cuda {
namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t error, const char* name, const Plan& p, const Call& call, const char* step) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report this error
  STD_TORCH_CHECK(false, name, " on x [", call.sizes[0], ", ", call.sizes[1], ", ", call.sizes[2], ", ",
                  call.sizes[3], "]: ", step, " failed: ", cudaGetErrorString(error), " (", p.blocks,
                  " blocks of ", p.threads, " threads in teams of ", p.geometry.team, ", ", p.shared_bytes,
                  " bytes of shared memory each)");
}

// Sets what a launch of this size needs. The cap on shared memory belongs to the function, which other
// threads launch with other sizes: it is always the device's maximum.
cudaError_t prepare(Kernel kernel, const Plan& p, int device) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 device_of(device).shared_bytes);
  if (error != cudaSuccess || p.variant != kCluster || p.geometry.team <= 8) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

cudaLaunchConfig_t config_of(const Plan& p, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.blocks));
  config.blockDim = dim3(static_cast<unsigned>(p.threads));
  config.dynamicSmemBytes = static_cast<size_t>(p.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
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

int resident_clusters(Kernel kernel, const Plan& p, int device) {
  static std::map<std::tuple<Kernel, int, int, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key{kernel, device, p.geometry.team, p.shared_bytes};
  if (const auto at = known.find(key); at != known.end()) return at->second;
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = config_of(p, nullptr);
  config.gridDim = dim3(static_cast<unsigned>(p.geometry.team));
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(p.geometry.team), 1, 1};
  config.attrs = &cluster, config.numAttrs = 1;
  cudaFuncAttributes compiled = {};
  int count = 0;
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess && compiled.ptxVersion >= 90) {
    error = prepare(kernel, p, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (error != cudaSuccess) count = 0;
  }
  if (error != cudaSuccess) cudaGetLastError();  // so that the next launch does not report this error
  // A size that the device cannot place stays so; other errors may pass.
  if (error == cudaSuccess || error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidValue) {
    known.emplace(key, count);
  }
  return count;
}

void launch(const char* name, Kernel kernel, void* args, const Plan& p, float* memory, const Call& call) {
  STD_TORCH_CHECK(p.variant != kRefused, name, " has no CUDA kernel for this shape: ", p.why);
  const auto checked = [&](cudaError_t error, const char* step) { check(error, name, p, call, step); };
  checked(prepare(kernel, p, call.device), "sizing");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = config_of(p, call.stream);
  config.attrs = attributes;
  if (p.variant == kCluster) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(p.geometry.team), 1, 1};
  }
  // Blocks that meet outside their cluster must all be resident.
  if (p.variant == kSemaphore || p.one_launch) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  // Each call has its own semaphores, so that calls on other streams and replayed graphs do not meet at them.
  Workspace workspace = {memory, reinterpret_cast<unsigned*>(memory + p.exchange_floats())};
  void* parameters[] = {args, &workspace};
  checked(cudaLaunchKernelExC(&config, kernel, parameters), "the launch");
}

}  // namespace visattn::cuda
