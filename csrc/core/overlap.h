// Spans that share memory: a gradient that is listed twice, or views of one storage. Two workers
// must not write there at the same time.
#pragma once

#include <algorithm>
#include <array>
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

// Lists known to be free of overlap. The same few are asked about in every step, and comparing one
// takes a small part of the time of sorting it. Only addresses and sizes are kept, which decide the
// answer whatever has become of the tensors.
class DisjointLists {
 public:
  bool contains(const std::vector<Span>& spans) const {
    return std::any_of(lists_.begin(), lists_.end(),
                       [&](const std::vector<Span>& list) { return are_same(list, spans); });
  }

  // Replaces the list that was added first.
  void add(const std::vector<Span>& spans) {
    lists_[next_] = spans;
    next_ = (next_ + 1) % lists_.size();
  }

 private:
  static bool are_same(const std::vector<Span>& some, const std::vector<Span>& others) {
    return std::equal(some.begin(), some.end(), others.begin(), others.end(),
                      [](const Span& a, const Span& b) {
                        return a.data == b.data && a.numel == b.numel && a.dtype == b.dtype;
                      });
  }

  // For two groups of parameters, each with and without its weights.
  std::array<std::vector<Span>, 4> lists_;
  size_t next_ = 0;
};

inline bool share_memory(const FlatIndex& index) {
  thread_local DisjointLists known;
  if (known.contains(index.spans())) return false;
  const std::vector<Span> spans = sorted_by_address(index);
  const auto shared = std::adjacent_find(
      spans.begin(), spans.end(),
      [](const Span& a, const Span& b) { return static_cast<const char*>(b.data) < end_of(a); });
  if (shared != spans.end()) return true;
  known.add(index.spans());
  return false;
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
