// Attention of one head inside one window, in tiles that stay in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"
#include "simd_lanes.h"
#include "simd_math.h"
#include "tensor.h"
#include "windows.h"

namespace visattn {

constexpr double kApart = -100;  // added to logits across a seam, as Swin does

// sum_k a(i, k) b[k, j] for i < rows and whole vectors of j < cols.
template <class A, class F>
VF_INLINE inline void product(Broadcast<A> a, const A* b, int64_t ldb, int64_t rows, int64_t cols,
                              int64_t depth, const F& f) {
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= cols; j += 2 * kLanes<A>)
    gemm_columns<2, A>(a, b, ldb, depth, rows, j, Full{}, f);
  if (j < cols) gemm_columns<1, A>(a, b, ldb, depth, rows, j, Full{}, f);
}

// out[j, i] = in[i, j]; both sizes are whole vectors.
template <class A>
VF_INLINE inline void transpose_tile(const A* in, int64_t rows, int64_t cols, A* out) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < cols; j += lanes) {
      Vec<A> v[lanes];
      for (int r = 0; r < lanes; ++r) v[r] = load(in + (i + r) * cols + j);
      transpose(v);
      for (int r = 0; r < lanes; ++r) store(out + (j + r) * rows + i, v[r]);
    }
  }
}

template <class T>
struct WindowInputs {
  using A = Acc<T>;
  Windows w;
  A scale;
  Tensor qkv;
  bool biased;
  Buffer<A> bias;   // of queries, keys and values, [3C]
  Buffer<A> table;  // [heads, rows], reversed

  WindowInputs(const Windows& windows, double scale, const Tensor& qkv, const std::optional<Tensor>& bias,
               const Tensor& table)
      : w(windows),
        scale(static_cast<A>(scale)),
        qkv(as_contiguous(qkv)),
        biased(bias.has_value()),
        bias(3 * w.C()),
        table(w.heads * w.table_rows()) {
    if (bias) std::copy_n(data<A>(weight_as(*bias, kDtype<A>)), 3 * w.C(), this->bias.get());
    const Tensor cast = weight_as(table, kDtype<A>);
    const A* from = data<A>(cast);
    const int64_t rows = w.table_rows();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < w.heads; ++h) this->table[h * rows + rows - 1 - r] = from[r * w.heads + h];
    }
  }

  const T* qkv_data() const { return data<const T>(qkv); }
};

// One head of one window at a time. Tiles have whole vectors of tokens and channels, padded with zeros.
template <class T>
class WindowTiles {
  using A = Acc<T>;

 public:
  explicit WindowTiles(const WindowInputs<T>& in, bool backward)
      : in_(in),
        w_(in.w),
        L_(w_.L),
        Lp_(whole_vectors<A>(L_)),
        dp_(whole_vectors<A>(w_.d)),
        q_(Lp_ * dp_),
        k_(Lp_ * dp_),
        v_(Lp_ * dp_),
        kt_(Lp_ * dp_),
        position_(L_ * Lp_),
        p_(L_ * Lp_),
        inverse_(L_),
        whole_(L_),
        g_(backward ? Lp_ * dp_ : 0),
        vt_(backward ? Lp_ * dp_ : 0),
        ds_(backward ? L_ * Lp_ : 0),
        dposition_(backward ? L_ * Lp_ : 0),
        ds_queries_(backward ? L_ : 0),
        ds_keys_(backward ? Lp_ : 0),
        dbias_(backward ? 3 * dp_ : 0),
        token_(L_),
        next_(L_),
        region_(L_),
        next_region_(L_) {}

  // Loads the bias table of a head. Columns without a key get -inf, so that their weight is 0.
  void start(int64_t head) {
    head_ = head;
    const A* table = in_.table.get() + head * w_.table_rows();
    std::fill_n(position_.get(), L_ * Lp_, -std::numeric_limits<A>::infinity());
    w_.each_bias(Lp_, [&](int64_t to, int64_t from, int64_t count) {
      for (int64_t j = 0; j < count; ++j) position_[to + j] = table[from + j];
    });
  }

  void start_gradients() {
    std::fill_n(dposition_.get(), L_ * Lp_, A(0));
    std::fill_n(dbias_.get(), 3 * dp_, A(0));
  }

  void forward(int64_t window, bool last, T* out) {
    enter(window);
    if (!last) fetch(in_.qkv_data(), 3, window + 1);
    const int64_t C = w_.C();
    T* image = out + image_ * w_.H * w_.W * C + head_ * w_.d;
    simd([&]() VF_INLINE {
      weights();
      product<A>(Broadcast<A>{p_.get(), Lp_, 1}, v_.get(), dp_, L_, dp_, L_,
                 [&](int64_t i, int64_t j, Vec<A> sum, Full) VF_INLINE {
                   if (token_[i] >= 0) put(image + token_[i] * C, j, sum * set1(inverse_[i]));
                 });
    });
  }

  void backward(int64_t window, bool last, const T* grad, T* dqkv) {
    enter(window);
    if (!last) fetch(in_.qkv_data(), 3, window + 1), fetch(grad, 1, window + 1);
    const int64_t C = w_.C(), tokens = w_.H * w_.W;
    const T* g = grad + image_ * tokens * C + head_ * w_.d;
    T* image = dqkv + image_ * tokens * 3 * C + head_ * w_.d;
    simd([&]() VF_INLINE {
      for (int64_t i = 0; i < L_; ++i) {
        if (token_[i] >= 0) {
          for_vectors<A>(w_.d, [&](int64_t c, auto lanes) VF_INLINE {
            store(g_.get() + i * dp_ + c, load(g + token_[i] * C + c, lanes));
          });
        } else {
          for (int64_t c = 0; c < dp_; c += kLanes<A>) store(g_.get() + i * dp_ + c, set1(A(0)));
        }
      }
      weights();
      centre_values();
      transpose_tile(v_.get(), Lp_, dp_, vt_.get());
      product<A>(Broadcast<A>{g_.get(), dp_, 1}, vt_.get(), Lp_, L_, Lp_, w_.d,
                 [&](int64_t i, int64_t j, Vec<A> sum, Full)
                     VF_INLINE { store(ds_.get() + i * Lp_ + j, sum); });
      std::fill_n(ds_keys_.get(), Lp_, A(0));
      for (int64_t i = 0; i < L_; ++i) logit_gradients(i);
      const auto sends = [&](int64_t part, A factor) VF_INLINE {
        return [=, this](int64_t i, int64_t j, Vec<A> sum, Full) VF_INLINE {
          if (token_[i] >= 0) put(image + token_[i] * 3 * C + part * C, j, sum * set1(factor));
        };
      };
      const Broadcast<A> ds{ds_.get(), Lp_, 1}, ds_t{ds_.get(), 1, Lp_}, p_t{p_.get(), 1, Lp_};
      product<A>(ds, k_.get(), dp_, L_, dp_, L_, sends(0, in_.scale));
      product<A>(ds_t, q_.get(), dp_, L_, dp_, L_, sends(1, A(1)));
      product<A>(p_t, g_.get(), dp_, L_, dp_, L_, sends(2, A(1)));
      // A bias's gradient is the sum over all tokens and padding: over rows, each as often as it takes part
      // in a product.
      if (!in_.biased) return;
      add_rows(ds_keys_.get(), in_.scale, k_.get(), 0);
      add_rows(ds_queries_.get(), A(1), q_.get(), 1);
      add_rows(whole_.get(), A(1), g_.get(), 2);
    });
  }

  // Writes the gradients of the windows since start_gradients(): of the head's table, reversed, and of its
  // bias, [3, d].
  void finish_gradients(A* dtable, A* dbias) {
    std::fill_n(dtable, w_.table_rows(), A(0));
    w_.each_bias(Lp_, [&](int64_t from, int64_t to, int64_t count) {
      for (int64_t j = 0; j < count; ++j) dtable[to + j] += dposition_[from + j];
    });
    for (int64_t part = 0; part < 3; ++part)
      std::copy_n(dbias_.get() + part * dp_, w_.d, dbias + part * w_.d);
  }

 private:
  // Prefetches the next window while this one is computed: its rows are far apart, and no hardware prefetcher
  // guesses them.
  void fetch(const T* map, int64_t parts, int64_t window) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t C = w_.C(), first = window / w_.per_image() * w_.H * w_.W;
    w_.places(window, next_.data(), next_region_.data());
    for (int64_t i = 0; i < L_; ++i) {
      if (next_[i] < 0) continue;
      const T* row = map + (first + next_[i]) * parts * C + head_ * w_.d;
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t c = 0; c < w_.d; c += kLine) __builtin_prefetch(row + part * C + c, 0, 2);
      }
    }
  }

  void enter(int64_t window) {
    image_ = window / w_.per_image();
    seam_ = w_.has_seam(window);
    w_.places(window, token_.data(), region_.data());
    const int64_t C = w_.C();
    const T* image = in_.qkv_data() + image_ * w_.H * w_.W * 3 * C;
    simd([&]() VF_INLINE {
      A* const tiles[] = {q_.get(), k_.get(), v_.get()};
      for (int64_t i = 0; i < L_; ++i) {
        for (int64_t part = 0; part < 3; ++part) {
          const int64_t c = part * C + head_ * w_.d;
          const A factor = part == 0 ? in_.scale : A(1);
          A* to = tiles[part] + i * dp_;
          take(token_[i] >= 0 ? image + token_[i] * 3 * C + c : nullptr, in_.bias.get() + c, factor, to);
        }
      }
    });
  }

  // A token plus its bias; padding is the bias alone.
  VF_INLINE void take(const T* from, const A* bias, A factor, A* to) const {
    for_vectors<A>(w_.d, [&](int64_t c, auto lanes) VF_INLINE {
      Vec<A> v = load(bias + c, lanes);
      if (from) v += load(from + c, lanes);
      store(to + c, v * set1(factor));
    });
  }

  // Stores the channels of v, the vector at channel c, that the head has.
  VF_INLINE void put(T* row, int64_t c, Vec<A> v) const {
    if (c + kLanes<A> <= w_.d) {
      store(row + c, v);
    } else {
      store(row + c, v, Tail{static_cast<int>(w_.d - c)});
    }
  }

  // p_: exponentials of the logits minus each row's largest; inverse_: one over each row's sum.
  VF_INLINE void weights() {
    transpose_tile(k_.get(), Lp_, dp_, kt_.get());
    product<A>(Broadcast<A>{q_.get(), dp_, 1}, kt_.get(), Lp_, L_, Lp_, w_.d,
               [&](int64_t i, int64_t j, Vec<A> sum, Full) VF_INLINE {
                 const int64_t at = i * Lp_ + j;
                 store(p_.get() + at, sum + load(position_.get() + at));
               });
    for (int64_t i = 0; i < L_; ++i) {
      A* row = p_.get() + i * Lp_;
      if (seam_) {
        for (int64_t j = 0; j < L_; ++j) row[j] += region_[j] != region_[i] ? A(kApart) : A(0);
      }
      Vec<A> most = set1(-std::numeric_limits<A>::infinity()), total = set1(A(0));
      for (int64_t j = 0; j < Lp_; j += kLanes<A>) most = greater(load(row + j), most);
      most = set1<A>(reduce_lanes(most, [](Vec<A> a, Vec<A> b) VF_INLINE { return greater(a, b); }));
      for (int64_t j = 0; j < Lp_; j += kLanes<A>) {
        const Vec<A> e = exp_lanes(load(row + j) - most);
        store(row + j, e);
        total += e;
      }
      const A sum = sum_lanes<A>(total);
      inverse_[i] = 1 / sum;
      whole_[i] = sum * inverse_[i];
    }
  }

  // Subtracts the mean of the values. The gradients of the logits do not depend on it, and would cancel if all
  // values lay far from zero.
  VF_INLINE void centre_values() {
    const Vec<A> share = set1(A(1) / static_cast<A>(L_));
    for (int64_t c = 0; c < dp_; c += kLanes<A>) {
      A* column = v_.get() + c;
      Vec<A> sum = set1(A(0));
      for (int64_t i = 0; i < L_; ++i) sum += load(column + i * dp_);
      Vec<A> mean = sum * share;
      mean = mean - mean == set1(A(0)) ? mean : set1(A(0));  // NaN or infinity stays at its token
      for (int64_t i = 0; i < L_; ++i) store(column + i * dp_, load(column + i * dp_) - mean);
    }
  }

  // ds = p (dp - sum_j dp p), the gradient of a row's logits, and so of its positions. Also sums ds: along
  // the row, where only rounding and NaN remain, and down the columns.
  VF_INLINE void logit_gradients(int64_t i) {
    A *p = p_.get() + i * Lp_, *ds = ds_.get() + i * Lp_, *dposition = dposition_.get() + i * Lp_;
    A* keys = ds_keys_.get();
    const Vec<A> inverse = set1(inverse_[i]);
    Vec<A> dot = set1(A(0));
    for (int64_t j = 0; j < Lp_; j += kLanes<A>) {
      const Vec<A> weight = load(p + j) * inverse;
      store(p + j, weight);
      dot += weight * load(ds + j);
    }
    dot = set1<A>(sum_lanes<A>(dot));
    ds_queries_[i] = dot[0] * (1 - whole_[i]);
    for (int64_t j = 0; j < Lp_; j += kLanes<A>) {
      const Vec<A> d = load(p + j) * (load(ds + j) - dot);
      store(ds + j, d);
      store(dposition + j, load(dposition + j) + d);
      store(keys + j, load(keys + j) + d);
    }
  }

  VF_INLINE void add_rows(const A* weights, A factor, const A* tile, int64_t part) {
    A* to = dbias_.get() + part * dp_;
    for (int64_t i = 0; i < L_; ++i) {
      const Vec<A> weight = set1(weights[i] * factor);
      for (int64_t c = 0; c < dp_; c += kLanes<A>)
        store(to + c, load(to + c) + weight * load(tile + i * dp_ + c));
    }
  }

  const WindowInputs<T>& in_;
  const Windows& w_;
  const int64_t L_, Lp_, dp_;
  Buffer<A> q_, k_, v_, kt_, position_, p_, inverse_, whole_, g_, vt_, ds_, dposition_, ds_queries_, ds_keys_,
      dbias_;
  std::vector<int64_t> token_, next_;
  std::vector<int32_t> region_, next_region_;
  int64_t head_ = 0, image_ = 0;
  bool seam_ = false;
};

}  // namespace visattn
