// Splits work over threads: one image for each thread, or all threads on one image.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

namespace visattn {

// A zero-filled, cache-line aligned array, padded so that whole vectors may be read and written past its end.
// It comes from malloc, which keeps small blocks at hand; aligned_alloc would search for them.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count + kPad) * sizeof(A);
    block_.reset(std::malloc(bytes + kLine));
    if (!block_) throw std::bad_alloc();
    data_ = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(block_.get()) + kLine - 1) / kLine * kLine);
    std::memset(data_, 0, bytes);
  }
  A* get() { return data_; }
  const A* get() const { return data_; }
  A& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr int64_t kPad = 64;
  static constexpr uintptr_t kLine = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> block_;
  A* data_ = nullptr;
};

// Calls f(b, e) for parts of [begin, end) of at least `grain` elements in parallel, and throws the first exception of
// f. PyTorch's own loop replaces it by one that does not say what failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr failure;
  std::atomic_flag failed;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      f(b, e);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// The threads that work on one image. Results never depend on their number.
class Workers {
 public:
  explicit Workers(bool parallel) : parallel_(parallel) {}

  // True if a single thread does all the work, block after block.
  bool alone() const { return !parallel_; }

  // Calls f(begin, end) for parts of [0, count).
  template <class F>
  void each(int64_t count, const F& f) const {
    if (parallel_) {
      parallel_for(0, count, 1, f);
    } else {
      f(0, count);
    }
  }

  // Calls first(b) for every block b, and second(b) once first has run for all blocks up to b + lag. A lone
  // thread interleaves the two, so that second finds its block still in cache.
  template <class First, class Second>
  void pipeline(int64_t blocks, int64_t lag, const First& first, const Second& second) const {
    if (parallel_) {
      parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) first(b);
      });
      parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) second(b);
      });
      return;
    }
    for (int64_t b = 0; b < blocks + lag; ++b) {
      if (b < blocks) first(b);
      if (b >= lag) second(b - lag);
    }
  }

 private:
  bool parallel_;
};

// Calls f(begin, end, workers) for ranges of images. The threads get equally many whole images each; all
// threads share each image that is left over.
template <class F>
void for_images(int64_t images, int64_t elements, const F& f) {
  constexpr int64_t kTooSmall = 1 << 13;  // elements that one thread processes before a second one wakes up
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || images * elements < kTooSmall) {
    f(0, images, Workers(false));
    return;
  }
  const int64_t even = images - images % threads;
  if (even > 0) {
    parallel_for(0, even, 1, [&](int64_t b, int64_t e) { f(b, e, Workers(false)); });
  }
  if (even < images) f(even, images, Workers(true));
}

}  // namespace visattn
