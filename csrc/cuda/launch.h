// The CUDA engine as the binding sees it: operations on the flat index of one device's gradients,
// queued on a stream. Nothing here waits for the GPU, allocates or keeps anything between calls but
// facts about the devices. Every function returns what the runtime says of its launches, and works
// on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "cuda/clip.h"

namespace gradclip::cuda {

// A list of gradients, cut into what a single launch can take.
class Plan {
 public:
  // `index` has to outlive the plan, which is for the current device.
  static cudaError_t make(const FlatIndex& index, Plan* plan);

  // For decay_and_power_sums; cudaErrorNotSupported where tables of that size cannot be passed.
  static cudaError_t make_for_decay(const FlatIndex& index, Plan* plan);

  // How many doubles the launches below write: one a worker; and where each tensor's norm is asked
  // for, one for each slot.
  int64_t partials() const { return partials_; }
  int64_t slots() const { return slot_count(index_->tensors(), partials_); }

 private:
  friend class Launcher;
  struct Part {
    Range tensors;
    int64_t tiles;
    int32_t workers;
    int32_t first_worker;
  };

  const FlatIndex* index_ = nullptr;
  std::vector<Part> parts_;
  int64_t partials_ = 0;
};

// The compute capabilities times a hundred that there is code for, as in "800,900" for 8.0 and 9.0.
const char* built_architectures();

// Whether one block alone should clip this list, in one launch.
bool fits_one_block(const FlatIndex& index);

// Writes the power sum of each worker; with `slots`, also that of each (tensor, worker) pair.
cudaError_t power_sums(const Plan& plan, Norm norm, Precision precision, double* partials,
                       double* slots, cudaStream_t stream);

// The same with slots, after the decay was added to the gradients, which it writes. Each parameter
// has to lie as its gradient does, relative to 16 bytes.
cudaError_t decay_and_power_sums(const Plan& plan, Norm norm, Precision precision,
                                 const Decay& decay, double* partials, double* slots,
                                 cudaStream_t stream);

// From partials of any number of plans, side by side, to one power sum or one norm.
cudaError_t finish(Norm norm, const double* partials, int64_t count, double* power_sum,
                   DType norm_dtype, void* norm_result, cudaStream_t stream);

// From slots to the norm of each tensor.
cudaError_t tensor_norms(const Plan& plan, Norm norm, const double* slots, double* norms,
                         cudaStream_t stream);

// Multiplies by the coefficient that `clip` describes. With `early` the kernel may be started while
// the one before it, which has to be a power_sums of this call, is still running.
cudaError_t scale(const Plan& plan, const Clip& clip, bool early, cudaStream_t stream);

// Multiplies each tensor by a coefficient of its own; one of 0 clears NaN and infinity, too.
cudaError_t scale_each(const Plan& plan, const double* coefficients, cudaStream_t stream);

cudaError_t clamp(const Plan& plan, double bound, cudaStream_t stream);

// power_sums and scale in one launch, for a list that fits_one_block.
cudaError_t clip_in_one_block(const Plan& plan, Precision precision, const Clip& clip,
                              cudaStream_t stream);

}  // namespace gradclip::cuda
