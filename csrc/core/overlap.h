// Spans that share memory: a gradient that is listed twice, or views of one storage. Two workers
// must not write there at the same time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "core/flat_index.h"

namespace gradclip {

inline std::vector<Span> sorted_by_address(const FlatIndex& index) {
  std::vector<Span> spans = index.spans();
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return std::less<>()(a.data, b.data); });
  return spans;
}

inline const char* end_of(const Span& span) {
  return static_cast<const char*>(span.data) + span.numel * element_size(span.dtype);
}

inline bool share_memory(const FlatIndex& index) {
  const std::vector<Span> spans = sorted_by_address(index);
  return std::adjacent_find(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
           return static_cast<const char*>(b.data) < end_of(a);
         }) != spans.end();
}

// The spans in as few groups as can be, so that within a group none shares memory with another: a
// gradient that is listed k times appears in k groups.
inline std::vector<FlatIndex> disjoint_groups(const FlatIndex& index) {
  std::vector<std::vector<Span>> groups;
  // The end of each group's last span, the lowest first.
  using End = std::pair<const char*, size_t>;
  std::priority_queue<End, std::vector<End>, std::greater<End>> ends;
  for (const Span& span : sorted_by_address(index)) {
    size_t group = groups.size();
    if (!ends.empty() && ends.top().first <= static_cast<const char*>(span.data)) {
      group = ends.top().second;
      ends.pop();
    } else {
      groups.emplace_back();
    }
    groups[group].push_back(span);
    ends.push({end_of(span), group});
  }
  std::vector<FlatIndex> result;
  for (std::vector<Span>& spans : groups) result.emplace_back(std::move(spans));
  return result;
}

}  // namespace gradclip
