// The 8-bit dynamic map of optimizer states (Dettmers et al., 2022, arXiv:2110.02861), as numbers a kernel
// computes codes with. Constants only: this header is included for every instruction set and for CUDA.
//
// The positive levels lie in seven decades. Decade i, (10^(i-7), 10^(i-6)], is cut into lowest·2^i equal
// intervals with a level in the middle of each; 0 and 1 are levels, too. The signed map has lowest = 1 and
// the negative of every level but 1; the unsigned one has lowest = 2. Either way that is 256 levels, and a
// code is a level's place in their order.
#pragma once

namespace inlay {

constexpr int kDecades = 7;

struct DynamicMap {
  float lowest;           // intervals of decade 0
  float above[kDecades];  // midpoint between the last level of the decade before and the first of this one
  float scale[kDecades];  // intervals per unit
  float shift[kDecades];  // x·scale − shift, rounded to an integer, is the interval that x is in
  float one;              // midpoint between the last level and 1
  float count;            // positive levels below 1
};

constexpr double dynamic_level(double top, double intervals, double interval) {
  return top * (0.1 + 0.9 * (interval + 0.5) / intervals);
}

constexpr DynamicMap make_dynamic_map(double lowest) {
  DynamicMap map = {};
  map.lowest = float(lowest);
  double top = 1e-6, intervals = lowest, last = 0;
  for (int i = 0; i < kDecades; ++i) {
    map.above[i] = float((last + dynamic_level(top, intervals, 0)) / 2);
    map.scale[i] = float(intervals / (0.9 * top));
    map.shift[i] = float(intervals / 9 + 0.5);
    map.count += float(intervals);
    last = dynamic_level(top, intervals, intervals - 1);
    top *= 10;
    intervals *= 2;
  }
  map.one = float((last + 1) / 2);
  return map;
}

constexpr DynamicMap kSignedMap = make_dynamic_map(1);
constexpr DynamicMap kUnsignedMap = make_dynamic_map(2);

constexpr int kStateBlock = 256;         // states that share an absmax
constexpr int kZeroCode = 127;           // of 0 in the signed map; in the unsigned one it is 0
constexpr float kLeastScale = 1.2e-38f;  // a smaller absmax has no finite reciprocal: its block is zeros

}  // namespace inlay
