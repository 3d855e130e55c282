// Sum, maximum and argmax of some elements. NaN wins a maximum, and the first of equal values does, so that
// the order of merging does not matter.
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

// Stat i of `count`, stored as three vectors.
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

// The maximum, ignoring NaN. Statistics locate it only up to its pack (or row). If the sum is NaN, an element
// may be: then the elements are scanned again.
template <int V>
VF_DEVICE float most_of(const float (&v)[V]) {
  float most = v[0];
  VF_UNROLL
  for (int j = 1; j < V; ++j) most = fmaxf(most, v[j]);
  return most;
}

// The maximum of a pack and the first index that has it; element 0 has the index `first`.
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
