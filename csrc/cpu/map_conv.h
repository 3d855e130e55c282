// The k x k convolution of two maps to one (weights [2, k, k], zero padding k / 2) and its backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "mlp.h"
#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "tensor.h"
#include "wide_sums.h"

namespace visattn {

// A map [H, W] in a frame of zeros that is wide enough to read whole vectors at every tap.
template <class A>
class Framed {
 public:
  static constexpr int64_t kTile = 4 * kLanes<A>;

  Framed(int64_t H, int64_t W, int64_t k)
      : pad_(k / 2), ld_((W + kTile - 1) / kTile * kTile + 2 * pad_), values_((H + 2 * pad_) * ld_ + kTile) {}

  // Pixel (y, x); y and x may lie up to k / 2 outside the map.
  A* at(int64_t y, int64_t x) { return values_.get() + (y + pad_) * ld_ + x + pad_; }
  const A* at(int64_t y, int64_t x) const { return values_.get() + (y + pad_) * ld_ + x + pad_; }

  void set_rows(int64_t begin, int64_t end, int64_t W, const A* map) {
    for (int64_t y = begin; y < end; ++y) std::copy_n(map + y * W, W, at(y, 0));
  }

 private:
  int64_t pad_, ld_;
  Buffer<A> values_;
};

// Row y of the convolution of `count` maps: out[x] = bias + sum over maps and taps of w[i, j] in(y + i - k/2,
// x + j - k/2).
template <class A>
VF_INLINE inline void conv_row(const Framed<A>* in, int count, const A* w, int64_t k, int64_t y, int64_t W,
                               A* out, A bias = 0) {
  constexpr int L = kLanes<A>;
  const int64_t pad = k / 2;
  for (int64_t x = 0; x < W; x += 4 * L) {
    Vec<A> sum[4];
    for (auto& s : sum) s = set1<A>(bias);
    for (int m = 0; m < count; ++m) {
      for (int64_t i = 0; i < k; ++i) {
        const A *row = in[m].at(y + i - pad, x - pad), *taps = w + (m * k + i) * k;
        for (int64_t j = 0; j < k; ++j) {
          for (int t = 0; t < 4; ++t) sum[t] += load(row + j + t * L) * taps[j];
        }
      }
    }
    for (int t = 0; t < 4; ++t) {
      const int64_t left = W - x - t * L;
      if (left >= L) {
        store(out + x + t * L, sum[t]);
      } else if (left > 0) {
        store(out + x + t * L, sum[t], Tail{static_cast<int>(left)});
      }
    }
  }
}

// The bias's value, 0 without one.
template <class A>
A value_of(const std::optional<Tensor>& bias) {
  return bias ? *data<A>(weight_as(*bias, kDtype<A>)) : A(0);
}

// Rows [begin, end) of sigmoid(conv(maps) + bias).
template <class A>
void conv_gate(const Framed<A>* maps, const A* w, A bias, int64_t k, int64_t begin, int64_t end, int64_t W,
               A* gate) {
  simd([=]() VF_INLINE {
    for (int64_t y = begin; y < end; ++y) conv_row(maps, 2, w, k, y, W, gate + y * W, bias);
  });
  sigmoid_in_place(gate + begin * W, (end - begin) * W);
}

// The weights rotated by 180 degrees: convolving with them transposes the convolution.
template <class A>
Buffer<A> flipped(const A* w, int64_t k) {
  Buffer<A> out(2 * k * k);
  for (int64_t m = 0; m < 2; ++m) {
    for (int64_t i = 0; i < k * k; ++i) out[m * k * k + i] = w[(m + 1) * k * k - 1 - i];
  }
  return out;
}

// Rows [begin, end) of both maps' gradients. `turned` are the flipped weights.
template <class A>
void conv_input_grad(const Framed<A>& dq, const A* turned, int64_t k, int64_t begin, int64_t end, int64_t W,
                     A* dmean, A* dmax) {
  const Framed<A>* in = &dq;
  simd([=]() VF_INLINE {
    for (int64_t y = begin; y < end; ++y) {
      conv_row(in, 1, turned, k, y, W, dmean + y * W);
      conv_row(in, 1, turned + k * k, k, y, W, dmax + y * W);
    }
  });
}

// The sum of the H x W values whose vectors row(y)(x) returns.
template <class A, class Row>
VF_INLINE inline A sum_of_rows(int64_t H, int64_t W, const Row& row) {
  constexpr int64_t kStretch = kChunk * kLanes<A>;
  const int64_t rows = std::max<int64_t>(1, kStretch / std::max<int64_t>(1, W));  // short rows share a chunk
  Wide<A> total = {};
  for (int64_t y0 = 0; y0 < H; y0 += rows) {
    const int64_t y1 = y0 + rows < H ? y0 + rows : H;
    for (int64_t x0 = 0; x0 < W; x0 += kStretch) {
      const int64_t x1 = x0 + kStretch < W ? x0 + kStretch : W;
      Vec<A> part = set1<A>(0);
      for (int64_t y = y0; y < y1; ++y) {
        const auto values = row(y);
        for (int64_t x = x0; x < x1; x += kLanes<A>) part += values(x);
      }
      total += widen<A>(part);
    }
  }
  return static_cast<A>(sum_wide<A>(total));
}

// dw [2, k, k] of one image: the correlation of the maps with dq.
template <class A>
void conv_weight_grad(const Framed<A>* maps, const Framed<A>& dq, int64_t k, int64_t H, int64_t W,
                      const Workers& workers, A* dw) {
  const Framed<A>* grad = &dq;
  const int64_t pad = k / 2;
  workers.each(2 * k, [=](int64_t begin, int64_t end) {
    simd([=]() VF_INLINE {
      for (int64_t row = begin; row < end; ++row) {  // rows of both kernels
        const int64_t m = row / k, i = row % k;
        for (int64_t j = 0; j < k; ++j) {
          dw[row * k + j] = sum_of_rows<A>(H, W, [&](int64_t y) VF_INLINE {
            const A *g = grad->at(y, 0), *in = maps[m].at(y + i - pad, j - pad);
            return [=](int64_t x) VF_INLINE { return load(g + x) * load(in + x); };
          });
        }
      }
    });
  });
}

// dbias of one image: the sum of dq.
template <class A>
void conv_bias_grad(const Framed<A>& dq, int64_t H, int64_t W, A* dbias) {
  const Framed<A>* grad = &dq;
  simd([=]() VF_INLINE {
    *dbias = sum_of_rows<A>(H, W, [&](int64_t y) VF_INLINE {
      const A* g = grad->at(y, 0);
      return [=](int64_t x) VF_INLINE { return load(g + x); };
    });
  });
}

// The bias's gradient from the images' gradients; empty without a bias.
template <class A>
Tensor bias_grad(const std::optional<Tensor>& bias, int64_t batch, const A* images) {
  Tensor dbias = empty({bias ? 1 : 0}, kDtype<A>);
  if (bias) batch_sum(batch, images, 1, data<A>(dbias));
  return dbias;
}

}  // namespace visattn
