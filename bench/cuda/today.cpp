// The engine as it is, through its own launches.
#include "cuda/launch.h"
#include "variants.h"

namespace gradclip::cuda::sweep {

cudaError_t measure_as_today(const Job& job, Clip* clip, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = make_plan(*job.index, {}, &plan);
  if (error != cudaSuccess) return error;
  clip->partials = job.partials;
  clip->count = static_cast<int32_t>(plan.partials());
  return power_sums(plan, Norm::kL2, job.precision, job.partials, nullptr, stream);
}

cudaError_t clip_as_today(const Job& job, bool in_one_block, bool early, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = make_plan(*job.index, {}, &plan);
  if (error != cudaSuccess) return error;
  if (in_one_block) return clip_in_one_block(plan, job.precision, job.clip, stream);
  Clip clip = job.clip;
  const cudaError_t measured = measure_as_today(job, &clip, stream);
  return measured == cudaSuccess ? scale(plan, clip, early, stream) : measured;
}

cudaError_t finish_as_today(const Job& job, int64_t partials, cudaStream_t stream) {
  return finish(Norm::kL2, job.partials, partials, nullptr, job.clip.norm_dtype,
                job.clip.norm_result, stream);
}

bool takes_one_block_today(const FlatIndex& index) { return fits_one_block(index); }

}  // namespace gradclip::cuda::sweep
