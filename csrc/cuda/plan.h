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

// What comes with each tensor of an index, where it is needed.
struct Companions {
  const Decay* decay = nullptr;
  // The place of each tensor in the caller's list.
  const int64_t* positions = nullptr;
};

class Plan {
 public:
  Plan() = default;

  // With at most `capacity` tensors and `most_workers` workers per launch. `index` and what
  // `companions` points to have to outlive the plan.
  Plan(const FlatIndex& index, const Companions& companions, int64_t capacity,
       int64_t most_workers);

  const std::vector<Part>& parts() const { return parts_; }
  bool decays() const { return companions_.decay != nullptr; }

  // How many doubles the measuring launches write: one per worker, and one per slot if the norm of
  // each tensor is requested.
  int64_t partials() const { return partials_; }
  int64_t slots() const { return slot_count(index_->tensors(), partials_); }

  // Entries after the last tensor are neither written nor ever read.
  template <int kCapacity>
  void fill(const Part& part, Table<kCapacity>* table) const {
    fill_borders(part, table);
    for (int32_t i = 0; i < table->tensors; ++i) {
      const Span& span = index_->spans()[static_cast<size_t>(part.tensors.begin + i)];
      table->data[i] = span.data;
      table->numel_and_dtype[i] = pack(span.numel, span.dtype);
    }
  }

  // These two only for a plan with positions.
  template <int kCapacity>
  void fill(const Part& part, PositionTable<kCapacity>* table) const {
    fill(part, static_cast<Table<kCapacity>*>(table));
    fill_positions(part, table);
  }

  template <int kCapacity>
  void fill(const Part& part, BorderTable<kCapacity>* table) const {
    fill_borders(part, table);
    fill_positions(part, table);
  }

  // Only for a plan that decays.
  template <int kCapacity>
  void fill(const Part& part, DecayTable<kCapacity>* table) const {
    fill(part, static_cast<Table<kCapacity>*>(table));
    for (int32_t i = 0; i < table->tensors; ++i) {
      table->parameters[i] = companions_.decay->parameters[part.tensors.begin + i];
    }
    table->factor = companions_.decay->factor;
  }

 private:
  template <class AnyTable>
  void fill_borders(const Part& part, AnyTable* table) const {
    table->tensors = static_cast<int32_t>(part.count());
    table->tiles = static_cast<uint32_t>(part.tiles);
    table->workers = part.workers;
    table->first_worker = part.first_worker;
    table->first_tensor = static_cast<int32_t>(part.tensors.begin);
    const int64_t first_tile = index_->first_tile(part.tensors.begin);
    for (int32_t i = 0; i < table->tensors; ++i) {
      const int64_t tensor = part.tensors.begin + i;
      table->first_tile[i] = static_cast<uint32_t>(index_->first_tile(tensor) - first_tile);
    }
  }

  template <class AnyTable>
  void fill_positions(const Part& part, AnyTable* table) const {
    const int64_t* positions = companions_.positions + part.tensors.begin;
    for (int32_t i = 0; i < table->tensors; ++i) {
      table->positions[i] = static_cast<int32_t>(positions[i]);
    }
  }

  const FlatIndex* index_ = nullptr;
  Companions companions_;
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

// Calls work(table) with the smallest of these tables that holds the part.
template <template <int> class AnyTable, int kCapacity, int... kLarger, class Work>
auto with_smallest_table(const Plan& plan, const Part& part, const Work& work) {
  if constexpr (sizeof...(kLarger) > 0) {
    if (part.count() > kCapacity) {
      return with_smallest_table<AnyTable, kLarger...>(plan, part, work);
    }
  }
  return with_table<AnyTable<kCapacity>>(plan, part, work);
}

// Calls work(table) for each part of the plan, with the smallest of the tables of these capacities
// (ascending, the last holds every part), until one answers with an error, which is whatever is not
// the zero of its type.
template <template <int> class AnyTable, int kCapacity, int... kLarger, class Work>
auto for_tables(const Plan& plan, const Work& work) {
  decltype(work(std::declval<const AnyTable<kCapacity>&>())) error{};
  for (const Part& part : plan.parts()) {
    error = with_smallest_table<AnyTable, kCapacity, kLarger...>(plan, part, work);
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
