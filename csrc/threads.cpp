#include "threads.h"

#include <algorithm>
#include <atomic>

namespace inlay {

namespace {
std::atomic<int> threads_allowed{1};
// Waking a team costs 2-5 us; a thread should have at least that much to do.
constexpr int64_t kStepsPerThread = 16384;
}  // namespace

void set_num_threads(int threads) { threads_allowed = std::max(1, threads); }

int num_threads() { return threads_allowed; }

int threads_for(int64_t pieces, int64_t work) {
  const int64_t worth = std::min(pieces, work / kStepsPerThread);
  return int(std::max<int64_t>(1, std::min<int64_t>(worth, num_threads())));
}

bool built_with_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace inlay
