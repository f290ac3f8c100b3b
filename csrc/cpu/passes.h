// The passes over a flat index on the CPU, each for a range of its tiles. They start no threads;
// the caller hands out tiles (the binding to torch's thread pool, tests to std::thread), and any
// partition of the tiles gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"

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

}  // namespace gradclip::cpu
