#include "gpu.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gpu_kernels.h"
#include "report.h"

namespace gradclip::cuda::sweep {
namespace {

constexpr int64_t kBandwidthBytes = int64_t{1} << 30;

}  // namespace

void require(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  const char* name = std::strrchr(file, '/');
  throw CudaFailure(std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line) +
                    ": " + call + ": " + cudaGetErrorString(error));
}

Memory::Memory(Place place, int64_t bytes) : place_(place) {
  const auto size = static_cast<size_t>(bytes);
  if (place == Place::kGpu) {
    CUDA_REQUIRE(cudaMalloc(&data_, size));
  } else {
    CUDA_REQUIRE(cudaMallocHost(&data_, size));
  }
}

Memory::~Memory() {
  // Nothing can be done about an error here, and the next call reports it as well.
  (void)(place_ == Place::kGpu ? cudaFree(data_) : cudaFreeHost(data_));
}

Gpu::Gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "no GPU: %s\n",
                 error == cudaSuccess ? "CUDA finds none" : cudaGetErrorString(error));
    std::exit(3);
  }
  cudaDeviceProp properties;
  CUDA_REQUIRE(cudaGetDeviceProperties(&properties, 0));
  CUDA_REQUIRE(cudaSetDevice(0));
  name_ = properties.name;
  multiprocessors_ = properties.multiProcessorCount;
  cache_bytes_ = properties.l2CacheSize;
  if (!can_run_kernels()) {
    std::fprintf(stderr, "%s: compute capability %d.%d, which this program was not built for\n",
                 properties.name, properties.major, properties.minor);
    std::exit(3);
  }
  CUDA_REQUIRE(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  CUDA_REQUIRE(cudaEventCreate(&before_));
  CUDA_REQUIRE(cudaEventCreate(&after_));
  const int64_t bytes = 2 * cache_bytes_;
  CUDA_REQUIRE(cudaMalloc(&filled_, static_cast<size_t>(bytes)));
  CUDA_REQUIRE(cudaMalloc(&clean_, static_cast<size_t>(bytes)));
  CUDA_REQUIRE(cudaMalloc(&sink_, sizeof(uint32_t)));
  CUDA_REQUIRE(queue_fill(clean_, bytes, multiprocessors_, stream_));
  synchronize();
}

void Gpu::read(const void* data, int64_t bytes, int loads, int blocks_per_multiprocessor) {
  CUDA_REQUIRE(
      queue_read(data, bytes, loads, blocks_per_multiprocessor * multiprocessors_, sink_, stream_));
}

void Gpu::empty_cache() {
  CUDA_REQUIRE(cudaMemsetAsync(filled_, 0x3f, static_cast<size_t>(2 * cache_bytes_), stream_));
  read(clean_, 2 * cache_bytes_, 4, 8);
}

void Gpu::spin(double microseconds) {
  CUDA_REQUIRE(queue_spin(static_cast<int64_t>(1000.0 * microseconds), stream_));
}

double Gpu::time(const std::function<void()>& work) {
  CUDA_REQUIRE(cudaEventRecord(before_, stream_));
  work();
  CUDA_REQUIRE(cudaEventRecord(after_, stream_));
  synchronize();
  float milliseconds = 0.0f;
  CUDA_REQUIRE(cudaEventElapsedTime(&milliseconds, before_, after_));
  return 1e3 * static_cast<double>(milliseconds);
}

double Gpu::read_bandwidth() {
  if (read_bandwidth_ > 0.0) return read_bandwidth_;
  const Memory memory(Memory::Place::kGpu, kBandwidthBytes);
  const int64_t half = kBandwidthBytes / 2;
  CUDA_REQUIRE(queue_fill(memory.get(), kBandwidthBytes, 8 * multiprocessors_, stream_));
  // The clocks rise meanwhile.
  for (int i = 0; i < 200; ++i) read(memory.get(), kBandwidthBytes, 4, 8);
  synchronize();
  double fastest = 1e30;
  for (const int loads : {4, 8}) {
    for (const int blocks : {2, 4, 6, 8, 16, 32}) {
      std::vector<double> times;
      for (int i = 0; i < 7; ++i) {
        times.push_back(time([&] { read(memory.get(), kBandwidthBytes, loads, blocks); }));
      }
      fastest = std::min(fastest, median(times));
    }
  }
  read_bandwidth_ = static_cast<double>(kBandwidthBytes) / fastest / 1e3;
  std::vector<double> times;
  char* begin = static_cast<char*>(memory.get());
  for (int i = 0; i < 11; ++i) {
    times.push_back(time([&] {
      CUDA_REQUIRE(cudaMemcpyAsync(begin, begin + half, static_cast<size_t>(half),
                                   cudaMemcpyDeviceToDevice, stream_));
    }));
  }
  copy_bandwidth_ = static_cast<double>(kBandwidthBytes) / median(times) / 1e3;
  return read_bandwidth_;
}

double Gpu::copy_bandwidth() {
  read_bandwidth();
  return copy_bandwidth_;
}

Gradients::Gradients(Gpu* gpu, const List& list, uint64_t seed)
    : gpu_(gpu),
      list_(list),
      data_(Memory::Place::kGpu, list.size()),
      original_(Memory::Place::kGpu, list.size()),
      host_original_(Memory::Place::kHost, list.size()),
      host_data_(Memory::Place::kHost, list.size()),
      partials_(Memory::Place::kGpu, kMostPartials * static_cast<int64_t>(sizeof(double))),
      norm_result_(Memory::Place::kGpu, sizeof(double)),
      index_(list.index(data_.get())) {
  list.fill(seed, host_original_.get());
  norm_ = list.norm(host_original_.get());
  CUDA_REQUIRE(cudaMemcpyAsync(original_.get(), host_original_.get(),
                               static_cast<size_t>(list.size()), cudaMemcpyHostToDevice,
                               gpu->stream()));
  restore();
  poison_results();
  gpu->synchronize();
}

Job Gradients::job(double max_norm) const {
  Clip clip = {};
  clip.kind = Norm::kL2;
  clip.max_norm = {max_norm, nullptr, DType::kFloat64};
  clip.norm_result = norm_result_.get();
  clip.norm_dtype = DType::kFloat64;
  return {&index_, static_cast<double*>(partials_.get()), clip, Precision::kFloat32,
          gpu_->multiprocessors()};
}

void Gradients::restore() {
  CUDA_REQUIRE(cudaMemcpyAsync(data_.get(), original_.get(), static_cast<size_t>(list_.size()),
                               cudaMemcpyDeviceToDevice, gpu_->stream()));
}

void Gradients::poison_results() {
  // All bits set are a NaN.
  CUDA_REQUIRE(
      cudaMemsetAsync(partials_.get(), 0xff, kMostPartials * sizeof(double), gpu_->stream()));
  CUDA_REQUIRE(cudaMemsetAsync(norm_result_.get(), 0xff, sizeof(double), gpu_->stream()));
}

std::string Gradients::difference(double coefficient, bool look_at_gradients) {
  double norm = 0.0;
  CUDA_REQUIRE(cudaMemcpyAsync(&norm, norm_result_.get(), sizeof norm, cudaMemcpyDeviceToHost,
                               gpu_->stream()));
  gpu_->synchronize();
  if (!is_right_norm(norm, norm_)) {
    char text[96];
    std::snprintf(text, sizeof text, "the norm is %.9g and not %.9g", norm, norm_);
    return text;
  }
  if (!look_at_gradients) return "";
  CUDA_REQUIRE(cudaMemcpyAsync(host_data_.get(), data_.get(), static_cast<size_t>(list_.size()),
                               cudaMemcpyDeviceToHost, gpu_->stream()));
  gpu_->synchronize();
  return list_.difference(host_original_.get(), host_data_.get(), coefficient);
}

Graph::Graph(cudaStream_t stream, int calls, const std::function<cudaError_t()>& call) {
  cudaGraph_t graph = nullptr;
  CUDA_REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < calls && error == cudaSuccess; ++i) error = call();
  const cudaError_t end = cudaStreamEndCapture(stream, &graph);
  CUDA_REQUIRE(error);
  CUDA_REQUIRE(end);
  const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
  CUDA_REQUIRE(cudaGraphDestroy(graph));
  CUDA_REQUIRE(made);
}

Graph::~Graph() {
  // As in Memory.
  (void)cudaGraphExecDestroy(graph_);
}

}  // namespace gradclip::cuda::sweep
