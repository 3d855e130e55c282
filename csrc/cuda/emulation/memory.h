// Memory that records who wrote and who read each two bytes, and pointers into it that check every access: it
// lies inside the bounds, reads something written, and a barrier separates it from other threads' accesses.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../portable.h"
#include "fibers.h"

namespace visattn::cuda::emulation {

struct Touch {
  Fiber* by = nullptr;
  Epochs at;
};

struct Cell {
  bool written = false;
  int stage = -1;    // of the copy that wrote it last, if one did
  int64_t copy = 0;  // its number
  Touch writer, reader;
};

struct Region {
  std::string name;
  char* data;
  int64_t bytes;
  bool once = false;           // every element must be written exactly once
  bool shared = false;         // memory of a block
  const bool* gone = nullptr;  // true once that block has ended
  int64_t stage_begin = 0, stage_bytes = 0, stages = 0;
  std::vector<Cell> cells;
  int64_t read = 0, written = 0;

  Region(std::string called, void* at, int64_t size, bool filled, bool written_once = false)
      : name(std::move(called)),
        data(static_cast<char*>(at)),
        bytes(size),
        once(written_once),
        cells((size + 1) / 2) {
    for (Cell& c : cells) c.written = filled;
  }

  int stage_of(int64_t offset) const {
    const int64_t s = stage_bytes ? (offset - stage_begin) / stage_bytes : -1;
    return offset >= stage_begin && s >= 0 && s < stages ? static_cast<int>(s) : -1;
  }
};

inline bool ordered(const Touch& before, const Fiber& now) {
  if (!before.by || before.by == &now) return true;
  const Fiber& f = *before.by;
  if (f.team != now.team) return now.epochs.grid > before.at.grid;
  if (f.rank != now.rank) return now.epochs.team > before.at.team;
  if (f.thread / kWarp != now.thread / kWarp) return now.epochs.block > before.at.block;
  return now.epochs.warp > before.at.warp;
}

// Records an access and its faults. Returns true if it lies inside the region.
inline bool touch(Region* r, int64_t offset, int64_t size, bool write, int copy_stage = -1,
                  int64_t copy = 0) {
  Scheduler& s = *Scheduler::active;
  Fiber& f = *s.current;
  const auto where = [&] { return " of " + (r ? r->name : "null") + " at byte " + std::to_string(offset); };
  if (!r || offset < 0 || offset + size > r->bytes) return s.fault("out of bounds" + where()), false;
  if (size >= 2 && reinterpret_cast<uintptr_t>(r->data + offset) % size)
    s.fault("misaligned access" + where());
  if (r->gone && *r->gone) s.fault("access to the memory of a block that has ended" + where());
  (write ? r->written : r->read) += size;
  if (const int stage = r->shared ? r->stage_of(offset) : -1; stage >= 0 && copy_stage < 0)
    f.touched[stage] = true;
  for (int64_t i = offset / 2; i < (offset + size + 1) / 2; ++i) {
    Cell& c = r->cells[i];
    if (c.copy && copy_stage < 0 && f.seen[c.stage] != c.copy) {
      s.fault("access to a copy that was not waited for" + where());
    }
    // The wait for a copy orders what it has written.
    if (!c.copy && !ordered(c.writer, f))
      s.fault(std::string(write ? "write" : "read") + " races with a write" + where());
    if (write) {
      if (!ordered(c.reader, f)) s.fault("write races with a read" + where());
      if (r->once && c.written) s.fault("second write" + where());
      c.written = true;
      c.writer = {&f, f.epochs};
      c.stage = copy_stage, c.copy = copy;
    } else {
      if (!c.written) s.fault("read before it is written" + where());
      c.reader = {&f, f.epochs};
    }
  }
  return true;
}

template <class T>
struct Checked {
  Region* region = nullptr;
  int64_t offset = 0;  // bytes

  Checked() = default;
  Checked(Region* r, int64_t at = 0) : region(r), offset(at) {}
  template <class U>
    requires std::is_same_v<const U, T>
  Checked(const Checked<U>& p) : region(p.region), offset(p.offset) {}
  Checked operator+(int64_t i) const { return {region, offset + i * static_cast<int64_t>(sizeof(T))}; }
  explicit operator bool() const { return region != nullptr; }
};

struct CheckedMemory {
  template <class T>
  using Global = Checked<T>;
};

template <int V, class T>
Pack<std::remove_const_t<T>, V> get_pack(const Checked<T>& p, int64_t i) {
  Pack<std::remove_const_t<T>, V> pack = {};
  const int64_t at = p.offset + i * static_cast<int64_t>(sizeof(T));
  if (touch(p.region, at, sizeof(pack), false)) memcpy(&pack, p.region->data + at, sizeof(pack));
  return pack;
}

template <class T, int V>
void put_pack(const Checked<T>& p, int64_t i, const Pack<T, V>& pack) {
  const int64_t at = p.offset + i * static_cast<int64_t>(sizeof(T));
  if (touch(p.region, at, sizeof(pack), true)) memcpy(p.region->data + at, &pack, sizeof(pack));
}

template <bool kStreaming, class T, int V>
void put_map(const Checked<T>& p, int64_t i, const Pack<T, V>& pack) {
  put_pack(p, i, pack);
}

template <int V, class T>
Pack<std::remove_const_t<T>, V> get_map(const Checked<T>& p, int64_t i) {
  return get_pack<V>(p, i);
}

template <class T>
std::remove_const_t<T> get(const Checked<T>& p, int64_t i) {
  return get_pack<1>(p, i).v[0];
}

template <class T>
void put(const Checked<T>& p, int64_t i, std::type_identity_t<T> value) {
  put_pack(p, i, Pack<T, 1>{{value}});
}

inline Checked<const float> cast_floats(const Checked<const int>& p) { return {p.region, p.offset}; }

template <class U>
Checked<const U> cast(const Checked<const char>& p) {
  return {p.region, p.offset};
}

}  // namespace visattn::cuda::emulation
