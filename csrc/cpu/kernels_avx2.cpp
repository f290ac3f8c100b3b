// The CPU kernels for processors with AVX2.
//
// Only the code inside the region is compiled for them. Headers stay outside: a header function
// that is not inlined exists once in the program, and the linker may keep this file's copy.
#include "cpu/kernels.h"

#if GRADCLIP_WIDE_KERNELS
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/flat_index.h"
#include "core/norm.h"
#include "core/span.h"
#include "cpu/float16.h"

namespace gradclip::cpu {
namespace {
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define GRADCLIP_X86_BITS 256
constexpr int kVectorBytes = 32;
#include "cpu/kernels_body.h"
#pragma GCC pop_options
}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",     power_sums, power_sums_of_streams, scale,    scale_streams,
    add_scaled, clamp,      clamp_streams,         row_sums, scale_rows};

}  // namespace gradclip::cpu
#endif
