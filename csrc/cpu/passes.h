// The passes over a flat index on the CPU, each for a range of its tiles. They start no threads;
// the caller hands out tiles (the binding to torch's thread pool, tests to std::thread), and any
// partition of the tiles gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "core/units.h"

namespace gradclip::cpu {

// Writes the power sum of each tile of the range. `decay`, which may be null, is added to each tile
// of a gradient right before it is measured.
void power_sums(const FlatIndex& index, Norm kind, Precision precision, const Decay* decay,
                Range tiles, double* sums) noexcept;

// The power sum of all tiles together.
double total_power_sum(Norm kind, const std::vector<double>& sums);

// The norm of each tensor, from the power sums of all tiles.
std::vector<double> tensor_norms(const FlatIndex& index, Norm kind,
                                 const std::vector<double>& sums);

void scale(const FlatIndex& index, double coefficient, Range tiles) noexcept;

// Multiplies each tensor by its own coefficient: 1 writes nothing, 0 clears, including NaN and
// infinity.
void scale_each(const FlatIndex& index, const double* coefficients, Range tiles) noexcept;

void clamp(const FlatIndex& index, double bound, Range tiles) noexcept;

// Adds a multiple of its parameter to each gradient.
void add_decay(const FlatIndex& index, const Decay& decay, Range tiles) noexcept;

// Limits each row of each gradient; `rows` has an entry for each tensor of the index. A thread
// takes the rows that begin in its tiles, and a row is measured and scaled while it is in cache.
// Returns the smallest coefficient, at most 1.
double clip_rows(const FlatIndex& index, const Rows* rows, const UnitLimit& limit,
                 Range tiles) noexcept;

}  // namespace gradclip::cpu
