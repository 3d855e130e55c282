// Sum, maximum and its index, over the rows and down the columns of an image. NaN wins a maximum, and of
// equal values the first does, so that no order of merging matters.
#pragma once

#include <cmath>
#include <cstring>

#include "portable.h"

namespace visattn::cuda {

struct Stat {
  float sum = 0;
  Peak peak;

  VF_DEVICE void merge(const Stat& other) {
    sum += other.sum;
    if (beats(other.peak, peak)) peak = other.peak;
  }
};

VF_DEVICE float bits_of(int i) {
  float f;
  memcpy(&f, &i, sizeof(f));
  return f;
}
VF_DEVICE int index_of(float f) {
  int i;
  memcpy(&i, &f, sizeof(i));
  return i;
}

// Stat i of `count`, kept as three vectors.
template <class Memory>
VF_DEVICE void put_stat(Memory m, int count, int i, const Stat& s) {
  put(m, i, s.sum);
  put(m, count + i, s.peak.value);
  put(m, 2 * count + i, bits_of(s.peak.at));
}
template <class Memory>
VF_DEVICE Stat get_stat(Memory m, int count, int i) {
  Stat s;
  s.sum = get(m, i);
  s.peak = {get(m, count + i), index_of(get(m, 2 * count + i))};
  return s;
}

// A maximum that NaN has no part in, whose place is that of the first pack, or row, that has it. A sum is NaN
// where any element is (and may be where none is): then the elements are gone through again.
template <int V>
VF_DEVICE float most_of(const float (&v)[V]) {
  float most = v[0];
  VF_UNROLL
  for (int j = 1; j < V; ++j) most = fmaxf(most, v[j]);
  return most;
}

// The first of a pack's elements that beats all others of it; the first one is number `first`.
template <int V>
VF_DEVICE Peak peak_of(const float (&v)[V], int first) {
  Peak peak;
  VF_UNROLL
  for (int j = 0; j < V; ++j) {
    const Peak other{v[j], first + j};
    if (beats(other, peak)) peak = other;
  }
  return peak;
}

}  // namespace visattn::cuda
