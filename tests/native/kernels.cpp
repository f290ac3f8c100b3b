#include "kernels.h"

#include <type_traits>

#include "cuda/bodies.cuh"

namespace gradclip::cuda {

static_assert(emulation::kWarpThreads == kWarpThreads);

// Calls work with the norm as a constant.
template <class Work>
static void with_norm(Norm kind, const Work& work) {
  switch (kind) {
    case Norm::kL1:
      return work(std::integral_constant<Norm, Norm::kL1>());
    case Norm::kL2:
      return work(std::integral_constant<Norm, Norm::kL2>());
    case Norm::kInf:
      return work(std::integral_constant<Norm, Norm::kInf>());
  }
}

void power_sums_thread(const SmallTable& table, Norm kind, Precision precision, double* partials,
                       double* slots) {
  with_norm(kind, [&](auto constant) {
    constexpr Norm kNorm = decltype(constant)::value;
    if (slots == nullptr) {
      power_sums_body<kNorm, false, kThreads>(table, precision, partials, slots);
    } else {
      power_sums_body<kNorm, true, kThreads>(table, precision, partials, slots);
    }
  });
}

void scale_thread(const SmallTable& table, const Clip& clip) { scale_body<kThreads>(table, clip); }

void scale_each_thread(const SmallPositionTable& table, const double* coefficients) {
  scale_each_body<kThreads>(table, coefficients);
}

void clamp_thread(const SmallTable& table, double bound) { clamp_body<kThreads>(table, bound); }

void clip_rows_thread(const SmallRowsTable& table, const UnitLimit& limit, double* smallest) {
  clip_rows_body<kThreads>(table, limit, smallest);
}

void clip_in_one_block_thread(const SmallTable& table, Precision precision, const Clip& clip) {
  with_norm(clip.kind, [&](auto constant) {
    clip_in_one_block_body<decltype(constant)::value, kThreads>(table, precision, clip);
  });
}

void finish_thread(Norm kind, const double* partials, int count, double* power_sum,
                   DType norm_dtype, void* norm_result) {
  finish_body<kThreads>(kind, partials, count, power_sum, norm_dtype, norm_result);
}

void tensor_norms_thread(const SmallBorderTable& table, Norm kind, const double* slots,
                         double* norms) {
  with_norm(kind, [&](auto constant) {
    tensor_norms_body<decltype(constant)::value, kThreads>(table, slots, norms);
  });
}

}  // namespace gradclip::cuda
