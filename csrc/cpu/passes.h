// The passes over a flat index on the CPU, each for a range of its workers. They start no threads;
// the caller hands out worker ranges (the binding to torch's thread pool, tests to std::thread),
// and any partition of the workers gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/norm.h"
#include "core/units.h"

namespace gradclip::cpu {

// How many workers an index is split into. Depends on the index alone, never on the number of
// threads: the split fixes the order of the sum, and so the bits of the result.
int64_t worker_count(const FlatIndex& index);

// Writes the power sum of each (tensor, worker) pair into its slot, and 0 into slots no pair owns:
// after all workers ran, every one of the slot_count(tensors, workers) slots is written.
// `decay`, which may be null, is added to each run of a gradient right before it is measured.
void power_sums(const FlatIndex& index, Norm kind, Precision precision, const Decay* decay,
                Range workers, double* slots) noexcept;

// The norm of each tensor, from the slots of all workers.
std::vector<double> tensor_norms(const FlatIndex& index, Norm kind,
                                 const std::vector<double>& slots);

void scale(const FlatIndex& index, double coefficient, Range workers) noexcept;

// Multiplies each tensor by its own coefficient: 1 writes nothing, 0 clears, including NaN and
// infinity.
void scale_each(const FlatIndex& index, const double* coefficients, Range workers) noexcept;

void clamp(const FlatIndex& index, double bound, Range workers) noexcept;

// Adds a multiple of its parameter to each gradient.
void add_decay(const FlatIndex& index, const Decay& decay, Range workers) noexcept;

// Limits each row of each gradient; `rows` has an entry for each tensor of the index. A worker
// takes the rows that begin in its tiles, and a row is measured and scaled while it is in cache.
// Returns the smallest coefficient, at most 1.
double clip_rows(const FlatIndex& index, const Rows* rows, const UnitLimit& limit,
                 Range workers) noexcept;

}  // namespace gradclip::cpu
