// From the means of an image's channels to their gates, and back: squeeze and excitation (two products,
// spread over the team's blocks) and ECA (a window along the channels).
#pragma once

#include "../common/activations.h"
#include "../common/geometry.h"
#include "../common/scratch.h"
#include "gate_math.h"
#include "portable.h"
#include "reduce.h"
#include "team.h"

namespace visattn::cuda {

template <class Memory>
struct GateWeights {
  Weight<Memory> w1, b1, w2, b2;  // SE: [R, C], [R] or null, [C, R], [C] or null. ECA: w1 is [window]
  int window;                     // 0: SE
  int hidden_activation, gate_activation;
};

// The block's own floats, and the exchange, which its team reads. Alternate images have alternate exchanges,
// so that a block that is ahead does not overwrite what another one has yet to read.
template <class Exec>
struct Floats {
  using Shared = typename Exec::template Shared<float>;
  using Exchange = typename Exec::Exchange;
  Shared own, partial, mean, hidden, gate;
  Exchange exchange, sums, mean_part, hidden_part, gate_part;

  VF_DEVICE Floats(Exec& ex, const Geometry& g, const Scratch& s, int turn)
      : own(ex.template shared<float>(kHeader + g.slab_bytes())),
        partial(own + s.partial),
        mean(own + s.mean),
        hidden(own + s.hidden),
        gate(own + s.gate),
        exchange(ex.exchange(own + (s.own - s.overlap), s.shared, turn & 1)),
        sums(exchange + s.sums),
        mean_part(exchange + s.mean_part),
        hidden_part(exchange + s.hidden_part),
        gate_part(exchange + s.gate_part) {}
};

// The block's part of `total` items: the channels whose means it sums and whose gates it computes, or hidden
// units, pixels.
struct Part : Span {
  VF_DEVICE Part(int rank, int each, int total) : Span{rank * each, rank * each + each} {
    if (end > total) end = total;
    if (begin > end) begin = end;
  }
  VF_DEVICE bool has(int i) const { return i >= begin && i < end; }
};

// Calls finish(c, sum of values over the pixels of channel c) for the channels of the block's part.
// values(data, offset, out) sees every element of the slab once, with data = begin(channel). kUnroll packs
// are in flight at a time.
template <int V, int kUnroll, bool kNhwc, class Exec, class Begin, class Values, class Finish>
VF_DEVICE void channel_sums(Exec& ex, const Geometry& g, const Floats<Exec>& f, int count, const Begin& begin,
                            const Values& values, const Finish& finish) {
  const Part part(ex.rank(), g.channels, g.C);
  const int first = kNhwc ? 0 : part.begin;
  const Partials p = line_sums<V, kUnroll, kNhwc>(
      ex, count / g.cols, g.cols, f.partial, [&](int line) { return begin(first + line); }, values);
  if constexpr (kNhwc) {
    for (int c = ex.thread(); c < g.C; c += ex.threads()) put(f.sums, c, sum_of(f.partial, p, c));
    ex.sync_team();
    for (int c = part.begin + ex.thread(); c < part.end; c += ex.threads())
      finish(c, over_team(ex, f.sums, c));
  } else {
    for (int c = part.begin + ex.thread(); c < part.end; c += ex.threads())
      finish(c, sum_of(f.partial, p, (c - part.begin) * p.count));
  }
}

// ECA's sum over the window of w[j] v[c + (j - window / 2) * direction].
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

// f.hidden_part of every block, its channels' shares of the hidden units [branches, R] -> f.gate: of all
// channels in nhwc, else of the block's own. hidden_of(r) sums a unit over the team and activates it.
template <bool kNhwc, class Exec, class Weights, class HiddenOf, class KeepGate>
VF_DEVICE void excite_forward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                              const HiddenOf& hidden_of, const KeepGate& keep_gate) {
  const Part part(ex.rank(), g.channels, g.C);
  const bool all = kNhwc && g.computes_all();
  ex.sync_team();
  for (int r = ex.thread(); r < g.R; r += ex.threads()) put(f.hidden, r, hidden_of(r));
  ex.sync_block();
  product(ex, w.w2, all ? Span{0, g.C} : Span{part}, {0, g.R}, g.R, f.hidden, [&](int c, float sum) {
    const float gate = gate_of(w.b2.p ? sum + get(w.b2, c) : sum, w.gate_activation);
    if (part.has(c)) keep_gate(c, gate);
    if (!all) put(f.gate_part, c - part.begin, gate);
    if (!kNhwc || all) put(f.gate, c, gate);
  });
  if (kNhwc && !all) {
    ex.sync_team();
    gather(ex, f.gate_part, g.channels, g.C, f.gate);
  } else {
    ex.sync_block();
  }
}

// The means of the block's channels, in f.mean and for ECA in f.mean_part -> f.gate: of all channels in nhwc,
// else of the block's own. keep_hidden(r, value) and keep_gate(c, value) receive the block's part.
template <bool kNhwc, class Exec, class Weights, class KeepHidden, class KeepGate>
VF_DEVICE void gate_forward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                            const KeepHidden& keep_hidden, const KeepGate& keep_gate) {
  const Part part(ex.rank(), g.channels, g.C);
  if (w.window) {
    ex.sync_team();
    gather(ex, f.mean_part, g.channels, g.C, f.mean);
    const int begin = kNhwc ? 0 : part.begin, end = kNhwc ? g.C : part.end;
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) {
      const float gate = sigmoid(windowed(w.w1, w.window, f.mean, g.C, c, 1));
      put(f.gate, c, gate);
      if (part.has(c)) keep_gate(c, gate);
    }
    ex.sync_block();
    return;
  }
  ex.sync_block();
  product(ex, w.w1, {0, g.R}, part, g.C, f.mean, [&](int r, float sum) { put(f.hidden_part, r, sum); });
  const Part units(ex.rank(), g.hidden, g.R);
  excite_forward<kNhwc>(
      ex, g, f, w,
      [&](int r) {
        const float sum = over_team(ex, f.hidden_part, r), z = w.b1.p ? sum + get(w.b1, r) : sum;
        const float hidden = activate(z, w.hidden_activation);
        if (units.has(r)) keep_hidden(r, w.hidden_activation == kRelu ? hidden : z);
        return hidden;
      },
      keep_gate);
}

// dz of the block's channels, the gradients before the gate's activation, in f.mean -> finish(c, sums [B]),
// the gradients of the pooled values: of all channels in nhwc if every block computes them, else of the
// block's own. There are B branches. hidden_grad(r, sum, out [B]) computes the hidden units' gradients,
// before their activation.
template <int B, bool kNhwc, class Exec, class Weights, class HiddenGrad, class Finish>
VF_DEVICE void squeeze_backward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                                const HiddenGrad& hidden_grad, const Finish& finish) {
  const Part part(ex.rank(), g.channels, g.C);
  ex.sync_block();
  product_transposed<1>(ex, w.w2, {0, g.R}, part, g.R, f.mean, 0, f.partial,
                        [&](int r, const float (&sum)[1]) { put(f.hidden_part, r, sum[0]); });
  ex.sync_team();
  for (int r = ex.thread(); r < g.R; r += ex.threads()) {
    float d[B];
    hidden_grad(r, over_team(ex, f.hidden_part, r), d);
    VF_UNROLL
    for (int b = 0; b < B; ++b) put(f.hidden, b * g.R + r, d[b]);
  }
  ex.sync_block();
  product_transposed<B>(ex, w.w1, kNhwc && g.computes_all() ? Span{0, g.C} : Span{part}, {0, g.R}, g.C,
                        f.hidden, g.R, f.partial, finish);
}

// dz of the block's channels, in f.mean and for ECA in f.mean_part -> f.mean, dmean / P: of all channels in
// nhwc, else of the block's own. hidden_of(r) is what forward kept; keep(r, dz) receives the block's hidden
// units.
template <bool kNhwc, class Exec, class Weights, class HiddenOf, class Keep>
VF_DEVICE void gate_backward(Exec& ex, const Geometry& g, const Floats<Exec>& f, const Weights& w,
                             const HiddenOf& hidden_of, const Keep& keep) {
  const Part part(ex.rank(), g.channels, g.C), units(ex.rank(), g.hidden, g.R);
  const float area = static_cast<float>(g.P);
  if (w.window) {
    ex.sync_team();
    gather(ex, f.mean_part, g.channels, g.C, f.mean);  // dz of all channels
    const int begin = kNhwc ? 0 : part.begin, end = kNhwc ? g.C : part.end;
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) {
      put(f.partial, c - begin, windowed(w.w1, w.window, f.mean, g.C, c, -1) / area);
    }
    ex.sync_block();
    for (int c = begin + ex.thread(); c < end; c += ex.threads()) put(f.mean, c, get(f.partial, c - begin));
    ex.sync_block();
    return;
  }
  const bool spread = kNhwc && !g.computes_all();
  squeeze_backward<1, kNhwc>(
      ex, g, f, w,
      [&](int r, float sum, float (&d)[1]) {
        d[0] = activate_grad(sum, hidden_of(r), w.hidden_activation);
        if (units.has(r)) keep(r, d[0]);
      },
      [&](int c, const float (&sum)[1]) {
        if (spread) {
          put(f.gate_part, c - part.begin, sum[0] / area);
        } else {
          put(f.mean, c, sum[0] / area);
        }
      });
  if (spread) {
    ex.sync_team();
    gather(ex, f.gate_part, g.channels, g.C, f.mean);
  } else {
    ex.sync_block();
  }
}

}  // namespace visattn::cuda
