// The threads of one block as fibers of one CPU thread, each run until it has to wait.
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "host/sm90_shim.h"

namespace sorted_kernels::sm90 {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  // Products of this thread, a group a commit; the last group is open.
  std::deque<std::vector<std::function<void()>>> products =
      std::deque<std::vector<std::function<void()>>>(1);
};

struct Meeting {
  int arrived = 0, round = 0;
};

struct Block {
  int index, count, current = 0;
  int64_t progress = 0;
  std::mt19937_64 random;
  char* shared;
  const std::function<void()>* body;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<std::function<void()>> copies;
  Meeting meetings[16], warps[64];
};

thread_local Block* block = nullptr;

void start_fiber() {
  (*block->body)();
  Fiber& self = block->fibers[block->current];
  self.done = true;
  ++block->progress;
  swapcontext(&self.context, &block->scheduler);
}

void meet(Meeting& meeting, int threads) {
  const int round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
    ++block->progress;
  }
  wait_until([&] { return meeting.round != round; });
}

// Lets some of the copies under way land; one at least, if nothing else moves.
void land_copies(bool stuck) {
  std::shuffle(block->copies.begin(), block->copies.end(), block->random);
  size_t landing = block->random() % (block->copies.size() + 1);
  landing = std::max(landing, size_t(stuck));
  for (size_t i = 0; i < landing; ++i) {
    block->copies.back()();
    block->copies.pop_back();
    ++block->progress;
  }
}

}  // namespace

int thread_index() { return block->current; }
int block_index() { return block->index; }
int block_count() { return block->count; }
char* shared_memory() { return block->shared; }

void wait_until(const std::function<bool()>& ready) {
  while (!ready()) {
    swapcontext(&block->fibers[block->current].context, &block->scheduler);
  }
  ++block->progress;
}

void named_sync(int id, int threads) { meet(block->meetings[id], threads); }
void copy_later(std::function<void()> copy) { block->copies.push_back(std::move(copy)); }

void multiply_later(std::function<void()> product) {
  block->fibers[block->current].products.back().push_back(std::move(product));
}

void close_products() { block->fibers[block->current].products.emplace_back(); }

// A warp's threads go on together, as the instruction is the warp's.
void finish_products(int pending) {
  auto& products = block->fibers[block->current].products;
  while (int(products.size()) > pending + 1) {
    for (const auto& product : products.front()) product();
    products.pop_front();
  }
  meet(block->warps[block->current / 32], 32);
}

void run_block(int index, int count, int threads, int shared_bytes, uint64_t seed,
               const std::function<void()>& body) {
  const std::unique_ptr<char[]> memory(new char[shared_bytes + 1024]);
  Block state;
  state.index = index;
  state.count = count;
  state.random.seed(seed);
  state.shared = memory.get() + (1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024);
  state.body = &body;
  std::memset(state.shared, 0xff, shared_bytes);
  state.fibers = std::vector<Fiber>(threads);
  block = &state;
  for (Fiber& fiber : state.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
  }
  int living = threads;
  while (living > 0) {
    const int64_t before = state.progress;
    living = 0;
    for (state.current = 0; state.current < threads; ++state.current) {
      Fiber& fiber = state.fibers[state.current];
      if (fiber.done) continue;
      swapcontext(&state.scheduler, &fiber.context);
      living += !fiber.done;
    }
    const bool stuck = state.progress == before;
    if (stuck && state.copies.empty() && living > 0) {
      block = nullptr;
      throw std::runtime_error(std::to_string(living) + " threads wait for ever");
    }
    land_copies(stuck && !state.copies.empty());
  }
  block = nullptr;
  if (!state.copies.empty()) {
    throw std::runtime_error("a copy was started and never waited for");
  }
}

}  // namespace sorted_kernels::sm90
