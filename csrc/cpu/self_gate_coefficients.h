// The coefficients of gates that each element computes from itself and from its channel, and the sums of
// their gradients: see self_gate.h.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace visattn {

template <class A>
struct Coefficients {
  A m, k, b;
};

// The sums of r d^(p-1) and of r d^p over a channel's values in a group, where r is the gradient before the
// sigmoid. Chunks are added up in double: an error of a sum shifts all of dx, and accumulates in the layers
// before.
template <class A>
struct Sums {
  A lower, upper;
};

template <class A>
Sums<A> rounded(const Sums<double>& s) {
  return {static_cast<A>(s.lower), static_cast<A>(s.upper)};
}

// dx = g sigmoid + r p k d^(p-1) + u d + v; with another map the first term is dz.
template <class A>
struct Line {
  A u, v;
};

// The coefficients and lines of a run of channels, a padded array for each.
template <class A>
class SelfGate {
 public:
  explicit SelfGate(int64_t channels) : stride_((channels + 15) / 16 * 16), values_(5 * stride_) {}
  A* m() { return at(0); }
  A* k() { return at(1); }
  A* b() { return at(2); }
  A* u() { return at(3); }
  A* v() { return at(4); }
  void set(int64_t c, Coefficients<A> of) { m()[c] = of.m, k()[c] = of.k, b()[c] = of.b; }
  void set(int64_t c, Line<A> line) { u()[c] = line.u, v()[c] = line.v; }

 private:
  A* at(int64_t i) { return values_.get() + i * stride_; }
  int64_t stride_;
  Buffer<A> values_;
};

template <class A>
struct GateArrays {
  const A *m, *k, *b, *u, *v;
};

template <class A>
GateArrays<A> arrays(SelfGate<A>& gate) {
  return {gate.m(), gate.k(), gate.b(), gate.u(), gate.v()};
}

}  // namespace visattn
