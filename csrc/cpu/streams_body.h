// How runs become loops over their elements, alone or side by side. Part of kernels_body.h, and
// like it compiled once per instruction set: no include guard.

// Elements in two vectors' worth of numbers, which loops handle at once.
template <class Element>
constexpr int64_t kTwoVectors = 2 * kFloats;
template <>
constexpr int64_t kTwoVectors<double> = 2 * kDoubles;

// Calls work(stream, values) for kChunk elements after another of kStreams runs side by side, which
// take turns. A load that follows a store to the same offset in another page waits for it, so the
// streams are kept a fraction of a page apart: each starts that far into its run, and its beginning
// comes last.
template <int64_t kChunk, class Element, class Work>
GRADCLIP_INLINE void for_streams(Element* const* runs, int64_t count, const Work& work) {
  constexpr uintptr_t kPage = 4096;
  constexpr uintptr_t kTurnBytes = 512;
  constexpr int64_t kTurn = kTurnBytes / sizeof(Element);
  int64_t places[kStreams];
  for (int64_t stream = 0; stream < kStreams; ++stream) {
    const uintptr_t apart =
        reinterpret_cast<uintptr_t>(runs[stream]) - reinterpret_cast<uintptr_t>(runs[0]);
    const uintptr_t skew = (static_cast<uintptr_t>(stream) * (kPage / kStreams) - apart) % kPage;
    places[stream] = static_cast<int64_t>(skew / kTurnBytes) * kTurn;
  }
  for (int64_t done = 0; done < count; done += kTurn) {
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      Element* values = runs[stream] + places[stream];
#pragma GCC unroll 8
      for (int64_t at = 0; at < kTurn; at += kChunk) work(stream, values + at);
      places[stream] += kTurn;
      if (places[stream] == count) places[stream] = 0;
    }
  }
}

// Calls work with the data of a run as a pointer to its element type.
template <class Work>
GRADCLIP_INLINE void with_elements(const Span& run, const Work& work) {
  switch (run.dtype) {
    case DType::kFloat64:
      return work(static_cast<double*>(run.data));
    case DType::kFloat16:
      return work(static_cast<Float16*>(run.data));
    case DType::kBFloat16:
      return work(static_cast<BFloat16*>(run.data));
    default:
      return work(static_cast<float*>(run.data));
  }
}

// The same with the data of kStreams runs.
template <class Work>
GRADCLIP_INLINE void with_streams(const Span* runs, const Work& work) {
  with_elements(runs[0], [&](auto* first) {
    decltype(first) values[kStreams];
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      values[stream] = static_cast<decltype(first)>(runs[stream].data);
    }
    work(values);
  });
}
