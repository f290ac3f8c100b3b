// The CUDA engine as the binding sees it: operations on the flat index of one device's gradients,
// queued on a stream. Nothing here waits for the GPU, allocates or keeps anything between calls but
// facts about the devices. Every function returns what the runtime says of its launches, and works
// on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "cuda/clip.h"
#include "cuda/plan.h"

namespace gradclip::cuda {

// A plan for the current device; see Plan. cudaErrorNotSupported where there is a decay and tables
// as large as that takes cannot be passed.
cudaError_t make_plan(const FlatIndex& index, const Decay* decay, Plan* plan);

// The compute capabilities times a hundred that there is code for, as in "800,900" for 8.0 and 9.0.
const char* built_architectures();

// Writes the power sum of each worker; with `slots`, also that of each (tensor, worker) pair. A
// plan that decays needs slots; the gradients are changed before they are measured, and each
// parameter has to be where its gradient is, relative to 16 bytes.
cudaError_t power_sums(const Plan& plan, Norm kind, Precision precision, double* partials,
                       double* slots, cudaStream_t stream);

// From partials of any number of plans, side by side, to one power sum or one norm.
cudaError_t finish(Norm kind, const double* partials, int64_t count, double* power_sum,
                   DType norm_dtype, void* norm_result, cudaStream_t stream);

// From slots to the norm of each tensor.
cudaError_t tensor_norms(const Plan& plan, Norm kind, const double* slots, double* norms,
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
