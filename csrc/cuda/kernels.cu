// The kernels and how they are launched.
#include <algorithm>
#include <map>
#include <mutex>
#include <type_traits>

#include "cuda/bodies.cuh"
#include "cuda/launch.h"

namespace gradclip::cuda {
namespace {

constexpr int kThreads = 256;
// What the compiler chooses registers for: 40. Left alone it aims at 8 blocks and 32 registers, and
// asks for the fourth vector of a run only when the first is used up.
constexpr int kResidentBlocks = 6;
// Of the kernel that reads parameters as well, which would spill for 12.0 otherwise.
constexpr int kResidentDecayBlocks = 4;
// More, where one block is all there is.
constexpr int kThreadsOfOneBlock = 512;

// Ranges of tiles, and so blocks, for each multiprocessor: as many as stay resident. A bet, until
// it is compared on a GPU.
constexpr int64_t kWorkersPerMultiprocessor = kResidentBlocks;

// Below this a second launch costs more than what more blocks gain. A bet, too.
constexpr int64_t kOneBlockBytes = 512 * 1024;

// Tables are taken by reference from here on, and are never copied or captured: that would move
// them from the constant bank to the stack.

template <Norm kNorm, bool kPerTensor, class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    power_sums_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, bool exact, double* partials,
                      double* slots) {
  power_sums_body<kNorm, kPerTensor, kThreads>(table, exact, partials, slots);
}

template <Norm kNorm, class AnyDecayTable>
__global__ void __launch_bounds__(kThreads, kResidentDecayBlocks)
    decay_and_power_sums_kernel(GRADCLIP_GRID_CONSTANT(AnyDecayTable) decay, bool exact,
                                double* partials, double* slots) {
  decay_and_power_sums_body<kNorm, kThreads>(decay, exact, partials, slots);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    scale_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, GRADCLIP_GRID_CONSTANT(Clip) clip) {
  scale_body<kThreads>(table, clip);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    scale_each_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, const double* coefficients) {
  scale_each_body<kThreads>(table, coefficients);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    clamp_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, double bound) {
  clamp_body<kThreads>(table, bound);
}

template <Norm kNorm, class AnyTable>
__global__ void __launch_bounds__(kThreadsOfOneBlock)
    clip_in_one_block_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, bool exact,
                             GRADCLIP_GRID_CONSTANT(Clip) clip) {
  clip_in_one_block_body<kNorm, kThreadsOfOneBlock>(table, exact, clip);
}

template <Norm kNorm, class AnyTable>
__global__ void __launch_bounds__(kThreads)
    tensor_norms_kernel(GRADCLIP_GRID_CONSTANT(AnyTable) table, const double* slots,
                        double* norms) {
  tensor_norms_body<kNorm, kThreads>(table, slots, norms);
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Norm norm, const double* partials, int count, double* power_sum, DType norm_dtype,
                  void* norm_result) {
  finish_body<kThreads>(norm, partials, count, power_sum, norm_dtype, norm_result);
}

// What is asked once for each device.
struct Facts {
  int multiprocessors = 0;
  int largest_table = kMediumTable;
  // Whether the loaded code waits for the kernel before it, so that it may be started early. Not
  // whether the device could: code that the driver compiles from older PTX has no wait.
  bool can_start_early = false;
};

cudaError_t ask(int device, Facts* facts) {
  cudaError_t error =
      cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device);
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
  facts->can_start_early = attributes.ptxVersion >= 90 && driver >= 12030;
  if (attributes.ptxVersion >= 70 && driver >= 12010) facts->largest_table = kLargeTable;
#endif
  return cudaSuccess;
}

cudaError_t facts_of_current_device(Facts* facts) {
  static std::mutex mutex;
  static std::map<int, Facts> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found == known.end()) {
    error = ask(device, facts);
    if (error == cudaSuccess) known.emplace(device, *facts);
    return error;
  }
  *facts = found->second;
  return cudaSuccess;
}

}  // namespace

// Has access to the parts of a plan, which nobody else needs to see.
class Launcher {
 public:
  // Calls work(table) for each part of the plan, with the smallest table that holds it.
  template <class Work>
  static cudaError_t for_tables(const Plan& plan, const Work& work) {
    for (const Plan::Part& part : plan.parts_) {
      const int64_t tensors = part.tensors.end - part.tensors.begin;
      cudaError_t error;
      if (tensors <= kSmallTable) {
        error = work(table_of<kSmallTable>(plan, part));
      } else if (tensors <= kMediumTable) {
        error = work(table_of<kMediumTable>(plan, part));
      } else {
        error = work(table_of<kLargeTable>(plan, part));
      }
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // The same with tables that also hold the parameters.
  template <class Work>
  static cudaError_t for_decay_tables(const Plan& plan, const Decay& decay, const Work& work) {
    for (const Plan::Part& part : plan.parts_) {
      const int64_t tensors = part.tensors.end - part.tensors.begin;
      const cudaError_t error = tensors <= kSmallTable
                                    ? work(decay_table_of<kSmallTable>(plan, part, decay))
                                    : work(decay_table_of<kLargeDecayTable>(plan, part, decay));
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  static void split(const FlatIndex& index, const Facts& facts, int64_t capacity, Plan* plan) {
    plan->index_ = &index;
    int64_t workers = 0;
    for (int64_t begin = 0; begin < index.tensors(); begin += capacity) {
      const int64_t end = std::min<int64_t>(begin + capacity, index.tensors());
      const int64_t behind = end < index.tensors() ? index.first_tile(end) : index.tiles();
      const int64_t tiles = behind - index.first_tile(begin);
      const int64_t own =
          std::min<int64_t>(tiles, kWorkersPerMultiprocessor * facts.multiprocessors);
      plan->parts_.push_back(
          {{begin, end}, tiles, static_cast<int32_t>(own), static_cast<int32_t>(workers)});
      workers += own;
    }
    plan->partials_ = workers;
  }

 private:
  template <int kCapacity>
  static DecayTable<kCapacity> decay_table_of(const Plan& plan, const Plan::Part& part,
                                              const Decay& decay) {
    DecayTable<kCapacity> table;
    fill(plan, part, &table.gradients);
    for (int32_t i = 0; i < table.gradients.tensors; ++i) {
      table.parameters[i] = decay.parameters[part.tensors.begin + i];
    }
    table.factor = decay.factor;
    return table;
  }

  template <int kCapacity>
  static Table<kCapacity> table_of(const Plan& plan, const Plan::Part& part) {
    // Not initialized: what lies behind the last tensor is never read.
    Table<kCapacity> table;
    fill(plan, part, &table);
    return table;
  }

  template <int kCapacity>
  static void fill(const Plan& plan, const Plan::Part& part, Table<kCapacity>* result) {
    const FlatIndex& index = *plan.index_;
    Table<kCapacity>& table = *result;
    table.tensors = static_cast<int32_t>(part.tensors.end - part.tensors.begin);
    table.tiles = static_cast<uint32_t>(part.tiles);
    table.workers = part.workers;
    table.first_worker = part.first_worker;
    table.first_tensor = static_cast<int32_t>(part.tensors.begin);
    const int64_t first_tile = index.first_tile(part.tensors.begin);
    for (int32_t i = 0; i < table.tensors; ++i) {
      const int64_t tensor = part.tensors.begin + i;
      const Span& span = index.spans()[static_cast<size_t>(tensor)];
      table.data[i] = span.data;
      table.numel_and_dtype[i] = pack(span.numel, span.dtype);
      table.first_tile[i] = static_cast<uint32_t>(index.first_tile(tensor) - first_tile);
    }
  }
};

#define GRADCLIP_STRING_OF(...) #__VA_ARGS__
#define GRADCLIP_STRING(...) GRADCLIP_STRING_OF(__VA_ARGS__)

const char* built_architectures() {
#if defined(__CUDA_ARCH_LIST__)
  return GRADCLIP_STRING(__CUDA_ARCH_LIST__);
#else
  return "unknown";
#endif
}

cudaError_t Plan::make_for_decay(const FlatIndex& index, Plan* plan) {
  Facts facts;
  const cudaError_t error = facts_of_current_device(&facts);
  if (error != cudaSuccess) return error;
  if (facts.largest_table < kLargeTable) return cudaErrorNotSupported;
  Launcher::split(index, facts, kLargeDecayTable, plan);
  return cudaSuccess;
}

cudaError_t Plan::make(const FlatIndex& index, Plan* plan) {
  Facts facts;
  const cudaError_t error = facts_of_current_device(&facts);
  if (error == cudaSuccess) Launcher::split(index, facts, facts.largest_table, plan);
  return error;
}

bool fits_one_block(const FlatIndex& index) {
  return index.bytes() <= kOneBlockBytes && index.tensors() <= kMediumTable;
}

namespace {

// Calls work(constant) with the norm as a constant.
template <class Work>
cudaError_t with_norm(Norm norm, const Work& work) {
  switch (norm) {
    case Norm::kL1:
      return work(std::integral_constant<Norm, Norm::kL1>());
    case Norm::kL2:
      return work(std::integral_constant<Norm, Norm::kL2>());
    case Norm::kInf:
      return work(std::integral_constant<Norm, Norm::kInf>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t power_sums(const Plan& plan, Norm norm, Precision precision, double* partials,
                       double* slots, cudaStream_t stream) {
  const bool exact = precision == Precision::kFloat64;
  return with_norm(norm, [&](auto constant) {
    return Launcher::for_tables(plan, [&](const auto& table) {
      using AnyTable = std::decay_t<decltype(table)>;
      constexpr Norm kNorm = decltype(constant)::value;
      const auto kernel = slots == nullptr ? &power_sums_kernel<kNorm, false, AnyTable>
                                           : &power_sums_kernel<kNorm, true, AnyTable>;
      return launch_kernel(kernel, table.workers, kThreads, stream, false, table, exact, partials,
                           slots);
    });
  });
}

cudaError_t decay_and_power_sums(const Plan& plan, Norm norm, Precision precision,
                                 const Decay& decay, double* partials, double* slots,
                                 cudaStream_t stream) {
  const bool exact = precision == Precision::kFloat64;
  return with_norm(norm, [&](auto constant) {
    return Launcher::for_decay_tables(plan, decay, [&](const auto& table) {
      using AnyDecayTable = std::decay_t<decltype(table)>;
      return launch_kernel(&decay_and_power_sums_kernel<decltype(constant)::value, AnyDecayTable>,
                           table.gradients.workers, kThreads, stream, false, table, exact, partials,
                           slots);
    });
  });
}

cudaError_t finish(Norm norm, const double* partials, int64_t count, double* power_sum,
                   DType norm_dtype, void* norm_result, cudaStream_t stream) {
  return launch_kernel(&finish_kernel, 1, kThreads, stream, false, norm, partials,
                       static_cast<int>(count), power_sum, norm_dtype, norm_result);
}

cudaError_t tensor_norms(const Plan& plan, Norm norm, const double* slots, double* norms,
                         cudaStream_t stream) {
  constexpr int64_t kTensorsPerBlock = kThreads / kWarpThreads;
  return with_norm(norm, [&](auto constant) {
    return Launcher::for_tables(plan, [&](const auto& table) {
      using AnyTable = std::decay_t<decltype(table)>;
      const int64_t blocks = (table.tensors + kTensorsPerBlock - 1) / kTensorsPerBlock;
      return launch_kernel(&tensor_norms_kernel<decltype(constant)::value, AnyTable>, blocks,
                           kThreads, stream, false, table, slots, norms);
    });
  });
}

cudaError_t scale(const Plan& plan, const Clip& clip, bool early, cudaStream_t stream) {
  Facts facts;
  const cudaError_t error = facts_of_current_device(&facts);
  if (error != cudaSuccess) return error;
  bool first = true;
  return Launcher::for_tables(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    // The second of several follows a kernel that writes, so it waits as usual.
    const bool start_early = early && first && facts.can_start_early;
    first = false;
    return launch_kernel(&scale_kernel<AnyTable>, table.workers, kThreads, stream, start_early,
                         table, clip);
  });
}

cudaError_t scale_each(const Plan& plan, const double* coefficients, cudaStream_t stream) {
  return Launcher::for_tables(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    return launch_kernel(&scale_each_kernel<AnyTable>, table.workers, kThreads, stream, false,
                         table, coefficients);
  });
}

cudaError_t clamp(const Plan& plan, double bound, cudaStream_t stream) {
  return Launcher::for_tables(plan, [&](const auto& table) {
    using AnyTable = std::decay_t<decltype(table)>;
    return launch_kernel(&clamp_kernel<AnyTable>, table.workers, kThreads, stream, false, table,
                         bound);
  });
}

cudaError_t clip_in_one_block(const Plan& plan, Precision precision, const Clip& clip,
                              cudaStream_t stream) {
  const bool exact = precision == Precision::kFloat64;
  return with_norm(clip.norm, [&](auto constant) {
    return Launcher::for_tables(plan, [&](const auto& whole) {
      using AnyTable = std::decay_t<decltype(whole)>;
      AnyTable table = whole;
      table.workers = 1;
      return launch_kernel(&clip_in_one_block_kernel<decltype(constant)::value, AnyTable>, 1,
                           kThreadsOfOneBlock, stream, false, table, exact, clip);
    });
  });
}

}  // namespace gradclip::cuda
