// How many threads a kernel may use. Python sets it to torch.get_num_threads().
#pragma once

#include <cstdint>

namespace inlay {

void set_num_threads(int threads);
int num_threads();
// Threads worth waking for `work` elementary steps in `pieces` independent pieces.
int threads_for(int64_t pieces, int64_t work);
bool built_with_openmp();

}  // namespace inlay
