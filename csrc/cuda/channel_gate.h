// From the means of an image's channels to their gates, and back: squeeze and excitation (two products,
// spread over the team's blocks) and ECA (a window along the channels).
#pragma once

#include "reduce.h"

namespace visattn::cuda {

template <class Memory>
struct GateWeights {
  Weight<Memory> w1, b1, w2, b2;  // SE: [R, C], [R] or null, [C, R], [C] or null. ECA: w1 is [window]
  int window;                     // 0: SE
  int hidden_activation, gate_activation;
};

// The block's own floats, and those that its team reads; of alternate images, so that a block that is ahead
// does not overwrite what another has yet to read.
template <class Exec>
struct Floats {
  using Shared = typename Exec::template Shared<float>;
  using Exchange = typename Exec::Exchange;
  Shared partial, mean, hidden, gate;
  Exchange sums, mean_part, hidden_part, gate_part;

  VF_DEVICE Floats(Exec& ex, const Geometry& g, const Scratch& s, int turn)
      : partial(ex.template shared<float>(kHeader + g.slab_bytes())),
        mean(partial + s.mean),
        hidden(partial + s.hidden),
        gate(partial + s.gate),
        sums(ex.exchange(partial + s.own, s.shared, turn & 1)),
        mean_part(sums + s.mean_part),
        hidden_part(sums + s.hidden_part),
        gate_part(sums + s.gate_part) {}
};

// The channels whose means this block sums up and whose gates it computes.
struct Part {
  int begin, end;
  VF_DEVICE Part(int rank, int each, int total) : begin(rank * each), end(begin + each) {
    if (end > total) end = total;
    if (begin > end) begin = end;
  }
};

// finish(c, sum of values over the pixels of channel c) for the channels of the block's part. values(offset,
// out) sees every element of the slab once; kUnroll packs are under way at a time.
template <int V, int kUnroll, bool kNhwc, class Exec, class Values, class Finish>
VF_DEVICE void channel_sums(Exec& ex, const Geometry& g, const Floats<Exec>& f, int count,
                            const Values& values, const Finish& finish) {
  const Part part(ex.rank(), g.channels, g.C);
  if constexpr (kNhwc) {
    const int groups = column_sums<V, kUnroll>(ex, count / g.cols, g.cols, f.partial, values);
    for (int c = ex.thread(); c < g.C; c += ex.threads()) put(f.sums, c, down(f.partial, groups, g.cols, c));
    ex.sync_team();
    for (int c = part.begin + ex.thread(); c < part.end; c += ex.threads()) {
      float total = get(ex.peer(f.sums, 0), c);
      for (int r = 1; r < ex.team_size(); ++r) total += get(ex.peer(f.sums, r), c);
      finish(c, total);
    }
  } else {
    const int parts = row_sums<V, kUnroll>(ex, count / g.cols, g.cols, f.partial, values);
    for (int c = part.begin + ex.thread(); c < part.end; c += ex.threads()) {
      float total = get(f.partial, (c - part.begin) * parts);
      for (int k = 1; k < parts; ++k) total += get(f.partial, (c - part.begin) * parts + k);
      finish(c, total);
    }
  }
}

// Of ECA: sum over the window of w[j] v[c + (j - window / 2) * direction].
template <class Memory, class Vector>
VF_DEVICE float windowed(const Weight<Memory>& w, int window, Vector v, int channels, int c, int direction) {
  float total = 0;
#pragma unroll 1
  for (int j = 0; j < window; ++j) {
    const int from = c + (j - window / 2) * direction;
    if (from >= 0 && from < channels) total += get(w, j) * get(v, from);
  }
  return total;
}

// f.hidden_part of every block -> f.gate: of all channels in nhwc, else of the block's own.
template <bool kNhwc, class Exec, class Weights, class KeepGate>
VF_DEVICE void excite_forward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                              const KeepGate& keep_gate) {
  const Part part(ex.rank(), g.channels, g.C);
  ex.sync_team();
  gather(ex, f.hidden_part, g.hidden, g.R, f.hidden);
  product(ex, w.w2, part.begin, part.end, g.R, f.hidden, [&](int c, float sum) {
    const float gate = gate_of(w.b2.p ? sum + get(w.b2, c) : sum, w.gate_activation);
    keep_gate(c, gate);
    if constexpr (kNhwc) {
      put(f.gate_part, c - part.begin, gate);
    } else {
      put(f.gate, c, gate);
    }
  });
  if constexpr (kNhwc) {
    ex.sync_team();
    gather(ex, f.gate_part, g.channels, g.C, f.gate);
  } else {
    ex.sync_block();
  }
}

// f.mean_part of every block -> f.gate: of all channels in nhwc, else of the block's own. keep_hidden(r,
// value) and keep_gate(c, value) see the block's part.
template <bool kNhwc, class Exec, class Weights, class KeepHidden, class KeepGate>
VF_DEVICE void gate_forward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                            const KeepHidden& keep_hidden, const KeepGate& keep_gate) {
  const Part part(ex.rank(), g.channels, g.C);
  ex.sync_team();
  gather(ex, f.mean_part, g.channels, g.C, f.mean);
  if (w.window) {
    const int begin = kNhwc ? 0 : part.begin, end = kNhwc ? g.C : part.end;
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) {
      const float gate = sigmoid(windowed(w.w1, w.window, f.mean, g.C, c, 1));
      put(f.gate, c, gate);
      if (c >= part.begin && c < part.end) keep_gate(c, gate);
    }
    ex.sync_block();
    return;
  }
  const Part units(ex.rank(), g.hidden, g.R);
  product(ex, w.w1, units.begin, units.end, g.C, f.mean, [&](int r, float sum) {
    const float z = w.b1.p ? sum + get(w.b1, r) : sum;
    const float kept = w.hidden_activation == kRelu ? activate(z, kRelu) : z;
    keep_hidden(r, kept);
    put(f.hidden_part, r - units.begin,
        w.hidden_activation == kRelu ? kept : activate(z, w.hidden_activation));
  });
  excite_forward<kNhwc>(ex, g, f, w, keep_gate);
}

// The gradients before the gate's activation in f.mean_part of every block -> f.mean: dmean / P of all
// channels in nhwc, else of the block's own. hidden_of(r) is what forward kept, keep(r, dz) sees the block's
// hidden units.
template <bool kNhwc, class Exec, class Weights, class HiddenOf, class Keep>
VF_DEVICE void gate_backward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                             const HiddenOf& hidden_of, const Keep& keep) {
  const Part part(ex.rank(), g.channels, g.C);
  const float area = static_cast<float>(g.P);
  ex.sync_team();
  gather(ex, f.mean_part, g.channels, g.C, f.mean);  // dz of all channels
  if (w.window) {
    const int begin = kNhwc ? 0 : part.begin, end = kNhwc ? g.C : part.end;
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) {
      put(f.partial, c - begin, windowed(w.w1, w.window, f.mean, g.C, c, -1) / area);
    }
    ex.sync_block();
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) put(f.mean, c, get(f.partial, c - begin));
    ex.sync_block();
    return;
  }
  const Part units(ex.rank(), g.hidden, g.R);
  product_transposed(ex, w.w2, units.begin, units.end, g.C, g.R, f.mean, f.partial, [&](int r, float sum) {
    const float dh = activate_grad(sum, hidden_of(r), w.hidden_activation);
    keep(r, dh);
    put(f.hidden_part, r - units.begin, dh);
  });
  ex.sync_team();
  gather(ex, f.hidden_part, g.hidden, g.R, f.hidden);
  product_transposed(ex, w.w1, part.begin, part.end, g.R, g.C, f.hidden, f.partial, [&](int c, float sum) {
    if constexpr (kNhwc) {
      put(f.gate_part, c - part.begin, sum / area);
    } else {
      put(f.mean, c, sum / area);
    }
  });
  if constexpr (kNhwc) {
    ex.sync_team();
    gather(ex, f.gate_part, g.channels, g.C, f.mean);
  } else {
    ex.sync_block();
  }
}

}  // namespace visattn::cuda
