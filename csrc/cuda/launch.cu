#include <map>
#include <mutex>
#include <type_traits>

#include "cuda/kernels.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace gradclip::cuda {
namespace {

static_assert(Tuning().workers_per_multiprocessor == kResidentBlocks);
// Workers per multiprocessor for smaller blocks, which clip rows: as many as stay resident.
// Reasoned, not yet measured.
constexpr int64_t kRowWorkersPerMultiprocessor = kResidentBlocksOfRow;

constexpr bool kLargeParameters = GRADCLIP_LARGE_PARAMETERS;

// Queried once per device.
struct DeviceProperties {
  int multiprocessors = 0;
  bool takes_large_parameters = false;
  // Whether the loaded code waits for the previous kernel, so that it may be launched early. Not
  // whether the device could: what the driver compiles from older PTX has no wait.
  bool can_start_early = false;
};

cudaError_t ask(int device, DeviceProperties* properties) {
  cudaError_t error =
      cudaDeviceGetAttribute(&properties->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
#if !defined(__HIPCC__)
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes,
                                reinterpret_cast<const void*>(&scale_kernel<Table<kSmallTable>>));
  if (error != cudaSuccess) return error;
  int driver = 0;
  error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;
  // From 12.3 on early starts also work in graphs.
  properties->can_start_early = GRADCLIP_HAS_WAIT && attributes.ptxVersion >= 90 && driver >= 12030;
  properties->takes_large_parameters =
      kLargeParameters && attributes.ptxVersion >= 70 && driver >= 12010;
#endif
  return cudaSuccess;
}

cudaError_t properties_of_current_device(DeviceProperties* properties) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found == known.end()) {
    error = ask(device, properties);
    if (error == cudaSuccess) known.emplace(device, *properties);
    return error;
  }
  *properties = found->second;
  return cudaSuccess;
}

// Calls work(constant) with the norm as a constant.
template <class Work>
cudaError_t with_norm(Norm kind, const Work& work) {
  switch (kind) {
    case Norm::kL1:
      return work(std::integral_constant<Norm, Norm::kL1>());
    case Norm::kL2:
      return work(std::integral_constant<Norm, Norm::kL2>());
    case Norm::kInf:
      return work(std::integral_constant<Norm, Norm::kInf>());
  }
  return cudaErrorInvalidValue;
}

int64_t most_workers(const DeviceProperties& properties) {
  return tuning().workers_per_multiprocessor * properties.multiprocessors;
}

// Calls work(table) for each launch of a plan, with the smallest table that holds its tensors.
template <class Work>
cudaError_t for_each_table(const Plan& plan, const Work& work) {
  if constexpr (kLargeParameters) {
    return for_tables<Table, kSmallTable, kMediumTable, kWideTable, kLargeTable>(plan, work);
  } else {
    return for_tables<Table, kSmallTable, kMediumTable>(plan, work);
  }
}

// The same with tables that hold positions.
template <class Work>
cudaError_t for_each_position_table(const Plan& plan, const Work& work) {
  if constexpr (kLargeParameters) {
    return for_tables<PositionTable, kSmallTable, kMediumPositionTable, kWideTable,
                      kLargePositionTable>(plan, work);
  } else {
    return for_tables<PositionTable, kSmallTable, kMediumPositionTable>(plan, work);
  }
}

template <class Work>
cudaError_t for_each_border_table(const Plan& plan, const Work& work) {
  if constexpr (kLargeParameters) {
    return for_tables<BorderTable, kMediumTable, kLargeTable>(plan, work);
  } else {
    return for_tables<BorderTable, kMediumTable>(plan, work);
  }
}

}  // namespace

#define GRADCLIP_STRING_OF(...) #__VA_ARGS__
#define GRADCLIP_STRING(...) GRADCLIP_STRING_OF(__VA_ARGS__)

const char* built_architectures() {
#if defined(__CUDA_ARCH_LIST__)
  return GRADCLIP_STRING(__CUDA_ARCH_LIST__);
#else
  return "unknown";
#endif
}

cudaError_t make_plan(const FlatIndex& index, const Companions& companions, Plan* plan) {
  DeviceProperties properties;
  const cudaError_t error = properties_of_current_device(&properties);
  if (error != cudaSuccess) return error;
  if (companions.decay != nullptr && !properties.takes_large_parameters) {
    return cudaErrorNotSupported;
  }
  // The same with and without positions, so that the same sums are added up either way.
  const int64_t capacity = companions.decay != nullptr         ? kLargeDecayTable
                           : properties.takes_large_parameters ? kLargeTable
                                                               : kMediumTable;
  *plan = Plan(index, companions, capacity, most_workers(properties));
  return cudaSuccess;
}

cudaError_t power_sums(const Plan& plan, Norm kind, Precision precision, double* partials,
                       double* slots, cudaStream_t stream) {
  return with_norm(kind, [&](auto constant) {
    constexpr Norm kNorm = decltype(constant)::value;
    const auto measure = [&](const auto& table, auto* kernel) {
      return launch_kernel(kernel, table.workers, kThreads, stream, false, table, precision,
                           partials, slots);
    };
    if (plan.decays()) {
      if constexpr (kLargeParameters) {
        return for_tables<DecayTable, kSmallTable, kLargeDecayTable>(plan, [&](const auto& table) {
          using AnyTable = std::decay_t<decltype(table)>;
          return measure(table, &power_sums_kernel<kNorm, true, AnyTable>);
        });
      } else {
        return cudaErrorNotSupported;
      }
    }
    return for_each_table(plan, [&](const auto& table) {
      using AnyTable = std::decay_t<decltype(table)>;
      return measure(table, slots == nullptr ? &power_sums_kernel<kNorm, false, AnyTable>
                                             : &power_sums_kernel<kNorm, true, AnyTable>);
    });
  });
}

cudaError_t finish(Norm kind, const double* partials, int64_t count, double* power_sum,
                   DType norm_dtype, void* norm_result, cudaStream_t stream) {
  return launch_kernel(&finish_kernel, 1, kThreads, stream, false, kind, partials,
                       static_cast<int>(count), power_sum, norm_dtype, norm_result);
}

cudaError_t tensor_norms(const Plan& plan, Norm kind, const double* slots, double* norms,
                         cudaStream_t stream) {
  constexpr int64_t kTensorsPerBlock = kThreads / kWarpThreads;
  return with_norm(kind, [&](auto constant) {
    return for_each_border_table(plan, [&](const auto& table) {
      using AnyTable = std::decay_t<decltype(table)>;
      const int64_t blocks = (table.tensors + kTensorsPerBlock - 1) / kTensorsPerBlock;
      return launch_kernel(&tensor_norms_kernel<decltype(constant)::value, AnyTable>, blocks,
                           kThreads, stream, false, table, slots, norms);
    });
  });
}

cudaError_t scale(const Plan& plan, const Clip& clip, bool early, cudaStream_t stream) {
  DeviceProperties properties;
  const cudaError_t error = properties_of_current_device(&properties);
  if (error != cudaSuccess) return error;
  bool first = true;
  return for_each_table(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    // The second of several follows a kernel that writes the same list, so it starts as usual.
    const bool start_early =
        early && first && properties.can_start_early && tuning().early_start != 0;
    first = false;
    return launch_kernel(&scale_kernel<AnyTable>, table.workers, kThreads, stream, start_early,
                         table, clip);
  });
}

cudaError_t scale_each(const FlatIndex& index, const int64_t* positions, const double* coefficients,
                       cudaStream_t stream) {
  DeviceProperties properties;
  const cudaError_t error = properties_of_current_device(&properties);
  if (error != cudaSuccess) return error;
  const int64_t capacity =
      properties.takes_large_parameters ? kLargePositionTable : kMediumPositionTable;
  const Plan plan(index, {nullptr, positions}, capacity, most_workers(properties));
  return for_each_position_table(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    return launch_kernel(&scale_each_kernel<AnyTable>, table.workers, kThreads, stream, false,
                         table, coefficients);
  });
}

cudaError_t clamp(const Plan& plan, double bound, cudaStream_t stream) {
  return for_each_table(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    return launch_kernel(&clamp_kernel<AnyTable>, table.workers, kThreads, stream, false, table,
                         bound);
  });
}

cudaError_t make_plan(const std::vector<Rows>& rows, RowsPlan* plan) {
  DeviceProperties properties;
  const cudaError_t error = properties_of_current_device(&properties);
  if (error != cudaSuccess) return error;
  *plan = RowsPlan(rows, kRowsTable, kRowWorkersPerMultiprocessor * properties.multiprocessors);
  return cudaSuccess;
}

cudaError_t clip_rows(const RowsPlan& plan, const UnitLimit& limit, double* smallest,
                      cudaStream_t stream) {
  return plan.for_tables<kRowsTable>([&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    return launch_kernel(&clip_rows_kernel<AnyTable>, table.workers, kThreadsOfRow, stream, false,
                         table, limit, smallest);
  });
}

cudaError_t clip_in_one_block(const Plan& plan, Precision precision, const Clip& clip,
                              cudaStream_t stream) {
  return with_norm(clip.kind, [&](auto constant) {
    return for_tables<Table, kSmallTable>(plan, [&](const auto& whole) {
      using AnyTable = std::decay_t<decltype(whole)>;
      AnyTable table = whole;
      table.workers = 1;
      return launch_kernel(&clip_in_one_block_kernel<decltype(constant)::value, AnyTable>, 1,
                           kThreadsOfOneBlock, stream, false, table, precision, clip);
    });
  });
}

}  // namespace gradclip::cuda
