// Attention inside (shifted) windows: each head of each window in tiles that stay in cache. Shift, partition,
// biases, seams and padding are addresses. The backward pass computes the attention weights again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "parallel.h"
#include "simd.h"
#include "tensor.h"
#include "window_tiles.h"
#include "windows.h"

namespace visattn {
namespace {

Windows windows_of(const Tensor& qkv, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
                   int64_t shift_w, int64_t pad_first) {
  const int64_t H = qkv.size(1), W = qkv.size(2);
  return {qkv.size(0),
          H,
          W,
          heads,
          qkv.size(3) / 3 / heads,
          WindowAxis(H, window_h, shift_h, pad_first != 0),
          WindowAxis(W, window_w, shift_w, pad_first != 0),
          window_h * window_w};
}

// Calls f(run, head, tiles) for all items, in parallel.
template <class T, class F>
void each_item(const WindowInputs<T>& in, const WindowRuns& runs, bool backward, const F& f) {
  parallel_for(0, runs.count * in.w.heads, 1, [&](int64_t begin, int64_t end) {
    WindowTiles<T> tiles(in, backward);
    for (int64_t item = begin; item < end; ++item) {
      tiles.start(item % in.w.heads);
      f(item / in.w.heads, item % in.w.heads, tiles);
    }
  });
}

Tensor window_attention_fwd(Tensor qkv, std::optional<Tensor> bias, Tensor table, int64_t heads,
                            int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w,
                            double scale, int64_t pad_first) {
  return dispatch(qkv, [&](auto type) {
    using T = decltype(type);
    const WindowInputs<T> in(windows_of(qkv, heads, window_h, window_w, shift_h, shift_w, pad_first), scale,
                             qkv, bias, table);
    const Windows& w = in.w;
    Tensor out = empty({w.N, w.H, w.W, w.C()}, qkv.scalar_type());
    const WindowRuns runs(w);
    each_item<T>(in, runs, false, [&](int64_t run, int64_t, WindowTiles<T>& tiles) {
      for (int64_t i = runs.begin(run); i < runs.end(run); ++i)
        tiles.forward(i, i + 1 == runs.end(run), data<T>(out));
    });
    return out;
  });
}

// Sums parts [runs, size] over the runs, in order.
template <class A>
void sum_runs(const Buffer<A>& parts, int64_t runs, int64_t size, A* sum) {
  std::fill_n(sum, size, A(0));
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t c = 0; c < size; ++c) sum[c] += parts.get()[r * size + c];
  }
}

std::tuple<Tensor, Tensor, Tensor> window_attention_bwd(Tensor grad, Tensor qkv, std::optional<Tensor> bias,
                                                        Tensor table, int64_t heads, int64_t window_h,
                                                        int64_t window_w, int64_t shift_h, int64_t shift_w,
                                                        double scale, int64_t pad_first) {
  return dispatch(qkv, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const WindowInputs<T> in(windows_of(qkv, heads, window_h, window_w, shift_h, shift_w, pad_first), scale,
                             qkv, bias, table);
    const Windows& w = in.w;
    const Tensor g = as_contiguous(grad);
    Tensor dqkv = empty({w.N, w.H, w.W, 3 * w.C()}, qkv.scalar_type());
    Tensor dbias = empty({3 * w.C()}, kDtype<A>), dtable = empty({w.table_rows(), heads}, kDtype<A>);
    const WindowRuns runs(w);
    const int64_t rows = w.table_rows(), of_bias = 3 * w.d;
    Buffer<A> table_parts(runs.count * heads * rows), bias_parts(runs.count * heads * of_bias);
    each_item<T>(in, runs, true, [&](int64_t run, int64_t head, WindowTiles<T>& tiles) {
      tiles.start_gradients();
      for (int64_t i = runs.begin(run); i < runs.end(run); ++i) {
        tiles.backward(i, i + 1 == runs.end(run), data<const T>(g), data<T>(dqkv));
      }
      const int64_t item = run * heads + head;
      tiles.finish_gradients(table_parts.get() + item * rows, bias_parts.get() + item * of_bias);
    });
    Buffer<A> table_sum(heads * rows), bias_sum(heads * of_bias);
    sum_runs(table_parts, runs.count, heads * rows, table_sum.get());
    sum_runs(bias_parts, runs.count, heads * of_bias, bias_sum.get());
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) data<A>(dtable)[r * heads + h] = table_sum[h * rows + rows - 1 - r];
      for (int64_t part = 0; part < 3; ++part) {
        std::copy_n(bias_sum.get() + h * of_bias + part * w.d, w.d, data<A>(dbias) + part * w.C() + h * w.d);
      }
    }
    return std::make_tuple(dqkv, dbias, dtable);
  });
}

}  // namespace
}  // namespace visattn

STABLE_TORCH_LIBRARY_IMPL(visattn_fast, CPU, m) {
  visattn::implement<visattn::window_attention_fwd>(m, "window_attention_fwd");
  visattn::implement<visattn::window_attention_bwd>(m, "window_attention_bwd");
}
