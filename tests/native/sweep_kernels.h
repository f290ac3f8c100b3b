// The bodies of the sweep's variants (bench/cuda) with all that a launch decides made into
// arguments. In a file of their own, as kernels.h.
#pragma once

#include "core/norm.h"
#include "cuda/clip.h"
#include "cuda/table.h"
#include "tables.h"

namespace gradclip::cuda::sweep {

using SweepTable = Table<kSmallTable>;

enum class Team { kBlock, kWarp };

constexpr int64_t kTileOfBlock = 16 * 1024;
constexpr int64_t kTileOfWarp = 2 * 1024;

// A step of 0 is contiguous; 2, 4 or 8 loads.
void measure_tiles_thread(const SweepTable& table, int step, int loads, Precision precision,
                          double* partials);
void scale_tiles_thread(const SweepTable& table, int step, int loads, bool forward, bool streaming,
                        const Clip& clip);
void scale_after_prologue_thread(const SweepTable& table, bool unrolled, bool hoisted,
                                 const Clip& clip);
// With a table that has tiles for this team, and as many workers as there are blocks.
void clip_by_teams_thread(const SweepTable& table, Team team, bool in_cluster, Precision precision,
                          const Clip& clip);

}  // namespace gradclip::cuda::sweep
