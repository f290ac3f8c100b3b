// What the variants use beyond csrc/cuda/portability.cuh: clusters of blocks, the trigger of an
// early start, loads and stores that are not to stay in the cache. The tests' emulation has its
// own, and launches clusters by itself.
#pragma once

#include "cuda/portability.cuh"

#if !defined(GRADCLIP_EMULATION)
#include <cooperative_groups.h>
#endif

namespace gradclip::cuda::sweep {

#if defined(GRADCLIP_EMULATION)

// The emulation's clusters are whole grids.
inline void arrive_at_cluster_barrier() { emulation::arrive_at_cluster_barrier(); }
inline void wait_at_cluster_barrier() { emulation::wait_at_cluster_barrier(); }

template <class Value>
Value load_from_block(const Value& own, int block) {
  return *static_cast<const Value*>(emulation::shared_memory_of(block, &own));
}

inline void trigger_next_kernel() {}
inline uint4 load_streaming(const uint4* vector) { return *vector; }
inline void store_streaming(uint4* vector, uint4 value) { *vector = value; }

#else

// Every thread of the cluster has to arrive and to wait. What a thread wrote to shared memory
// before it arrived is visible behind the wait. Clusters exist from 9.0 on; the host asks before it
// launches one.
__device__ __forceinline__ void arrive_at_cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  (void)cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ __forceinline__ void wait_at_cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The value that another block of the cluster has where this one has `own`, in shared memory.
template <class Value>
__device__ __forceinline__ Value load_from_block(Value& own, int block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return *cooperative_groups::this_cluster().map_shared_rank(&own, block);
#else
  (void)block;
  return own;
#endif
}

// Lets the next kernel in the stream start, as far as there is room, if that was launched early. It
// still waits for the end of this one before it reads what this one writes.
__device__ __forceinline__ void trigger_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ __forceinline__ uint4 load_streaming(const uint4* vector) { return __ldcs(vector); }
__device__ __forceinline__ void store_streaming(uint4* vector, uint4 value) {
  __stcs(vector, value);
}

// A grid that is one cluster.
struct ClusterLaunch {
  ClusterLaunch(int blocks, int threads, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
};

// Whether this GPU has room for such a cluster. More than 8 blocks have to be asked for.
template <class Kernel>
cudaError_t allow_cluster(Kernel* kernel, int blocks, int threads) {
  constexpr int kPortableBlocks = 8;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  int supported = 0;
  error = cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
  if (error != cudaSuccess) return error;
  if (supported == 0) return cudaErrorNotSupported;
  if (blocks > kPortableBlocks) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  const ClusterLaunch launch(blocks, threads, nullptr);
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  if (error != cudaSuccess) return error;
  return clusters > 0 ? cudaSuccess : cudaErrorNotSupported;
}

template <class Kernel, class... Arguments>
cudaError_t launch_cluster(Kernel* kernel, int blocks, int threads, cudaStream_t stream,
                           const Arguments&... arguments) {
  const ClusterLaunch launch(blocks, threads, stream);
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), addresses);
}

#endif

}  // namespace gradclip::cuda::sweep
