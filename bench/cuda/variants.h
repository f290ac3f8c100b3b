// The variants of each family, as the rest of the sweep sees them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/flat_index.h"
#include "core/norm.h"
#include "cuda/clip.h"

namespace gradclip::cuda::sweep {

// A list on the GPU, and what is to be done with it.
struct Job {
  const FlatIndex* index;
  double* partials;
  // With the norm's place, and max_norm; a variant adds the partials that it has written.
  Clip clip;
  Precision precision;
  int multiprocessors;
};

// What came of queueing a variant: an error, or how many partials it leaves for finish_as_today.
struct Queued {
  Queued(cudaError_t error, int64_t partials = 0) : error(error), partials(partials) {}

  cudaError_t error;
  int64_t partials;
};

struct Variant {
  std::string name;
  int threads;
  // For each multiprocessor, or in all where there is one cluster; 0 if the list decides.
  int blocks;
  // In flight.
  int loads;
  // Queues all of its kernels. cudaErrorNotSupported means that it cannot run this list here.
  std::function<Queued(const Job&, cudaStream_t)> launch;
  // Whether it can, asked once, since that takes longer than a launch; always if there is none.
  std::function<cudaError_t()> prepare = nullptr;
};

// As many threads of a multiprocessor as have the registers that so many loads in flight take.
constexpr int resident_threads(int loads) { return loads <= 2 ? 2048 : loads == 4 ? 1536 : 1024; }

// How many partials the longest launch of any variant may write.
inline constexpr int64_t kMostPartials = 64 * 1024;

// The name of the engine as it is, which every family has first.
inline constexpr const char* kToday = "today";

// Measure only, and leave partials.
std::vector<Variant> measuring_variants();
// Measure as the engine does, then scale.
std::vector<Variant> scaling_variants();
// Measure and scale, with different ways into the second kernel.
std::vector<Variant> prologue_variants();
// Measure and scale a list of a few megabytes at most.
std::vector<Variant> small_list_variants();

// Queues measuring by the engine; fills in the partials of `clip`.
cudaError_t measure_as_today(const Job& job, Clip* clip, cudaStream_t stream);
// Measures and scales by the engine in one launch, or in two.
cudaError_t clip_as_today(const Job& job, bool in_one_block, bool early, cudaStream_t stream);
// Combines partials to the norm in job.clip's place.
cudaError_t finish_as_today(const Job& job, int64_t partials, cudaStream_t stream);
// Whether the engine clips this list in one launch.
bool takes_one_block_today(const FlatIndex& index);

}  // namespace gradclip::cuda::sweep
