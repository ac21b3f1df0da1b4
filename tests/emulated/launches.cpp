// Launches: what CUDA refuses, and what a graph holds of them.
#include <utility>

#include "block.h"

namespace emulator {

size_t shared_memory = 227 << 10;

namespace {

constexpr size_t unasked = 48 << 10;

size_t asked;
std::vector<int64_t> counts;
bool captures;
std::vector<std::function<void()>> graph;

}  // namespace

void launch(unsigned blocks, unsigned count, size_t shared, std::function<void()> body) {
  current = nullptr;
  if (blocks < 1) fail("wanted at least one block", 0);
  if (count < 1 || count > 1024) fail("wanted 1 to 1024 threads in a block", 0);
  const size_t limit = std::exchange(asked, 0) >= shared ? shared_memory : unasked;
  const auto run = [=] { run_blocks(blocks, count, shared, limit, body); };
  if (captures) {
    graph.push_back(run);
  } else {
    counts.push_back(blocks);
    run();
  }
}

void ask_for_shared(size_t bytes) { asked = bytes; }

std::vector<int64_t> launched() { return std::exchange(counts, {}); }

void set_capturing(bool wanted) {
  if (wanted) graph.clear();
  captures = wanted;
}

bool is_capturing() { return captures; }

void replay() {
  for (const auto& run : graph) run();
}

}  // namespace emulator
