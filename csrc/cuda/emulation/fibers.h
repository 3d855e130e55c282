// The threads of a launch as fibers on one CPU thread; at every barrier a random one continues.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace visattn::cuda::emulation {

constexpr int kStages = 4;

// The number of barriers of each kind that a thread has passed. A barrier of a wider kind also counts for the
// narrower ones.
struct Epochs {
  int32_t warp = 0, block = 0, team = 0, grid = 0;
};

struct Fiber {
  int id, team, rank, thread;
  Epochs epochs;
  int64_t seen[kStages] = {};  // the copy that the thread has waited for
  bool touched[kStages] = {};  // has accessed the slab since its last fence
  bool done = false;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

class Scheduler {
 public:
  static constexpr size_t kStack = 128 << 10;

  explicit Scheduler(uint64_t seed) : random_(seed) {}

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::string> faults;
  Fiber* current = nullptr;

  void fault(const std::string& what) {
    if (faults.size() < 20) {
      faults.push_back(what + " (team " + std::to_string(current->team) + ", block " +
                       std::to_string(current->rank) + ", thread " + std::to_string(current->thread) + ")");
    }
  }

  bool chance() { return random_() & 1; }

  // Runs body(fiber) in every fiber to its end.
  void run(const std::function<void(Fiber&)>& body) {
    active = this;
    body_ = &body;
    ready_.clear();
    for (auto& f : fibers) {
      f->stack.reset(new char[kStack]);
      getcontext(&f->context);
      f->context.uc_stack = {f->stack.get(), 0, kStack};
      f->context.uc_link = &main_;
      makecontext(&f->context, reinterpret_cast<void (*)()>(&Scheduler::enter), 0);
      ready_.push_back(f.get());
    }
    size_t left = ready_.size();
    while (left) {
      if (ready_.empty() || pauses_ > kMostPauses)
        return fault("deadlock: " + std::to_string(left) + " threads wait");
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      current = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &current->context);
      left -= current->done;
    }
  }

  // Lets others run first.
  void pause() {
    ++pauses_;
    ready_.push_back(current);
    yield();
  }

  // Waits for all fibers that the barrier expects.
  void meet(Barrier& b) {
    b.waiting.push_back(current);
    if (static_cast<int>(b.waiting.size()) == b.expected) {
      ready_.insert(ready_.end(), b.waiting.begin(), b.waiting.end());
      b.waiting.clear();
      pauses_ = 0;
    }
    yield();
  }

  static inline Scheduler* active = nullptr;

 private:
  static constexpr int64_t kMostPauses = 200'000;  // in a row

  void yield() { swapcontext(&current->context, &main_); }

  static void enter() {
    Fiber* f = active->current;
    (*active->body_)(*f);
    f->done = true;
  }

  std::mt19937_64 random_;
  std::vector<Fiber*> ready_;
  int64_t pauses_ = 0;
  const std::function<void(Fiber&)>* body_ = nullptr;
  ucontext_t main_;
};

}  // namespace visattn::cuda::emulation
