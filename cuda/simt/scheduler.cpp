// Fibers and rendezvous of the host emulation.
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/simt.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace inlay {
namespace simt {

namespace {

constexpr size_t kStack = 128 << 10;

enum class State { runnable, at_barrier, at_collective, done };

// A place to continue at. A fiber is entered once through ucontext; after that plain builds switch with
// setjmp, which asks the kernel nothing (swapcontext makes two system calls). AddressSanitizer follows
// swapcontext only.
struct Place {
  ucontext_t context;
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf jump;
#endif
};

struct Copy {
  Copied* to;
  const Copied* from;  // null: zeros
  int group;
};

struct Thread {
  Place place;
  char* stack = nullptr;
  bool entered = false;
  dim3 index;
  State state = State::runnable;
  const char* waits_in = nullptr;  // name of the collective
  unsigned mask = 0;
  Complete complete = nullptr;
  Lane lane;
  std::vector<Copy> copies;  // under way
  int group = 0;             // the one that the next copy belongs to
};

struct Block {
  const char* kernel;
  void (*body)(void*);
  void* arguments;
  std::vector<Thread> threads;
  std::map<int, std::vector<unsigned char>> arrays;
  std::vector<unsigned char> dynamic;
  Place scheduler;
  Thread* now = nullptr;
};

Block* block = nullptr;  // the one that runs
Order order = Order::forward;
std::mt19937_64 random_bits;

std::string name_of(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

template <class T>
void arrange(std::vector<T>& items) {
  if (order == Order::reverse) std::reverse(items.begin(), items.end());
  if (order == Order::random) std::shuffle(items.begin(), items.end(), random_bits);
}

// -- switching ---------------------------------------------------------------------------------------------

// Stacks are kept from launch to launch: a launch may need 128 MB of them.
std::vector<std::unique_ptr<char[]>> stacks;

char* stack_of(size_t thread) {
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

// AddressSanitizer has to be told which stack is in use.
void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                   [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}

const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;

void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &size);
  if (from_scheduler) scheduler_bottom = bottom, scheduler_size = size;
#endif
}

void leave(Place& here, Place& there, [[maybe_unused]] bool entered) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&here.context, &there.context);
#else
  if (_setjmp(here.jump)) return;
  if (entered) _longjmp(there.jump, 1);
  setcontext(&there.context);
#endif
}

void yield(State state) {
  Thread* mine = block->now;
  mine->state = state;
  void* fake = nullptr;
  before_switch(state == State::done ? nullptr : &fake, scheduler_bottom, scheduler_size);
  leave(mine->place, block->scheduler, true);
  after_switch(fake, true);
}

void enter() {
  after_switch(nullptr, true);
  block->body(block->arguments);
  yield(State::done);
}

void resume(Thread& thread) {
  block->now = &thread;
  threadIdx = thread.index;
  void* fake = nullptr;
  before_switch(&fake, thread.stack, kStack);
  const bool entered = thread.entered;
  thread.entered = true;
  leave(block->scheduler, thread.place, entered);
  after_switch(fake, false);
}

void start(Thread& thread) {
  ucontext_t& context = thread.place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack, kStack);  // the last thread on this stack never returned
#endif
  thread.state = State::runnable;
  thread.entered = false;
  thread.copies.clear();
  thread.group = 0;
  makecontext(&context, enter, 0);
}

// -- rendezvous
// ---------------------------------------------------------------------------------------------------------

[[noreturn]] void stuck(const Thread& waits, const std::string& where, const Thread& missing) {
  std::string what;
  if (missing.state == State::done) what = "has returned";
  if (missing.state == State::at_barrier) what = "waits in __syncthreads";
  if (missing.state == State::at_collective) what = std::string("waits in ") + missing.waits_in;
  throw std::runtime_error(std::string("simt: ") + block->kernel + ": block " + name_of(blockIdx) +
                           ": thread " + name_of(waits.index) + " waits in " + where + " for thread " +
                           name_of(missing.index) + ", which " + what);
}

bool release_barrier() {
  for (Thread& thread : block->threads)
    if (thread.state != State::at_barrier) return false;
  for (Thread& thread : block->threads) thread.state = State::runnable;
  return true;
}

// The first lane that keeps the collective of `thread` from completing, or -1.
int missing_lane(const Thread* warp, size_t lanes, const Thread& thread) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    if (size_t(lane) >= lanes) continue;  // a mask may name lanes that a short last warp does not have
    const Thread& other = warp[lane];
    if (other.state != State::at_collective || other.complete != thread.complete || other.mask != thread.mask)
      return lane;
  }
  return -1;
}

bool release_collectives() {
  bool any = false;
  for (size_t first = 0; first < block->threads.size(); first += kWarp) {
    Thread* warp = &block->threads[first];
    const size_t lanes = std::min<size_t>(kWarp, block->threads.size() - first);
    for (size_t i = 0; i < lanes; ++i) {
      if (warp[i].state != State::at_collective || missing_lane(warp, lanes, warp[i]) >= 0) continue;
      const unsigned mask = warp[i].mask;
      Lane brought[kWarp];
      for (size_t lane = 0; lane < lanes; ++lane)
        if (mask >> lane & 1) brought[lane] = warp[lane].lane, brought[lane].here = true;
      warp[i].complete(brought, mask);
      for (size_t lane = 0; lane < lanes; ++lane)
        if (mask >> lane & 1) warp[lane].lane = brought[lane], warp[lane].state = State::runnable;
      any = true;
    }
  }
  return any;
}

void explain_why_stuck() {
  for (size_t i = 0; i < block->threads.size(); ++i) {
    const Thread& thread = block->threads[i];
    const size_t first = i / kWarp * kWarp, lanes = std::min<size_t>(kWarp, block->threads.size() - first);
    if (thread.state == State::at_collective) {
      if (!(thread.mask >> (i - first) & 1))
        stuck(thread, std::string(thread.waits_in) + " outside its own mask", thread);
      const int lane = missing_lane(&block->threads[first], lanes, thread);
      if (lane >= 0) stuck(thread, thread.waits_in, block->threads[first + size_t(lane)]);
    }
    if (thread.state == State::at_barrier)
      for (const Thread& other : block->threads)
        if (other.state == State::done) stuck(thread, "__syncthreads", other);
  }
  throw std::logic_error("simt: threads wait, yet nothing keeps them: a bug of the emulation");
}

void run_block() {
  for (Thread& thread : block->threads) start(thread);
  for (;;) {
    std::vector<Thread*> runnable;
    bool all_done = true;
    for (Thread& thread : block->threads) {
      if (thread.state == State::runnable) runnable.push_back(&thread);
      all_done = all_done && thread.state == State::done;
    }
    if (all_done) return;
    if (runnable.empty()) {
      if (!release_barrier() && !release_collectives()) explain_why_stuck();
      continue;
    }
    arrange(runnable);
    for (Thread* thread : runnable) resume(*thread);
  }
}

std::vector<dim3> indices(dim3 extent) {
  std::vector<dim3> result;
  for (unsigned z = 0; z < extent.z; ++z)
    for (unsigned y = 0; y < extent.y; ++y)
      for (unsigned x = 0; x < extent.x; ++x) result.emplace_back(x, y, z);
  return result;
}

}  // namespace

void set_order(Order order_, uint64_t seed) {
  order = order_;
  random_bits.seed(seed);
}

void run(const char* kernel, dim3 grid, dim3 extent, size_t dynamic_shared, void (*body)(void*),
         void* arguments) {
  const std::vector<dim3> threads = indices(extent);
  if (threads.empty() || threads.size() > 1024)
    throw std::runtime_error(std::string("simt: ") + kernel + ": wanted 1 to 1024 threads a block, got " +
                             std::to_string(threads.size()));
  Block running;
  running.kernel = kernel, running.body = body, running.arguments = arguments;
  running.threads = std::vector<Thread>(threads.size());
  for (size_t i = 0; i < threads.size(); ++i) {
    running.threads[i].index = threads[i];
    running.threads[i].stack = stack_of(i);
  }
  block = &running;
  blockDim = extent, gridDim = grid;
  std::vector<dim3> blocks = indices(grid);
  arrange(blocks);
  for (dim3 index : blocks) {
    blockIdx = index;
    running.dynamic.assign(dynamic_shared, 0xff);
    for (auto& array : running.arrays) std::fill(array.second.begin(), array.second.end(), 0xff);
    run_block();
  }
  block = nullptr;
}

void* shared(int key, size_t bytes) {
  auto& array = block->arrays[key];
  if (array.empty()) array.assign(bytes, 0xff);
  return array.data();
}

void* dynamic_shared() { return block->dynamic.data(); }

void barrier() { yield(State::at_barrier); }

void collective(const char* name, unsigned mask, Complete complete, const void* in, size_t in_bytes,
                void* out, size_t out_bytes) {
  Thread* mine = block->now;
  mine->waits_in = name, mine->mask = mask, mine->complete = complete;
  memcpy(mine->lane.in, in, in_bytes);
  memset(mine->lane.out, 0xff, kExchange);
  yield(State::at_collective);
  memcpy(out, mine->lane.out, out_bytes);
}

static void land(const Copy& copy) { *copy.to = copy.from ? *copy.from : Copied{}; }

void start_copy(Copied* to, const Copied* from) {
  Thread* mine = block->now;
  const Copy copy = {to, from, mine->group};
  if (order == Order::reverse || (order == Order::random && random_bits() % 2)) return land(copy);
  mine->copies.push_back(copy);
}

void commit_copies() { ++block->now->group; }

void wait_for_copies(int groups) {
  Thread* mine = block->now;
  std::vector<Copy> later;
  for (const Copy& copy : mine->copies)
    if (copy.group < mine->group - groups) {
      land(copy);
    } else {
      later.push_back(copy);
    }
  mine->copies = later;
}

unsigned vote(const char* name, unsigned mask, bool predicate) {
  unsigned result = 0;
  collective(
      name, mask,
      [](Lane* lanes, unsigned) {
        unsigned votes = 0;
        for (int lane = 0; lane < kWarp; ++lane)
          votes |= unsigned(lanes[lane].here && lanes[lane].in[0]) << lane;
        for (int lane = 0; lane < kWarp; ++lane)
          if (lanes[lane].here) memcpy(lanes[lane].out, &votes, sizeof votes);
      },
      &predicate, 1, &result, sizeof result);
  return result;
}

}  // namespace simt
}  // namespace inlay
