// Grids of the emulation, see emulation.h, as the tests launch them.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "emulation.h"

namespace gradclip::emulation {

// Ends the program with this message and exit status 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

enum class Order { kForward, kReverse, kRandom };

struct Schedule {
  Order order = Order::kForward;
  unsigned seed = 0;
};

// Decides which of those that can run goes next.
class Chooser {
 public:
  Chooser(Schedule schedule, int salt)
      : order_(schedule.order), random_(schedule.seed + 1000 * static_cast<unsigned>(salt)) {}

  size_t next(size_t count) {
    switch (order_) {
      case Order::kForward:
        return 0;
      case Order::kReverse:
        return count - 1;
      case Order::kRandom:
        return random_() % count;
    }
    return 0;
  }

  // Calls visit for each of them once.
  template <class Value, class Visit>
  void visit_all(std::vector<Value> left, const Visit& visit) {
    while (!left.empty()) {
      const auto chosen = left.begin() + static_cast<std::ptrdiff_t>(next(left.size()));
      const Value value = *chosen;
      left.erase(chosen);
      visit(value);
    }
  }

 private:
  Order order_;
  std::mt19937 random_;
};

struct Launch {
  int blocks;
  int threads;
  // Whether the grid may start while the previous one runs.
  bool early = false;
};

class Block;

class Grid {
 public:
  Grid(const Launch& launch, Schedule schedule, std::function<void()> body);
  ~Grid();

  // For an early launch, while the previous kernel runs: until every thread waits for its end.
  void run_to_wait();

  // Until all threads have ended. The previous kernel has ended by now.
  void run();

 private:
  std::vector<Block*> all() const;

  const bool early_;
  const std::function<void()> body_;
  Chooser chooser_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

}  // namespace gradclip::emulation
