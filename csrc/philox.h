// Philox4x32-7, random numbers that are a function of a counter and a key (Salmon, Moraes, Dror & Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words of 32 bits a call. Seven rounds are the
// fewest that pass BigCrush there (its table 2); ten are the paper's default, with a margin that rounding
// does not need.
//
// For the CPU's kernels and CUDA's: constexpr functions, which nvcc takes for device code as well
// (--expt-relaxed-constexpr), in a namespace without a name, so that no two instruction sets' copies are ever
// merged (csrc/tensor.h).
#pragma once

#include <cstdint>

namespace inlay {

namespace {

constexpr int kPhiloxRounds = 7;
constexpr int kHalves = 8;  // random numbers of 16 bits that a call gives

struct PhiloxWords {
  uint32_t x, y, z, w;

  // Number i of 16 bits, 0 ≤ i < kHalves, the lower half of a word first. Selects, not an array: an index
  // that is known at run time only would put it into a GPU thread's local memory.
  constexpr uint32_t half(int i) const {
    const uint32_t word = i < 4 ? (i < 2 ? x : y) : (i < 6 ? z : w);
    return word >> (i % 2 * 16) & 0xffff;
  }
};

// The counter is `low`, `high`: 128 bits. The multipliers, and the golden ratio and √3 − 1 that the key grows
// by, are the paper's.
constexpr PhiloxWords philox(uint64_t low, uint64_t high, uint64_t key) {
  PhiloxWords c = {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
  uint32_t key_x = uint32_t(key), key_z = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t from_x = uint64_t(0xd2511f53u) * c.x, from_z = uint64_t(0xcd9e8d57u) * c.z;
    c = {uint32_t(from_z >> 32) ^ c.y ^ key_x, uint32_t(from_z), uint32_t(from_x >> 32) ^ c.w ^ key_z,
         uint32_t(from_x)};
    key_x += 0x9e3779b9u, key_z += 0xbb67ae85u;
  }
  return c;
}

}  // namespace
}  // namespace inlay
