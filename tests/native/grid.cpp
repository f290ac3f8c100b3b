// How the emulation runs threads, warps and blocks.
#include "grid.h"

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace gradclip::emulation {

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::fflush(stdout);
  // No destructors and no joins: fibers and blocks are abandoned.
  std::_Exit(1);
}

class Block;

namespace {

// Where a thread of a block has stopped.
enum class State { kRunnable, kShuffle, kBarrier, kClusterBarrier, kWait, kEnded };

class Stacks {
 public:
  static constexpr size_t kBytes = 64 * 1024;

  static std::unique_ptr<char[]> take() {
    if (unused().empty()) return std::unique_ptr<char[]>(new char[kBytes]);
    std::unique_ptr<char[]> stack = std::move(unused().back());
    unused().pop_back();
    return stack;
  }

  static void give(std::unique_ptr<char[]> stack) { unused().push_back(std::move(stack)); }

 private:
  // Only the holder of the baton gets here.
  static std::vector<std::unique_ptr<char[]>>& unused() {
    static std::vector<std::unique_ptr<char[]>> stacks;
    return stacks;
  }
};

// A point at which execution can be left and resumed. Neither swapcontext, which asks the
// operating system for the signal mask each time, nor longjmp, for which the address sanitizer
// does: most of the time would go there.
struct Place {
  void* registers[5];
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif

  void entered_from([[maybe_unused]] Place* other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &other->bottom, &other->size);
#endif
  }
};

// In functions of its own, since __builtin_longjmp must not be in the function of __builtin_setjmp,
// and hidden from the address sanitizer, which is told about each switch explicitly.
#define GRADCLIP_SWITCH __attribute__((noinline, no_sanitize_address))

[[noreturn]] GRADCLIP_SWITCH void enter(Place* place) { __builtin_longjmp(place->registers, 1); }

[[noreturn]] GRADCLIP_SWITCH void enter_first(const ucontext_t* start) {
  setcontext(start);
  fail("setcontext failed");
}

// Switches to `to`, by `start` the first time; returns once something switches back.
GRADCLIP_SWITCH void go(Place* from, Place* to, const ucontext_t* start = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
  if (__builtin_setjmp(from->registers) == 0) {
    if (start == nullptr) enter(to);
    enter_first(start);
  }
  from->entered_from(to);
}

struct Fiber {
  State state = State::kRunnable;
  bool started = false;
  // Whether what the previous kernel wrote may be read.
  bool has_waited = false;
  // Whether the first half of the cluster's barrier lies behind it.
  bool arrived = false;
  // Of a shuffle.
  uint64_t offered = 0;
  uint64_t received = 0;
  int offset = 0;
  std::unique_ptr<char[]> stack;
  Place place;
};

thread_local Block* this_block = nullptr;
// Shared memory has the same distance from this in every block.
thread_local char anchor_of_shared_memory = 0;
// Of the grid that runs.
std::vector<Block*> cluster;

}  // namespace

class Block {
 public:
  Block(int index, const Launch& launch, Schedule schedule, const std::function<void()>& body)
      : index_(index), early_(launch.early), body_(body), chooser_(schedule, index) {
    if (launch.threads % kWarpThreads != 0) fail("%d threads are no warps", launch.threads);
    fibers_.resize(static_cast<size_t>(launch.threads));
    thread_ = std::thread([this] { run(); });
  }

  // Lets the block run to its next barrier, to its wait or to its end.
  void advance() {
    std::unique_lock<std::mutex> lock(mutex_);
    is_running_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !is_running_; });
  }

  bool has_ended() const { return all_are(State::kEnded); }
  bool waits() const { return all_are(State::kWait); }
  bool is_at_cluster_barrier() const { return all_are(State::kClusterBarrier); }

  // All blocks stand at the cluster's barrier.
  void leave_cluster_barrier() {
    for (Fiber& fiber : fibers_) fiber.state = State::kRunnable;
  }

  // The previous kernel has ended.
  void release() {
    early_ = false;
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::kWait) fiber.state = State::kRunnable;
    }
  }

  void join() { thread_.join(); }

  // What follows is called from the threads of the block.

  void barrier() { stop(State::kBarrier); }

  uint64_t shuffle_down(uint64_t value, int offset) {
    fiber_->offered = value;
    fiber_->offset = offset;
    stop(State::kShuffle);
    return fiber_->received;
  }

  void wait_for_previous_kernel() {
    if (early_) stop(State::kWait);
    fiber_->has_waited = true;
  }

  void arrive_at_cluster_barrier() { fiber_->arrived = true; }

  void wait_at_cluster_barrier() {
    if (!fiber_->arrived) fail("block %d, thread %u: waits without arrival", index_, threadIdx.x);
    fiber_->arrived = false;
    stop(State::kClusterBarrier);
  }

  const void* shared_memory_of(int number, const void* own) const {
    const Block* other = cluster.at(static_cast<size_t>(number));
    if (other->has_ended()) {
      fail("block %d: reads the shared memory of block %d, which has ended", index_, number);
    }
    // A block that has not run yet has no shared memory.
    if (other->anchor_ == nullptr) fail("block %d: block %d has not begun", index_, number);
    return other->anchor_ + (static_cast<const char*>(own) - anchor_);
  }

  void before_load_of_result() const {
    if (early_ && !fiber_->has_waited) {
      fail("block %d, thread %u: loads a result before it has waited", index_, threadIdx.x);
    }
  }

 private:
  bool all_are(State state) const {
    return std::all_of(fibers_.begin(), fibers_.end(),
                       [state](const Fiber& fiber) { return fiber.state == state; });
  }

  // The thread of the operating system.
  void run() {
    this_block = this;
    blockIdx.x = static_cast<unsigned>(index_);
    std::unique_lock<std::mutex> lock(mutex_);
    anchor_ = &anchor_of_shared_memory;
    while (!has_ended()) {
      changed_.wait(lock, [this] { return is_running_; });
      run_to_stop();
      is_running_ = false;
      changed_.notify_all();
    }
  }

  void run_to_stop() {
    std::vector<int> warps;
    for (int warp = 0; warp < static_cast<int>(fibers_.size()) / kWarpThreads; ++warp) {
      warps.push_back(warp);
    }
    while (!warps.empty()) {
      const size_t chosen = chooser_.next(warps.size());
      if (run_warp(warps[chosen])) continue;
      warps.erase(warps.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
    if (all_are(State::kBarrier)) {
      for (Fiber& fiber : fibers_) fiber.state = State::kRunnable;
    } else if (!has_ended() && !waits() && !is_at_cluster_barrier()) {
      fail("block %d: %d threads stand in a shuffle, %d at a barrier, %d wait, %d have ended",
           index_, count(State::kShuffle), count(State::kBarrier), count(State::kWait),
           count(State::kEnded));
    }
  }

  // Lets each thread of the warp run until it has to stop. Returns whether it can go on from there.
  bool run_warp(int warp) {
    std::vector<int> runnable;
    for (int i = warp * kWarpThreads; i < (warp + 1) * kWarpThreads; ++i) {
      if (fibers_[static_cast<size_t>(i)].state == State::kRunnable) runnable.push_back(i);
    }
    chooser_.visit_all(std::move(runnable), [this](int i) { resume(i); });
    Fiber* lanes = &fibers_[static_cast<size_t>(warp * kWarpThreads)];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      if (lanes[lane].state != State::kShuffle) return false;
      if (lanes[lane].offset != lanes[0].offset) return false;
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int source = lane + lanes[0].offset;
      lanes[lane].received = lanes[source < kWarpThreads ? source : lane].offered;
      lanes[lane].state = State::kRunnable;
    }
    return true;
  }

  void resume(int thread) {
    fiber_ = &fibers_[static_cast<size_t>(thread)];
    threadIdx.x = static_cast<unsigned>(thread);
    if (fiber_->started) {
      go(&scheduler_, &fiber_->place);
    } else {
      fiber_->started = true;
      fiber_->stack = Stacks::take();
#if defined(__SANITIZE_ADDRESS__)
      fiber_->place.bottom = fiber_->stack.get();
      fiber_->place.size = Stacks::kBytes;
#endif
      ucontext_t start;
      getcontext(&start);
      start.uc_stack.ss_sp = fiber_->stack.get();
      start.uc_stack.ss_size = Stacks::kBytes;
      start.uc_link = nullptr;
      makecontext(&start, &Block::start_of_fiber, 0);
      go(&scheduler_, &fiber_->place, &start);
    }
    if (fiber_->state == State::kEnded) Stacks::give(std::move(fiber_->stack));
  }

  static void start_of_fiber() {
    Block* block = this_block;
    block->fiber_->place.entered_from(&block->scheduler_);
    block->body_();
    block->stop(State::kEnded);
  }

  void stop(State state) {
    fiber_->state = state;
    go(&fiber_->place, &scheduler_);
  }

  int count(State state) const {
    return static_cast<int>(
        std::count_if(fibers_.begin(), fibers_.end(),
                      [state](const Fiber& fiber) { return fiber.state == state; }));
  }

  const int index_;
  bool early_;
  const std::function<void()>& body_;
  Chooser chooser_;
  std::vector<Fiber> fibers_;
  Fiber* fiber_ = nullptr;
  Place scheduler_;
  char* anchor_ = nullptr;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_running_ = false;
  std::thread thread_;
};

static void remove(std::vector<Block*>* blocks, bool (Block::*is_done)() const) {
  blocks->erase(std::remove_if(blocks->begin(), blocks->end(),
                               [is_done](const Block* block) { return (block->*is_done)(); }),
                blocks->end());
}

Grid::Grid(const Launch& launch, Schedule schedule, std::function<void()> body)
    : early_(launch.early), body_(std::move(body)), chooser_(schedule, -1) {
  for (int i = 0; i < launch.blocks; ++i) {
    blocks_.push_back(std::make_unique<Block>(i, launch, schedule, body_));
  }
}

Grid::~Grid() = default;

std::vector<Block*> Grid::all() const {
  std::vector<Block*> blocks;
  for (const auto& block : blocks_) blocks.push_back(block.get());
  return blocks;
}

void Grid::run_to_wait() {
  std::vector<Block*> running = all();
  while (!running.empty()) {
    chooser_.visit_all(running, [](Block* block) { block->advance(); });
    for (const Block* block : running) {
      if (block->has_ended()) fail("a block ended before it waited for the previous kernel");
    }
    remove(&running, &Block::waits);
  }
}

void Grid::run() {
  if (early_) {
    for (const auto& block : blocks_) block->release();
  }
  std::vector<Block*> running = all();
  cluster = running;
  while (!running.empty()) {
    chooser_.visit_all(running, [](Block* block) { block->advance(); });
    remove(&running, &Block::has_ended);
    std::vector<Block*> others = running;
    remove(&others, &Block::is_at_cluster_barrier);
    if (running.empty() || !others.empty()) continue;
    if (running.size() < blocks_.size()) fail("a block ended, others wait at the cluster barrier");
    // Each runs ahead as far as it can while the others have not yet left the barrier.
    chooser_.visit_all(running, [](Block* block) {
      block->leave_cluster_barrier();
      while (!block->has_ended() && !block->is_at_cluster_barrier()) block->advance();
    });
    remove(&running, &Block::has_ended);
  }
  for (const auto& block : blocks_) block->join();
}

void barrier() { this_block->barrier(); }

uint64_t shuffle_down(uint64_t value, int offset) {
  return this_block->shuffle_down(value, offset);
}

void wait_for_previous_kernel() { this_block->wait_for_previous_kernel(); }

void before_load_of_result() { this_block->before_load_of_result(); }

void arrive_at_cluster_barrier() { this_block->arrive_at_cluster_barrier(); }

void wait_at_cluster_barrier() { this_block->wait_at_cluster_barrier(); }

const void* shared_memory_of(int block, const void* own) {
  return this_block->shared_memory_of(block, own);
}

}  // namespace gradclip::emulation
