// The CPU kernels for any processor the compiler targets by default (SSE2 on x86-64, NEON on
// aarch64).
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
#include "cpu/kernels.h"

namespace gradclip::cpu {
namespace {
constexpr int kVectorBytes = 16;
#include "cpu/kernels_body.h"
}  // namespace

const Kernels kPortableKernels = {
    "portable", power_sums, power_sums_of_streams, scale,    scale_streams,
    add_scaled, clamp,      clamp_streams,         row_sums, scale_rows};

}  // namespace gradclip::cpu
