// The GPU as the sweep uses it: memory, lists in it, checks of variants, and clocks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lists.h"
#include "variants.h"

namespace gradclip::cuda::sweep {

// An error of the CUDA runtime that leaves nothing to be done in this process.
struct CudaFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void require(cudaError_t error, const char* call, const char* file, int line);
#define CUDA_REQUIRE(call) require(call, #call, __FILE__, __LINE__)

// On the GPU, or on the host for fast copies.
class Memory {
 public:
  enum class Place { kGpu, kHost };

  Memory(Place place, int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* get() const { return data_; }

 private:
  Place place_;
  void* data_ = nullptr;
};

class Gpu {
 public:
  // The first one. Ends the program with one line if there is none.
  Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const std::string& name() const { return name_; }
  int multiprocessors() const { return multiprocessors_; }
  cudaStream_t stream() const { return stream_; }
  void synchronize() const { CUDA_REQUIRE(cudaStreamSynchronize(stream_)); }

  // Leaves nothing of earlier data in the L2 cache, and nothing that would have to be written back:
  // fills one buffer, then reads another.
  void empty_cache();

  // Occupies the GPU, so that what is queued meanwhile starts at once when it is done.
  void spin(double microseconds);

  // Microseconds from before to after what work() queues.
  double time(const std::function<void()>& work);

  // Measured on the first call: gigabytes a second, of the best of some kernels that only read, and
  // of cudaMemcpy on the GPU, which counts what it reads and what it writes.
  double read_bandwidth();
  double copy_bandwidth();

 private:
  void read(const void* data, int64_t bytes, int loads, int blocks_per_multiprocessor);

  std::string name_;
  int multiprocessors_ = 0;
  int64_t cache_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t before_ = nullptr;
  cudaEvent_t after_ = nullptr;
  void* filled_ = nullptr;
  void* clean_ = nullptr;
  void* sink_ = nullptr;
  double read_bandwidth_ = 0.0;
  double copy_bandwidth_ = 0.0;
};

// A list in the GPU's memory, with the norm that it should have.
class Gradients {
 public:
  Gradients(Gpu* gpu, const List& list, uint64_t seed);

  const List& list() const { return list_; }
  double norm() const { return norm_; }

  // What a variant gets; max_norm decides whether it scales.
  Job job(double max_norm) const;

  // As they were. Queued, as all of this.
  void restore();
  // NaN wherever a variant has to write.
  void poison_results();

  // Waits. What is wrong with the norm and, where it should be looked at, with the gradients.
  std::string difference(double coefficient, bool look_at_gradients);

 private:
  Gpu* gpu_;
  const List& list_;
  Memory data_;
  Memory original_;
  Memory host_original_;
  Memory host_data_;
  Memory partials_;
  Memory norm_result_;
  FlatIndex index_;
  double norm_ = 0.0;
};

// K calls in a graph, one after another.
class Graph {
 public:
  Graph(cudaStream_t stream, int calls, const std::function<cudaError_t()>& call);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(cudaStream_t stream) const { CUDA_REQUIRE(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace gradclip::cuda::sweep
