// In front of torch's header of this name in a build for ThreadSanitizer, which does not see the barriers of an OpenMP
// library that was built without it: at::parallel_for on threads that it knows, with the cut of torch's.
#pragma once

#define parallel_for parallel_for_of_torch
#include_next <ATen/Parallel.h>
#undef parallel_for

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

namespace at {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  // A bug for the sanitizer to find: every thread takes the first piece of its neighbour, too.
  static const int64_t overlap = std::getenv("MK_SEEDED_RACE") ? 1 : 0;
  const int64_t most = std::max<int64_t>(1, (end - begin) / std::max<int64_t>(1, grain));
  const int64_t count = std::min<int64_t>(get_num_threads(), most);
  const int64_t length = (end - begin + count - 1) / count;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += length)
    threads.emplace_back([&f, from, to = std::min(end, from + length + overlap)] { f(from, to); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
