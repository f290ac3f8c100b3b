// Chooses the kernels for the processor at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace gradclip::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
  // Widest first.
  const Choice choices[] = {
#if GRADCLIP_WIDE_KERNELS
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c")},
#endif
      {&kPortableKernels, true},
  };
  const char* wanted = std::getenv("GRADCLIP_CPU");
  std::string available;
  for (const Choice& choice : choices) {
    if (!choice.supported) continue;
    if (wanted == nullptr || std::strcmp(wanted, choice.kernels->instruction_set) == 0) {
      return *choice.kernels;
    }
    available += available.empty() ? "" : ", ";
    available += choice.kernels->instruction_set;
  }
  throw std::runtime_error(
      std::string("GRADCLIP_CPU is '") + wanted +
      "', and has to be one of what this processor and build offer: " + available);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gradclip::cpu
