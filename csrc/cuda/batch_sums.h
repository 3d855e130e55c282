// Gradients of weights: sums over the batch of what the images leave behind, n ascending.
#pragma once

#include "launch.h"
#include "portable.h"

namespace visattn::cuda {

// out [rows, cols] = sum over n of a[n, row] * f(b[n, col]); b null: out [rows] = sum of a. f is the
// activation.
struct OuterSum {
  const float *a, *b;
  float* out;
  int rows, cols, activation;
};

constexpr int kMostSums = 4;

struct OuterSums {
  OuterSum sums[kMostSums];
  int64_t batch;
};

void launch_outer_sums(const char* name, const OuterSums& sums, int count, const Call& call);

// dweight[j] = sum over n and c of dz[n, c] mean[n, c + j - window / 2].
struct WindowSum {
  const float *dz, *mean;
  float* out;
  int64_t batch;
  int channels, window;
};

void launch_window_sum(const char* name, const WindowSum& sum, const Call& call);

}  // namespace visattn::cuda
