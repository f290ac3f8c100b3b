// What decides between ways to write the CUDA kernels: runs variants of them on the GPU at hand,
// and only what has proved right is timed. bench/cuda/run.sh compiles this and runs every family.
//
//     sweep CSV FAMILY [--seconds N] [--rehearse]
//     sweep CSV table
//
// The first appends the rows of a family, for at most about N seconds; of one short list if it only
// rehearses. The second prints the fastest of each family and list.
//
// families
//   bandwidth    what this GPU reads and copies from memory, for comparison
//   small        lists of 4 KB to 16 MB: one block, warps as workers, clusters, two launches
//   order        measuring: order of tiles, blocks for each multiprocessor, threads, loads
//   prologue     what the second kernel does before its tiles, and when it may start
//   scale        scaling: order, direction, streaming loads and stores; with the measuring before
//   parameters   launches of kernels that only take parameters of some size
//
// columns of the CSV
//   list, bytes, tensors    what is clipped
//   work                    measure: the measuring kernel alone; quiet: a call that finds nothing
//                           to clip; clip: one that scales; launch: a kernel that does nothing
//   variant                 "today" is the engine as it is
//   threads, blocks, loads  in a block; for each multiprocessor at most, or in all where there is
//                           one block or cluster, 0 where the engine decides; in flight in each
//                           thread
//   status                  ok; wrong: differs from float64, and is not timed; unsupported: not
//                           for this list or this GPU; failed: the error is in the note
//   repeats                 how many times were taken
//   median_us, fastest_us   a call's time on the GPU. The lists of families order and scale are
//                           not in cache. Those of the others are, as far as they fit, and 20
//                           calls follow each other in a graph, whose start is shared among them
//   stream_us               the same for calls that are queued in a stream, the host being ahead
//   host_us                 what queueing a call takes on the host
//   gb_per_s                the bytes that a call has to move by its time: each once to measure,
//                           three times to clip
//   percent_of_read         the same by what the best of some plain kernels reads in this run; for
//                           lists that are not in cache
//
// Exit status: 0; 1 if a variant was wrong or has failed; 2 for bad arguments; 3 without a GPU.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "gpu.h"
#include "gpu_kernels.h"
#include "report.h"

namespace gradclip::cuda::sweep {
namespace {

using Clock = std::chrono::steady_clock;

enum class Work { kMeasure, kQuiet, kClip };

const char* name_of(Work work) {
  return work == Work::kMeasure ? "measure" : work == Work::kQuiet ? "quiet" : "clip";
}

// Just below the epsilon of the coefficient: after a first call has scaled the norm down to that,
// every further one scales by a little less than 1, however often it is repeated.
constexpr double kAlwaysClips = 0.999e-6;
constexpr int kCallsOfGraph = 20;
constexpr int kCallsOfStream = 40;
constexpr int kColdRepeats = 15;
constexpr int kHotRepeats = 9;
constexpr int kStreamRepeats = 3;

// What has been found out about a variant on one list.
struct Candidate {
  const Variant* variant;
  Row row;
  std::vector<double> times;
  std::vector<double> stream_times;
  std::vector<double> host_times;
  std::unique_ptr<Graph> graph;
};

class Sweep {
 public:
  Sweep(const std::string& path, double seconds)
      : csv_(path),
        end_(Clock::now() +
             std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))),
        seed_(std::random_device()()) {}

  void bandwidth();
  void parameters();
  // In cache, call after call; or each call from memory.
  void family(const char* name, const std::vector<List>& lists,
              const std::vector<Variant>& variants, const std::vector<Work>& works, bool hot);

  bool all_right() const { return all_right_; }

 private:
  bool time_is_up() const { return Clock::now() > end_; }
  void write(const Row& row);
  bool check(Gradients* gradients, Work work, Candidate* candidate);
  void time_cold(Gradients* gradients, Work work, std::vector<Candidate>* candidates);
  void time_hot(Gradients* gradients, Work work, std::vector<Candidate>* candidates);
  void time_stream(const std::function<cudaError_t()>& call, Candidate* candidate);
  void write_timed(Candidate* candidate, double moved_bytes);

  Csv csv_;
  Gpu gpu_;
  Clock::time_point end_;
  uint64_t seed_;
  bool all_right_ = true;
};

void Sweep::write(const Row& row) {
  if (row.status == "wrong" || row.status == "failed") all_right_ = false;
  csv_.write(row);
}

// Whether the variant is right, or else what is to be said of it.
bool Sweep::check(Gradients* gradients, Work work, Candidate* candidate) {
  constexpr int64_t kFew = 64 << 20;
  const double norm = gradients->norm();
  const double max_norm = work == Work::kClip ? norm / 3.0 : 2.0 * norm;
  const Job job = gradients->job(max_norm);
  Row& row = candidate->row;
  gradients->restore();
  gradients->poison_results();
  cudaError_t error = candidate->variant->prepare ? candidate->variant->prepare() : cudaSuccess;
  if (error == cudaSuccess) {
    const Queued queued = candidate->variant->launch(job, gpu_.stream());
    error = queued.error;
    if (error == cudaSuccess && queued.partials > 0) {
      error = finish_as_today(job, queued.partials, gpu_.stream());
    }
  }
  if (error == cudaErrorNotSupported) {
    row.status = "unsupported";
    return false;
  }
  if (error != cudaSuccess) {
    row.status = "failed";
    row.note = cudaGetErrorString(error);
    (void)cudaGetLastError();
    return false;
  }
  try {
    row.note = gradients->difference(work == Work::kClip ? max_norm / (norm + 1e-6) : 1.0,
                                     work != Work::kMeasure || gradients->list().bytes() < kFew);
  } catch (const CudaFailure& failure) {
    // The context is lost, but the row says by whose fault.
    row.status = "failed";
    row.note = failure.what();
    write(row);
    throw;
  }
  if (!row.note.empty()) row.status = "wrong";
  return row.note.empty();
}

void Sweep::time_cold(Gradients* gradients, Work work, std::vector<Candidate>* candidates) {
  const Job job =
      gradients->job(work == Work::kClip ? gradients->norm() / 3.0 : 2.0 * gradients->norm());
  for (int repeat = -1; repeat < kColdRepeats; ++repeat) {
    for (size_t i = 0; i < candidates->size(); ++i) {
      if (repeat >= 3 && time_is_up()) return;
      // Forwards and backwards in turn, so that a drift favors nobody.
      Candidate& candidate = (*candidates)[repeat % 2 == 0 ? i : candidates->size() - 1 - i];
      if (work == Work::kClip) gradients->restore();
      gpu_.empty_cache();
      const double time =
          gpu_.time([&] { CUDA_REQUIRE(candidate.variant->launch(job, gpu_.stream()).error); });
      // The first is a warm-up.
      if (repeat >= 0) candidate.times.push_back(time);
    }
  }
}

void Sweep::time_stream(const std::function<cudaError_t()>& call, Candidate* candidate) {
  // Longer than the host takes to queue them all.
  gpu_.spin(12.0 * kCallsOfStream);
  double host = 0.0;
  const double time = gpu_.time([&] {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < kCallsOfStream; ++i) CUDA_REQUIRE(call());
    host = std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
  });
  candidate->stream_times.push_back(time / kCallsOfStream);
  candidate->host_times.push_back(host / kCallsOfStream);
}

void Sweep::time_hot(Gradients* gradients, Work work, std::vector<Candidate>* candidates) {
  const Job job = gradients->job(work == Work::kClip ? kAlwaysClips : 2.0 * gradients->norm());
  const auto call_of = [&](const Candidate& candidate) {
    return [&job, &candidate, stream = gpu_.stream()] {
      return candidate.variant->launch(job, stream).error;
    };
  };
  for (Candidate& candidate : *candidates) {
    candidate.graph = std::make_unique<Graph>(gpu_.stream(), kCallsOfGraph, call_of(candidate));
  }
  for (int repeat = -1; repeat < kHotRepeats; ++repeat) {
    for (size_t i = 0; i < candidates->size(); ++i) {
      if (repeat >= 3 && time_is_up()) return;
      Candidate& candidate = (*candidates)[repeat % 2 == 0 ? i : candidates->size() - 1 - i];
      gradients->restore();
      // While the GPU is busy the host gets ahead.
      gpu_.spin(20.0);
      const double time = gpu_.time([&] { candidate.graph->launch(gpu_.stream()); });
      if (repeat >= 0) candidate.times.push_back(time / kCallsOfGraph);
      if (repeat < 0 || repeat >= kStreamRepeats) continue;
      gradients->restore();
      time_stream(call_of(candidate), &candidate);
    }
  }
}

void Sweep::write_timed(Candidate* candidate, double moved_bytes) {
  Row& row = candidate->row;
  row.repeats = static_cast<int>(candidate->times.size());
  row.median = median(candidate->times);
  for (const double time : candidate->times) {
    if (row.fastest < 0.0 || time < row.fastest) row.fastest = time;
  }
  row.stream = median(candidate->stream_times);
  row.host = median(candidate->host_times);
  if (moved_bytes > 0.0 && row.median > 0.0) {
    row.gigabytes_per_second = moved_bytes / row.median / 1e3;
    // Of what is in cache it would say nothing.
    if (candidate->graph == nullptr) {
      row.percent_of_read = 100.0 * row.gigabytes_per_second / gpu_.read_bandwidth();
    }
  }
  write(row);
}

void Sweep::family(const char* name, const std::vector<List>& lists,
                   const std::vector<Variant>& variants, const std::vector<Work>& works, bool hot) {
  // First, since it also raises the clocks.
  gpu_.read_bandwidth();
  const List every_kind = mixed();
  Gradients mixed_gradients(&gpu_, every_kind, seed_++);
  for (const List& list : lists) {
    if (time_is_up()) {
      std::printf("%s: the time was up before %s\n", name, list.name().c_str());
      return;
    }
    Gradients gradients(&gpu_, list, seed_++);
    for (const Work work : works) {
      std::vector<Candidate> right;
      for (const Variant& variant : variants) {
        Candidate candidate = {&variant, {}, {}, {}, {}, nullptr};
        Row& row = candidate.row;
        row.family = name;
        row.list = list.name();
        row.bytes = list.bytes();
        row.tensors = list.tensors();
        row.work = name_of(work);
        row.variant = variant.name;
        row.threads = variant.threads;
        row.blocks = variant.blocks;
        row.loads = variant.loads;
        if (check(&mixed_gradients, work, &candidate) && check(&gradients, work, &candidate)) {
          right.push_back(std::move(candidate));
        } else {
          write(row);
        }
      }
      hot ? time_hot(&gradients, work, &right) : time_cold(&gradients, work, &right);
      const double times = work == Work::kClip ? 3.0 : 1.0;
      for (Candidate& candidate : right) {
        write_timed(&candidate, times * static_cast<double>(list.bytes()));
      }
    }
  }
}

void Sweep::bandwidth() {
  constexpr int64_t kGigabyte = int64_t{1} << 30;
  for (const bool reads : {true, false}) {
    Row row;
    row.family = "bandwidth";
    row.list = "1 GB";
    row.bytes = kGigabyte;
    row.tensors = 1;
    row.work = reads ? "read" : "copy";
    row.variant = reads ? "best of 12 kernels" : "cudaMemcpyDeviceToDevice";
    row.gigabytes_per_second = reads ? gpu_.read_bandwidth() : gpu_.copy_bandwidth();
    row.median = static_cast<double>(kGigabyte) / row.gigabytes_per_second / 1e3;
    row.percent_of_read = 100.0 * row.gigabytes_per_second / gpu_.read_bandwidth();
    row.repeats = reads ? 7 : 11;
    row.note = gpu_.name();
    write(row);
  }
}

void Sweep::parameters() {
  gpu_.read_bandwidth();
  const Memory result(Memory::Place::kGpu, sizeof(int));
  const std::vector<EmptyKernel> kernels = empty_kernels();
  std::vector<Candidate> right;
  for (size_t i = 0; i < kernels.size(); ++i) {
    Candidate candidate = {nullptr, {}, {}, {}, {}, nullptr};
    Row& row = candidate.row;
    row.family = "parameters";
    row.list = "none";
    row.work = "launch";
    // What is beside it in the table; the engine takes 1, 4 or 32 KB.
    row.variant = std::to_string(kernels[i].bytes) + " bytes";
    row.threads = 256;
    row.blocks = 1;
    const int mark = static_cast<int>(seed_ % 1000) + static_cast<int>(i);
    const auto call = [&kernel = kernels[i], mark, &result, stream = gpu_.stream()] {
      return kernel.launch(mark, static_cast<int*>(result.get()), stream);
    };
    CUDA_REQUIRE(cudaMemsetAsync(result.get(), 0xff, sizeof(int), gpu_.stream()));
    const cudaError_t error = call();
    int found = 0;
    CUDA_REQUIRE(
        cudaMemcpyAsync(&found, result.get(), sizeof found, cudaMemcpyDeviceToHost, gpu_.stream()));
    gpu_.synchronize();
    if (error != cudaSuccess || found != mark) {
      row.status = error != cudaSuccess ? "failed" : "wrong";
      row.note = error != cudaSuccess ? cudaGetErrorString(error) : "the last word has not arrived";
      (void)cudaGetLastError();
      write(row);
      continue;
    }
    candidate.graph = std::make_unique<Graph>(gpu_.stream(), kCallsOfGraph, call);
    right.push_back(std::move(candidate));
    for (int repeat = 0; repeat < kHotRepeats; ++repeat) time_stream(call, &right.back());
  }
  for (int repeat = 0; repeat < 5 * kHotRepeats; ++repeat) {
    for (Candidate& candidate : right) {
      gpu_.spin(20.0);
      candidate.times.push_back(gpu_.time([&] { candidate.graph->launch(gpu_.stream()); }) /
                                kCallsOfGraph);
    }
  }
  for (Candidate& candidate : right) write_timed(&candidate, 0.0);
}

std::vector<List> small_lists() {
  std::vector<List> lists;
  for (const int64_t kilobytes : {4, 16, 64, 256, 1024, 4096, 16384}) {
    for (const int64_t tensors : {1, 8, 40, 190, 1000}) {
      lists.push_back(equal_tensors(kilobytes << 10, tensors));
    }
  }
  return lists;
}

// Whether there is such a family.
bool run(Sweep* sweep, const std::string& family, bool rehearses) {
  constexpr bool kHot = true;
  constexpr bool kCold = false;
  const std::vector<List> rehearsal = {equal_tensors(40 << 10, 3)};
  if (family == "bandwidth") {
    sweep->bandwidth();
  } else if (family == "parameters") {
    sweep->parameters();
  } else if (family == "small") {
    sweep->family("small", rehearses ? rehearsal : small_lists(), small_list_variants(),
                  {Work::kClip, Work::kQuiet}, kHot);
  } else if (family == "order") {
    sweep->family("order",
                  rehearses ? rehearsal : std::vector<List>{gpt2(), resnet50(), llama3_blocks(4)},
                  measuring_variants(), {Work::kMeasure}, kCold);
  } else if (family == "scale") {
    sweep->family("scale",
                  rehearses ? rehearsal
                            : std::vector<List>{gpt2(), resnet50(), equal_tensors(32 << 20, 64),
                                                llama3_blocks(2)},
                  scaling_variants(), {Work::kClip}, kCold);
  } else if (family == "prologue") {
    sweep->family("prologue",
                  rehearses
                      ? rehearsal
                      : std::vector<List>{equal_tensors(256 << 10, 20), equal_tensors(1 << 20, 100),
                                          equal_tensors(4 << 20, 60), equal_tensors(16 << 20, 190),
                                          resnet50()},
                  prologue_variants(), {Work::kClip, Work::kQuiet}, kHot);
  } else {
    return false;
  }
  return true;
}

int print_table(const std::string& path) {
  constexpr size_t kMostCharacters = 7900;
  const Rows found = read_rows(path);
  std::printf("%s", table(found.rows, kMostCharacters).c_str());
  if (found.problem.empty()) return 0;
  std::printf("%s\n", found.problem.c_str());
  return 1;
}

}  // namespace
}  // namespace gradclip::cuda::sweep

int main(int count, char** arguments) {
  using namespace gradclip::cuda::sweep;
  const std::string family = count >= 3 ? arguments[2] : "";
  if (count == 3 && family == "table") return print_table(arguments[1]);
  double seconds = count >= 3 ? 240.0 : 0.0;
  bool rehearses = false;
  for (int i = 3; i < count; ++i) {
    if (std::strcmp(arguments[i], "--rehearse") == 0) {
      rehearses = true;
    } else if (std::strcmp(arguments[i], "--seconds") == 0 && i + 1 < count) {
      seconds = std::atof(arguments[++i]);
    } else {
      seconds = 0.0;
    }
  }
  if (!(seconds > 0.0)) {
    std::fprintf(stderr,
                 "usage: sweep CSV FAMILY [--seconds N] [--rehearse], or sweep CSV table\n");
    return 2;
  }
  try {
    Sweep sweep(arguments[1], seconds);
    if (!run(&sweep, family, rehearses)) {
      std::fprintf(stderr, "no family is called %s; the head of sweep.cpp lists them\n",
                   family.c_str());
      return 2;
    }
    return sweep.all_right() ? 0 : 1;
  } catch (const CudaFailure& failure) {
    std::fprintf(stderr, "%s: %s\n", family.c_str(), failure.what());
    return 1;
  }
}
