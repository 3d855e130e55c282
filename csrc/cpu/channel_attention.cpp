// CBAM's channel attention: sigmoid(f(mean) + f(max)), f = w2 relu(w1 .), over the pixels of every channel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "channel_pool.h"
#include "elementwise.h"
#include "image_matrix.h"
#include "mlp.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace visattn {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_attention_fwd(Tensor x, Tensor w1, Tensor w2) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const FeatureMap map = feature_map(x);
    const Mlp<A> mlp(w1, w2, s.C);
    Tensor gate = empty({s.N, s.C, 1, 1}, x.scalar_type()), pooled = empty({s.N, 2, s.C}, kDtype<A>),
           argmax = empty({s.N, s.C}, ScalarType::Int), hidden = empty({s.N, 2, mlp.R}, kDtype<A>);
    T* out = data<T>(gate);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      ChannelPool<T, true> pool(s, map.nhwc);
      Buffer<A> row(s.C);
      for (int64_t n = begin; n < end; ++n) {
        A* mean = data<A>(pooled) + 2 * n * s.C;
        pool.run(matrix(map.image<T>(n), s, map.nhwc, map.ld), workers, mean, mean + s.C,
                 data<int32_t>(argmax) + n * s.C);
        mlp.gate_of_two(mean, data<A>(hidden) + 2 * n * mlp.R, row.get());
        std::copy_n(row.get(), s.C, out + n * s.C);
      }
    });
    return std::make_tuple(gate, pooled, argmax, hidden);
  });
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2,
                                                         Tensor gate, Tensor pooled, Tensor argmax_hw,
                                                         Tensor hidden) {
  return dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const Shape s = shape_of(x);
    const bool nhwc = is_nhwc(x);
    const Mlp<A> mlp(w1, w2, s.C);
    const Tensor g = as_contiguous(grad);
    const T *pg = data<T>(g), *sg = data<T>(gate);
    Tensor dx = empty_map(s, nhwc, x.scalar_type());
    Buffer<A> dz(s.N * s.C), dh(2 * s.N * mlp.R);
    for_images(s.N, s.C * s.P, [&](int64_t begin, int64_t end, const Workers& workers) {
      Buffer<A> dpooled(2 * s.C);
      const Split parts = row_parts<T>(s, nhwc);
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = n * s.C; i < (n + 1) * s.C; ++i) {
          const A value = sg[i];
          dz[i] = static_cast<A>(pg[i]) * value * (1 - value);
        }
        mlp.grad_of_two(&dz[n * s.C], data<A>(hidden) + 2 * n * mlp.R, &dh[2 * n * mlp.R], dpooled.get());
        A *dmean = dpooled.get(), *dmax = dmean + s.C;
        for (int64_t c = 0; c < s.C; ++c) dmean[c] /= static_cast<A>(s.P);
        const auto out = matrix(data<T>(dx) + n * s.C * s.P, s, nhwc, nhwc ? s.C : s.P);
        workers.each(parts.count, [&](int64_t b, int64_t e) {
          const int64_t r0 = parts.begin(b), r1 = parts.end(e - 1);
          if (nhwc) {
            fill<T, false>(rows_of(out, r0, r1), dmean);
          } else {
            fill<T, true>(rows_of(out, r0, r1), dmean + r0);
          }
        });
        const int32_t* at = data<int32_t>(argmax_hw) + n * s.C;
        for (int64_t c = 0; c < s.C; ++c) *element(out, nhwc, c, at[c]) = static_cast<T>(dmean[c] + dmax[c]);
      }
    });
    Tensor dw1 = empty_grad(w1, kDtype<A>), dw2 = empty_grad(w2, kDtype<A>);
    weight_grad_of_two<A>(mlp, s.N, dz.get(), dh.get(), data<A>(pooled), data<A>(hidden), data<A>(dw1),
                          data<A>(dw2));
    return std::make_tuple(dx, gradient_of(w1, dw1), gradient_of(w2, dw2));
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::channel_attention_fwd>(m, "channel_attention_fwd");
  visattn::implement<visattn::channel_attention_bwd>(m, "channel_attention_bwd");
}
