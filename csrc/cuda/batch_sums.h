// The weights' gradients: sums over the batch of what each image left behind, n ascending, by any number of
// blocks. Small maps are summed in the launch that computes them, after a barrier of the whole grid; others
// in a second launch, whose number of blocks suits the weights.
#pragma once

#include <cstdint>

#include "../common/activations.h"
#include "../common/geometry.h"
#include "gate_math.h"
#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

// out [rows, cols] = sum over i < count of a[i >> shift, row] * f(b[i, col]), where f is the activation and
// rows of a are `stride` apart. With a null b: out [rows] = sum of a.
template <class Memory>
struct OuterSum {
  template <class U>
  using Global = typename Memory::template Global<U>;
  Global<const float> a, b;
  Global<float> out;
  int64_t count;
  int shift, stride, rows, cols, activation;
};

// out[j] = sum over i < batch and c of dz[i, c] mean[i, c + j - window / 2]. window is 0 without such a sum.
template <class Memory>
struct WindowSum {
  template <class U>
  using Global = typename Memory::template Global<U>;
  Global<const float> dz, mean;
  Global<float> out;
  int64_t batch;
  int channels, window;
};

constexpr int kMostSums = 4;

template <class Memory>
struct BatchSums {
  OuterSum<Memory> outer[kMostSums];
  WindowSum<Memory> windowed;
  int count;  // of the outer sums

  VF_DEVICE bool any() const { return count || windowed.window; }
};

template <class Memory>
using ReadFloats = typename Memory::template Global<const float>;
template <class Memory>
using WriteFloats = typename Memory::template Global<float>;

// SE's sums: from dz [N, C] and dhidden [N, R], and what forward kept.
template <class Memory>
BatchSums<Memory> se_sums(int64_t N, int C, int R, int hidden_activation, ReadFloats<Memory> dz,
                          ReadFloats<Memory> dhidden, ReadFloats<Memory> mean, ReadFloats<Memory> hidden,
                          WriteFloats<Memory> dw1, WriteFloats<Memory> db1, WriteFloats<Memory> dw2,
                          WriteFloats<Memory> db2) {
  const int taken = hidden_activation == kRelu ? kNone : hidden_activation;  // of ReLU, the result is kept
  return {{{dhidden, mean, dw1, N, 0, R, R, C, kNone},
           {dz, hidden, dw2, N, 0, C, C, R, taken},
           {dhidden, {}, db1, N, 0, R, R, 1, kNone},
           {dz, {}, db2, N, 0, C, C, 1, kNone}},
          {},
          4};
}

template <class Memory>
BatchSums<Memory> eca_sums(int64_t N, int C, int window, ReadFloats<Memory> dz, ReadFloats<Memory> mean,
                           WriteFloats<Memory> dweight) {
  return {{}, {dz, mean, dweight, N, C, window}, 0};
}

// CBAM's sums: dhidden [N, 2, R] and pooled [N, 2, C] have both branches. dbias may be null.
template <class Memory>
BatchSums<Memory> cbam_sums(int64_t N, int C, int R, int window, ReadFloats<Memory> dz,
                            ReadFloats<Memory> dhidden, ReadFloats<Memory> dconv, ReadFloats<Memory> pooled,
                            ReadFloats<Memory> hidden, WriteFloats<Memory> dw1, WriteFloats<Memory> dw2,
                            WriteFloats<Memory> dwconv, WriteFloats<Memory> dbias) {
  const int taps = 2 * window * window;
  return {{{dhidden, pooled, dw1, 2 * N, 0, R, R, C, kNone},
           {dz, hidden, dw2, 2 * N, 1, C, C, R, kNone},
           {dconv, {}, dwconv, N, 0, taps + 1, taps, 1, kNone},
           {dconv + taps, {}, dbias, N, 0, taps + 1, 1, 1, kNone}},
          {},
          dbias ? 4 : 3};
}

template <class Exec, class Memory>
VF_DEVICE void outer_sum(Exec& ex, int block, int blocks, const OuterSum<Memory>& s) {
  // plan.h holds weights' indices to 32 bits; the index after the last element may need one bit more than an
  // int has.
  const unsigned total = static_cast<unsigned>(s.rows) * s.cols, threads = ex.threads();
  for (unsigned i = block * threads + ex.thread(); i < total; i += blocks * threads) {
    const int row = static_cast<int>(i / s.cols), col = static_cast<int>(i % s.cols);
    float sum = 0;
#pragma unroll 4
    for (int64_t n = 0; n < s.count; ++n) {
      const float v = s.b ? activate(get(s.b, n * s.cols + col), s.activation) : 1.0f;
      sum += get(s.a, (n >> s.shift) * s.stride + row) * v;
    }
    put(s.out, i, sum);
  }
}

// One block for each element of the window: a thread's terms, then the threads' sums, in a fixed order.
template <class Exec, class Memory, class Partial>
VF_DEVICE void window_sum(Exec& ex, int block, int blocks, const WindowSum<Memory>& s, Partial partial) {
  for (int j = block; j < s.window; j += blocks) {
    const int shift = j - s.window / 2, step = ex.threads() % s.channels;
    int c = ex.thread() % s.channels;
    float sum = 0;
#pragma unroll 4
    for (int64_t i = ex.thread(); i < s.batch * s.channels; i += ex.threads()) {
      const int from = c + shift;
      if (from >= 0 && from < s.channels) sum += get(s.dz, i) * get(s.mean, i + shift);
      c += step;
      if (c >= s.channels) c -= s.channels;
    }
    sum = ex.warp_sum(sum);
    if (ex.thread() % kWarp == 0) put(partial, ex.thread() / kWarp, sum);
    ex.sync_block();
    if (ex.thread() == 0) {
      for (int warp = 1; warp < ex.threads() / kWarp; ++warp) sum += get(partial, warp);
      put(s.out, j, sum);
    }
    ex.sync_block();
  }
}

// Block `block`'s share of all sums, of `blocks` blocks. partial: one float of shared memory for each warp.
template <class Exec, class Memory, class Partial>
VF_DEVICE void batch_sums(Exec& ex, int block, int blocks, const BatchSums<Memory>& all, Partial partial) {
#pragma unroll 1
  for (int k = 0; k < all.count; ++k) outer_sum(ex, block, blocks, all.outer[k]);
  if (all.windowed.window) window_sum(ex, block, blocks, all.windowed, partial);
}

// The same at the end of the launch that computes the images' parts.
template <class Exec>
VF_DEVICE void sums_of_grid(Exec& ex, const BatchSums<typename Exec::Memory>& all) {
  ex.sync_grid();
  batch_sums(ex, ex.team() * ex.team_size() + ex.rank(), ex.teams() * ex.team_size(), all,
             ex.template shared<float>(kHeader));
}

using Sums = BatchSums<PlainMemory>;

void launch_batch_sums(const char* name, const Sums& sums, const Call& call);

}  // namespace visattn::cuda
