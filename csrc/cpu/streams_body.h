// The order in which a run is read and written. Part of kernels_body.h, and like it compiled once
// per instruction set: no include guard.

// How a run is read and written: in kStreams streams at once, block after block of kChunk elements
// of each. In a long run the streams are far apart, which gets a tenth more memory bandwidth
// than a single stream; in a short one they are adjacent, so that little is left over.
template <int64_t kStreams, int64_t kChunk>
struct Streams {
  Streams(int64_t count, int64_t element_bytes) {
    constexpr int64_t kLongBytes = 64 * 1024;
    blocks = count / (kStreams * kChunk);
    const bool is_long = count * element_bytes >= kLongBytes;
    stride = is_long ? blocks * kChunk : kChunk;
    advance = is_long ? kChunk : kStreams * kChunk;
  }

  // How many elements the blocks cover, from the first on.
  int64_t covered() const { return blocks * kStreams * kChunk; }

  int64_t blocks;
  // From a chunk to that of the next stream, and to that of the next block, in elements.
  int64_t stride;
  int64_t advance;
};

// Calls work(offset) for the first elements of a run in such an order, kChunk elements each time;
// returns how many it covered.
template <int64_t kChunk, class Element, class Work>
GRADCLIP_INLINE int64_t for_chunks(const Element* values, int64_t count, const Work& work) {
  constexpr int64_t kStreams = 4;
  const Streams<kStreams, kChunk> streams(count, sizeof(*values));
  for (int64_t block = 0; block < streams.blocks; ++block) {
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      work(block * streams.advance + stream * streams.stride);
    }
  }
  return streams.covered();
}
