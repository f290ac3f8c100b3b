// Whether a list names something twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gradclip {

// `items` holds `count` addresses of objects, none of them null.
inline bool any_twice(const void* const* items, size_t count) {
  // A hash table with room for twice as many, open addressing; sorting takes several times as long.
  size_t mask = 1;
  while (mask < 2 * count) mask = 2 * mask + 1;
  std::vector<const void*> table(mask + 1, nullptr);
  for (size_t i = 0; i < count; ++i) {
    // Objects lie at multiples of 16, so the lowest bits tell nothing.
    size_t place = (reinterpret_cast<uintptr_t>(items[i]) / 16 * 0x9E3779B97F4A7C15u) >> 20 & mask;
    while (table[place] != nullptr) {
      if (table[place] == items[i]) return true;
      place = (place + 1) & mask;
    }
    table[place] = items[i];
  }
  return false;
}

}  // namespace gradclip
