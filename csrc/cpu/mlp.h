// The perceptron of channel gates, C -> R -> C, its backward, and the weight gradients over the batch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "simd_math.h"
#include "tensor.h"

namespace visattn {

// y[r] = sum_c w[r, c] x[c] (+ bias[r])
template <class A>
void matvec(const A* w, int64_t rows, int64_t cols, const A* x, const A* bias, A* y) {
  simd([=]() VF_INLINE {
    int64_t r = 0;
    for (; cols < kLanes<A> && r + 4 <= rows; r += 4) {  // few hidden units: four short rows side by side
      const A* row = w + r * cols;
      A sum[4] = {};
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t i = 0; i < 4; ++i) sum[i] += row[i * cols + c] * x[c];
      }
      for (int64_t i = 0; i < 4; ++i) y[r + i] = bias ? sum[i] + bias[r + i] : sum[i];
    }
    for (; r < rows; ++r) {
      Vec<A> total = set1<A>(0);
      const A* row = w + r * cols;
      const int64_t whole = cols - cols % kLanes<A>;
      for (int64_t c = 0; c < whole; c += kLanes<A>) total += load(row + c) * load(x + c);
      A sum = sum_lanes<A>(total);
      for (int64_t c = whole; c < cols; ++c) sum += row[c] * x[c];
      y[r] = bias ? sum + bias[r] : sum;
    }
  });
}

// out[i, c] = sum_n a[n, i] b[n, c], n ascending, for R rows i and K vectors of columns, whose sums stay in
// registers. a is [n, stride], b [n, cols].
template <class A, int R, int K, class Lanes>
VF_INLINE inline void outer_tile(int64_t count, const A* a, int64_t stride, const A* b, int64_t cols, A* out,
                                 Lanes lanes) {
  Vec<A> total[R][K];
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) total[i][k] = set1<A>(0);
  }
  for (int64_t n = 0; n < count; ++n) {
    Vec<A> v[K];
    for (int k = 0; k < K; ++k) v[k] = load(b + n * cols + k * kLanes<A>, lanes);
    for (int i = 0; i < R; ++i) {
      const Vec<A> factor = set1<A>(a[n * stride + i]);
      for (int k = 0; k < K; ++k) total[i][k] += v[k] * factor;
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) store(out + i * cols + k * kLanes<A>, total[i][k], lanes);
  }
}

// The same for all columns.
template <class A, int R, int K>
VF_INLINE inline void outer_rows(int64_t count, const A* a, int64_t stride, const A* b, int64_t cols,
                                 A* out) {
  int64_t c = 0;
  for (; c + K * kLanes<A> <= cols; c += K * kLanes<A>) {
    outer_tile<A, R, K>(count, a, stride, b + c, cols, out + c, Full{});
  }
  for_vectors<A>(cols - c, [&](int64_t i, auto lanes) VF_INLINE {
    outer_tile<A, R, 1>(count, a, stride, b + c + i, cols, out + c + i, lanes);
  });
}

// y[c] = sum_r w[r, c] x[r]
template <class A>
void matvec_transposed(const A* w, int64_t rows, int64_t cols, const A* x, A* y) {
  simd([=]() VF_INLINE { outer_rows<A, 1, 4>(rows, x, 1, w, cols, y); });
}

// out[r, c] = sum_n a[n, r] b[n, c], n ascending.
template <class A>
void batch_outer(int64_t batch, const A* a, int64_t rows, const A* b, int64_t cols, A* out) {
  const int64_t grain = 1 + (1 << 15) / (1 + batch * cols);
  parallel_for(0, rows, grain, [=](int64_t begin, int64_t end) {
    simd([=]() VF_INLINE {
      int64_t r = begin;
      for (; r + 4 <= end; r += 4) outer_rows<A, 4, 2>(batch, a + r, rows, b, cols, out + r * cols);
      for (; r < end; ++r) outer_rows<A, 1, 4>(batch, a + r, rows, b, cols, out + r * cols);
    });
  });
}

// out[c] = sum_n a[n, c], n ascending.
template <class A>
void batch_sum(int64_t batch, const A* a, int64_t cols, A* out) {
  constexpr int64_t kSums = 64;
  for (int64_t c0 = 0; c0 < cols; c0 += kSums) {
    const int64_t count = std::min(cols - c0, kSums);
    double sums[kSums] = {};
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t c = 0; c < count; ++c) sums[c] += a[n * cols + c0 + c];
    }
    for (int64_t c = 0; c < count; ++c) out[c0 + c] = static_cast<A>(sums[c]);
  }
}

template <class A>
void relu_in_place(A* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] < 0 ? A(0) : v[i];
}

template <class A>
void sigmoid_in_place(A* v, int64_t count) {
  simd([=]() VF_INLINE {
    for_vectors<A>(count, [&](int64_t i, auto lanes)
                              VF_INLINE { store(v + i, sigmoid_lanes(load(v + i, lanes)), lanes); });
  });
}

// relu6(v + 3) / 6; NaN stays NaN.
template <class A>
void hard_sigmoid_in_place(A* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A shifted = v[i] + 3;
    v[i] = (shifted < 0 ? A(0) : shifted > 6 ? A(6) : shifted) / 6;
  }
}

// dz[c] = dgate[c] * gate[c] * (1 - gate[c])
template <class A>
void sigmoid_grad(const A* dgate, const A* gate, int64_t count, A* dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = dgate[i] * gate[i] * (1 - gate[i]);
}

// dz[c] of the hard sigmoid, whose slope is 1/6 between its ends.
template <class A>
void hard_sigmoid_grad(const A* dgate, const A* gate, int64_t count, A* dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = gate[i] > 0 && gate[i] < 1 ? dgate[i] / 6 : A(0);
}

// The weights w1 [R, C] and w2 [C, R] of a gate, contiguous, in the accumulation dtype.
template <class A>
struct Mlp {
  Tensor w1, w2;
  int64_t C, R;

  Mlp(const Tensor& first, const Tensor& second, int64_t channels)
      : w1(weight_as(first, kDtype<A>)), w2(weight_as(second, kDtype<A>)), C(channels), R(first.size(0)) {}

  void squeeze(const A* in, const A* b1, A* out) const { matvec(data<A>(w1), R, C, in, b1, out); }
  void excite(const A* hidden, const A* b2, A* out) const { matvec(data<A>(w2), C, R, hidden, b2, out); }
  void excite_grad(const A* dz, A* dh) const { matvec_transposed(data<A>(w2), C, R, dz, dh); }

  // hidden [R] = relu(w1 in + b1)
  void hidden(const A* in, const A* b1, A* out) const {
    squeeze(in, b1, out);
    relu_in_place(out, R);
  }

  // gate [C] = sigmoid(w2 hidden + b2)
  void gate(const A* hidden, const A* b2, A* out) const {
    excite(hidden, b2, out);
    sigmoid_in_place(out, C);
  }

  // dz [C] -> dh [R] = w2^T dz where hidden > 0
  void hidden_grad(const A* dz, const A* hidden, A* dh) const {
    excite_grad(dz, dh);
    mask(hidden, dh);
  }

  void mask(const A* hidden, A* dh) const {
    for (int64_t r = 0; r < R; ++r) dh[r] = hidden[r] <= 0 ? A(0) : dh[r];
  }

  // dh [R] -> din [C] = w1^T dh
  void input_grad(const A* dh, A* din) const { matvec_transposed(data<A>(w1), R, C, dh, din); }

  // Two branches with the same weights: in [2, C], hidden [2, R], gate [C] = sigmoid(w2 (hidden_0 +
  // hidden_1)).
  void gate_of_two(const A* in, A* hidden_out, A* out) const {
    Buffer<A> both(R);
    hidden(in, nullptr, hidden_out);
    hidden(in + C, nullptr, hidden_out + R);
    for (int64_t r = 0; r < R; ++r) both[r] = hidden_out[r] + hidden_out[R + r];
    gate(both.get(), nullptr, out);
  }

  // dz [C] -> dh [2, R] and din [2, C].
  void grad_of_two(const A* dz, const A* hidden, A* dh, A* din) const {
    excite_grad(dz, dh);
    std::copy_n(dh, R, dh + R);
    for (int64_t i = 0; i < 2; ++i) {
      mask(hidden + i * R, dh + i * R);
      input_grad(dh + i * R, din + i * C);
    }
  }
};

struct MlpGrads {
  Tensor dw1, db1, dw2, db2;
};

// Weight gradients from dz [N, C], dh [N, R], in [N, C], hidden [N, R].
template <class A>
MlpGrads weight_grad(const Mlp<A>& mlp, const Tensor& w1, const Tensor& w2, int64_t batch, const A* dz,
                     const A* dh, const A* in, const A* hidden) {
  MlpGrads grads{empty_grad(w1, kDtype<A>), empty({mlp.R}, kDtype<A>), empty_grad(w2, kDtype<A>),
                 empty({mlp.C}, kDtype<A>)};
  batch_outer(batch, dz, mlp.C, hidden, mlp.R, data<A>(grads.dw2));
  batch_outer(batch, dh, mlp.R, in, mlp.C, data<A>(grads.dw1));
  batch_sum(batch, dz, mlp.C, data<A>(grads.db2));
  batch_sum(batch, dh, mlp.R, data<A>(grads.db1));
  return grads;
}

// Weight gradients of two branches from dz [N, C], dh [N, 2, R], in [N, 2, C], hidden [N, 2, R].
template <class A>
void weight_grad_of_two(const Mlp<A>& mlp, int64_t batch, const A* dz, const A* dh, const A* in,
                        const A* hidden, A* dw1, A* dw2) {
  Buffer<A> both(batch * mlp.R);
  for (int64_t n = 0; n < batch; ++n) {
    const A* h = hidden + 2 * n * mlp.R;
    for (int64_t r = 0; r < mlp.R; ++r) both[n * mlp.R + r] = h[r] + h[mlp.R + r];
  }
  batch_outer(batch, dz, mlp.C, both.get(), mlp.R, dw2);
  batch_outer(2 * batch, dh, mlp.R, in, mlp.C, dw1);
}

}  // namespace visattn
