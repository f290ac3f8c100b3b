// How a list of tensors is cut into launches, and how the tables of each launch are packed. Plain
// C++: tests/native/test_plan.cpp runs it on the host.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/decay.h"
#include "core/flat_index.h"
#include "core/units.h"
#include "cuda/table.h"

namespace gradclip::cuda {

// What one launch covers: a range of tensors, and the workers that share their tiles.
struct Part {
  Range tensors;
  int64_t tiles;
  int32_t workers;
  int32_t first_worker;

  int64_t count() const { return tensors.end - tensors.begin; }
};

class Plan {
 public:
  Plan() = default;

  // With at most `capacity` tensors and `most_workers` workers per launch. `index` and `decay`,
  // which may be null, have to outlive the plan.
  Plan(const FlatIndex& index, const Decay* decay, int64_t capacity, int64_t most_workers);

  const std::vector<Part>& parts() const { return parts_; }
  bool decays() const { return decay_ != nullptr; }

  // How many doubles the measuring launches write: one per worker, and one per slot if the norm of
  // each tensor is requested.
  int64_t partials() const { return partials_; }
  int64_t slots() const { return slot_count(index_->tensors(), partials_); }

  // Entries after the last tensor are neither written nor ever read.
  template <int kCapacity>
  void fill(const Part& part, Table<kCapacity>* table) const {
    table->tensors = static_cast<int32_t>(part.count());
    table->tiles = static_cast<uint32_t>(part.tiles);
    table->workers = part.workers;
    table->first_worker = part.first_worker;
    table->first_tensor = static_cast<int32_t>(part.tensors.begin);
    const int64_t first_tile = index_->first_tile(part.tensors.begin);
    for (int32_t i = 0; i < table->tensors; ++i) {
      const int64_t tensor = part.tensors.begin + i;
      const Span& span = index_->spans()[static_cast<size_t>(tensor)];
      table->data[i] = span.data;
      table->numel_and_dtype[i] = pack(span.numel, span.dtype);
      table->first_tile[i] = static_cast<uint32_t>(index_->first_tile(tensor) - first_tile);
    }
  }

  // Only for a plan that decays.
  template <int kCapacity>
  void fill(const Part& part, DecayTable<kCapacity>* table) const {
    fill(part, static_cast<Table<kCapacity>*>(table));
    for (int32_t i = 0; i < table->tensors; ++i) {
      table->parameters[i] = decay_->parameters[part.tensors.begin + i];
    }
    table->factor = decay_->factor;
  }

 private:
  const FlatIndex* index_ = nullptr;
  const Decay* decay_ = nullptr;
  std::vector<Part> parts_;
  int64_t partials_ = 0;
};

template <class AnyTable, class Work>
auto with_table(const Plan& plan, const Part& part, const Work& work) {
  // Not initialized: zeroing a large table would take as long as the launch.
  AnyTable table;
  plan.fill(part, &table);
  return work(static_cast<const AnyTable&>(table));
}

// Calls work(table) for each part of the plan, with the smallest table that holds it, until one
// answers with an error, which is whatever is not the zero of its type.
template <class Work>
auto for_tables(const Plan& plan, const Work& work) {
  decltype(work(std::declval<const Table<kSmallTable>&>())) error{};
  for (const Part& part : plan.parts()) {
    if (part.count() <= kSmallTable) {
      error = with_table<Table<kSmallTable>>(plan, part, work);
    } else if (part.count() <= kMediumTable) {
      error = with_table<Table<kMediumTable>>(plan, part, work);
    } else {
      error = with_table<Table<kLargeTable>>(plan, part, work);
    }
    if (error != decltype(error){}) break;
  }
  return error;
}

// The same with tables that also hold the parameters, of a plan that decays.
template <class Work>
auto for_decay_tables(const Plan& plan, const Work& work) {
  decltype(work(std::declval<const DecayTable<kSmallTable>&>())) error{};
  for (const Part& part : plan.parts()) {
    error = part.count() <= kSmallTable
                ? with_table<DecayTable<kSmallTable>>(plan, part, work)
                : with_table<DecayTable<kLargeDecayTable>>(plan, part, work);
    if (error != decltype(error){}) break;
  }
  return error;
}

// How a list of rows is cut into launches.
class RowsPlan {
 public:
  RowsPlan() = default;

  // With at most `capacity` tensors and `most_workers` workers per launch. `all` has to outlive the
  // plan.
  RowsPlan(const std::vector<Rows>& all, int64_t capacity, int64_t most_workers);

  // The workers of all launches.
  int64_t workers() const { return workers_; }

  // Calls work(table) for each launch, until one answers with an error, which is whatever is not
  // the zero of its type.
  template <int kCapacity, class Work>
  auto for_tables(const Work& work) const {
    decltype(work(std::declval<const RowsTable<kCapacity>&>())) error{};
    for (const Part& part : parts_) {
      // Not initialized, as in with_table.
      RowsTable<kCapacity> table;
      fill(part, &table);
      error = work(static_cast<const RowsTable<kCapacity>&>(table));
      if (error != decltype(error){}) break;
    }
    return error;
  }

 private:
  struct Part {
    Range tensors;
    int64_t rows;
    int32_t workers;
    int32_t first_worker;
  };

  template <int kCapacity>
  void fill(const Part& part, RowsTable<kCapacity>* table) const {
    table->rows = part.rows;
    table->tensors = static_cast<int32_t>(part.tensors.end - part.tensors.begin);
    table->workers = part.workers;
    table->first_worker = part.first_worker;
    int64_t row = 0;
    for (int32_t i = 0; i < table->tensors; ++i) {
      const Rows& rows = (*all_)[static_cast<size_t>(part.tensors.begin + i)];
      table->gradients[i] = rows.gradient.data;
      table->weights[i] = rows.weights.data;
      table->gradient_row[i] = pack(rows.gradient_row(), rows.gradient.dtype);
      table->weights_row[i] = pack(rows.weights_row(), rows.weights.dtype);
      table->first_row[i] = row;
      row += rows.count;
    }
  }

  const std::vector<Rows>* all_ = nullptr;
  std::vector<Part> parts_;
  int64_t workers_ = 0;
};

// Whether one block alone should clip this list, in one launch.
bool fits_one_block(const FlatIndex& index);

}  // namespace gradclip::cuda
