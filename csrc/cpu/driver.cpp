#include "cpu/driver.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

#include "cpu/collections.h"
#include "cpu/job_rules.h"

namespace mk {
namespace {

enum class Engine { elements, lanes, vectors, matrices };

// Columns up to this long are worth a lane each; longer ones fill registers by themselves.
constexpr int64_t short_column = 32;

bool is_made_of_products(const Job& job) {
  return job.retraction == Retraction::qr && job.geometry->elements() > lane_elements;
}

Engine engine_of(const Job& job) {
  const Geometry& g = *job.geometry;
  switch (job.manifold) {
    case ManifoldCode::euclidean:
      return Engine::elements;
    case ManifoldCode::sphere:
      return g.elements() <= short_vector ? Engine::lanes : Engine::vectors;
    case ManifoldCode::oblique:
      return g.elements() <= short_vector || (g.n <= short_column && g.elements() <= lane_elements) ? Engine::lanes
                                                                                                    : Engine::vectors;
    case ManifoldCode::stiefel:
      return is_made_of_products(job) ? Engine::matrices : Engine::lanes;
    default:
      return Engine::vectors;
  }
}

int64_t vectors_per_component(const Job& job) { return job.manifold == ManifoldCode::oblique ? job.geometry->p : 1; }

// Whether components, or the pieces of one, have to wait for the norm of their group. Without a bound on the step size
// nothing depends on it but a caller who asks.
bool is_shared(const Job& job) {
  // A matrix that is a group of its own is stepped at once, as an individual one.
  const bool individual = job.individual || (job.count == 1 && engine_of(job) == Engine::matrices);
  return job.rule == Rule::fg_sgd && (job.bounded || job.norms) && (!individual || job.in_pieces());
}

// Elements of a piece of work: its boundaries, and so the order of every sum, depend on nothing else.
constexpr int64_t chunk_elements = 1 << 14;
// Groups up to here are stepped by one thread in one piece, both passes, while they are in its cache.
constexpr int64_t small_group_elements = 1 << 15;
// Work below this is not worth waking threads for.
constexpr int64_t serial_elements = 1 << 14;
// Larger matrices are stepped one after the other, by all threads together.
constexpr int64_t team_elements = 1 << 15;

struct Task {
  int job;
  int64_t begin, end;
  bool first_of_two;  // a piece of a large group, which needs the sum of all pieces for its second pass
  int64_t cost;
  bool by_team;
};

struct Work {
  Engine engine;
  std::vector<VectorState> states;
  std::vector<uint8_t> skipped;
  std::unique_ptr<char[]> kept;
  double square = 0, step = 0;
  int64_t nonfinite = 0;
  bool settled = false;
};

// From what the first pass over a shared group has found to the step of the second, and R.
void settle(const Job& job, Work& w) {
  w.settled = true;
  const bool through = job.manifold == ManifoldCode::euclidean && !job.bounded;  // NaN and Inf are written, as in torch
  if (job.in_pieces() && w.nonfinite) {
    w.nonfinite = 1;
    w.square = 0;
  }
  w.step = step_size_of<double>(job)(w.square);
  if (job.norms) *job.norms = w.nonfinite && (through || job.individual) ? std::nan("") : std::sqrt(w.square);
  if (through) w.nonfinite = 0;
}

// The pieces of one matrix on as many threads.
void run_team(int size, void (*f)(const void*, int), const void* context) {
  at::parallel_for(0, size, 1, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; piece++) f(context, int(piece));
  });
}

// f(task, number, team, scratch): tasks in near-equal shares of cost, one share a thread; then those that all threads
// share, one by one.
template <class F>
void in_parallel(const std::vector<Task>& tasks, size_t scratch_bytes, const F& f) {
  if (tasks.empty()) return;
  std::vector<int64_t> cost_before(tasks.size() + 1, 0);
  for (size_t i = 0; i < tasks.size(); i++)
    cost_before[i + 1] = cost_before[i] + (tasks[i].by_team ? 0 : tasks[i].cost);
  const int64_t total = cost_before.back();
  const int64_t shares = total <= serial_elements ? 1 : std::min<int64_t>(at::get_num_threads(), int64_t(tasks.size()));
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
    const auto begin = std::lower_bound(cost_before.begin(), cost_before.end(), total * from / shares);
    const auto end = std::lower_bound(cost_before.begin(), cost_before.end(), total * to / shares);
    const size_t last = to == shares ? tasks.size() : size_t(end - cost_before.begin());
    for (size_t i = size_t(begin - cost_before.begin()); i < last; i++)
      if (!tasks[i].by_team) f(tasks[i], i, Team{1, nullptr}, scratch.get());
  });
  std::unique_ptr<char[]> scratch;
  for (size_t i = 0; i < tasks.size(); i++) {
    if (!tasks[i].by_team) continue;
    if (!scratch) scratch.reset(new char[scratch_bytes]);
    f(tasks[i], i, Team{at::get_num_threads(), run_team}, scratch.get());
  }
}

}  // namespace

const char* instruction_set() {
  static const std::string name = [] {
#if defined(__x86_64__)
    const std::string torch_uses = at::get_cpu_capability();
    if (torch_uses == "AVX512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return "avx512";
    if (torch_uses == "AVX512" || torch_uses == "AVX2") return "avx2";
#endif
    return "baseline";
  }();
  return name.c_str();
}

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = instruction_set() == std::string("avx512") ? kernels_avx512
                                 : instruction_set() == std::string("avx2") ? kernels_avx2
                                                                            : kernels_baseline;
  return chosen;
#else
  return kernels_baseline;
#endif
}

bool has_kernel(const Job& job) {
  return job.manifold != ManifoldCode::stiefel || job.geometry->elements() <= lane_elements || is_made_of_products(job);
}

std::vector<int64_t> run(const std::vector<Job>& jobs, const PlanTensors& plan) {
  const Kernels& k = kernels();
  std::vector<Work> work(jobs.size());
  std::vector<Task> tasks, second_tasks;
  tasks.reserve(jobs.size());
  size_t scratch_bytes = 0;

  std::vector<int64_t> nonfinite(jobs.size(), 0);
  const std::vector<int> rest = step_collections(jobs, nonfinite, plan);
  for (const int j : rest) {
    const Job& job = jobs[j];
    Work& w = work[j];
    w.engine = engine_of(job);
    const int64_t elements = job.geometry->elements();
    const int64_t units = job.in_pieces() ? elements : job.count;  // what a chunk is counted in
    const int64_t unit_elements = job.in_pieces() ? 1 : elements;
    // A multiple of every register's lanes, so that only the last chunk has a partial block.
    int64_t chunk = (chunk_elements / std::max<int64_t>(unit_elements, 1) + 15) / 16 * 16;
    if (w.engine == Engine::vectors) {
      chunk = std::max<int64_t>(1, chunk_elements / elements);
      const bool columns = job.manifold == ManifoldCode::oblique;
      const int64_t numbers = columns ? column_scratch * job.geometry->n : vector_scratch * elements;
      const size_t number = job.storage == Storage::float64 ? sizeof(double) : sizeof(float);
      scratch_bytes = std::max(scratch_bytes, size_t(numbers) * number);
      if (job.rule == Rule::fg_sgd) w.states.resize(size_t(job.count * vectors_per_component(job)));
    }
    const bool shared = is_shared(job), by_team = w.engine == Engine::matrices && elements > team_elements;
    int64_t unit_cost = unit_elements;
    if (w.engine == Engine::matrices) {
      const int64_t n = job.geometry->n, p = job.geometry->p;
      const size_t number = job.storage == Storage::float64 ? sizeof(double) : sizeof(float);
      const size_t offsets = size_t(2 * (n + p)) * sizeof(int64_t);
      scratch_bytes = std::max(scratch_bytes, size_t(matrix_scratch(n, p)) * number + offsets);
      if (shared) w.kept.reset(new char[size_t(job.count * kept_matrix(n, p)) * number]);
      unit_cost = elements * (1 + p / 16);
      chunk = by_team ? job.count : std::max<int64_t>(1, chunk_elements / elements);
    }
    if (shared && w.engine != Engine::vectors) w.skipped.resize(size_t(job.count));
    const bool in_one = shared && units * unit_cost <= small_group_elements;
    for (int64_t begin = 0; begin < units; begin += chunk) {
      const int64_t end = in_one ? units : std::min(units, begin + chunk);
      const Task task{j, begin, end, shared && !in_one, (end - begin) * unit_cost, by_team};
      tasks.push_back(task);
      if (task.first_of_two) second_tasks.push_back(task);
      if (in_one) break;
    }
  }

  const auto first = [&](const Task& t, Partial* out, Team team, char* scratch) {
    Work& w = work[t.job];
    if (w.engine == Engine::elements) k.elements_first(jobs[t.job], t.begin, t.end, out, w.skipped.data());
    if (w.engine == Engine::lanes) k.lanes_first(jobs[t.job], t.begin, t.end, out, w.skipped.data());
    if (w.engine == Engine::vectors) k.vectors_first(jobs[t.job], t.begin, t.end, out, w.states.data(), scratch);
    if (w.engine == Engine::matrices)
      k.matrices_first(jobs[t.job], t.begin, t.end, out, w.skipped.data(), w.kept.get(), team, scratch);
  };
  const auto second = [&](const Task& t, Team team, char* scratch) {
    Work& w = work[t.job];
    const uint8_t* skipped = w.nonfinite ? w.skipped.data() : nullptr;
    if (w.engine == Engine::elements && !(jobs[t.job].in_pieces() && w.nonfinite))
      k.elements_second(jobs[t.job], t.begin, t.end, w.step, skipped);
    if (w.engine == Engine::lanes) k.lanes_second(jobs[t.job], t.begin, t.end, w.step, skipped);
    if (w.engine == Engine::vectors) k.vectors_second(jobs[t.job], t.begin, t.end, w.step, w.states.data(), scratch);
    if (w.engine == Engine::matrices)
      k.matrices_second(jobs[t.job], t.begin, t.end, w.step, w.skipped.data(), w.kept.get(), team, scratch);
  };

  std::vector<Partial> partials(tasks.size(), Partial{0, 0});
  in_parallel(tasks, scratch_bytes, [&](const Task& t, size_t i, Team team, char* scratch) {
    const Job& job = jobs[t.job];
    Work& w = work[t.job];
    if (t.first_of_two) {
      first(t, &partials[i], team, scratch);
    } else if (is_shared(job) && w.engine == Engine::lanes && k.lanes_group(job, &partials[i])) {
      w.square = partials[i].square;
      settle(job, w);
    } else if (is_shared(job)) {
      first(t, &partials[i], team, scratch);
      w.square = partials[i].square;
      w.nonfinite = partials[i].nonfinite;
      settle(job, w);
      second(t, team, scratch);
    } else if (w.engine == Engine::elements) {
      k.elements_whole(job, t.begin, t.end, &partials[i]);
    } else if (w.engine == Engine::lanes) {
      k.lanes_whole(job, t.begin, t.end, &partials[i]);
    } else if (w.engine == Engine::matrices) {
      k.matrices_whole(job, t.begin, t.end, &partials[i], team, scratch);
    } else {
      k.vectors_whole(job, t.begin, t.end, &partials[i], w.states.data(), scratch);
    }
  });

  // In the order of the chunks, whatever thread had them.
  for (size_t i = 0; i < tasks.size(); i++) {
    Work& w = work[tasks[i].job];
    if (w.settled) continue;
    w.square += partials[i].square;
    w.nonfinite += partials[i].nonfinite;
  }
  for (const int j : rest) {
    if (is_shared(jobs[j]) && !work[j].settled) settle(jobs[j], work[j]);
    nonfinite[j] = work[j].nonfinite;
  }
  in_parallel(second_tasks, scratch_bytes,
              [&](const Task& t, size_t, Team team, char* scratch) { second(t, team, scratch); });
  return nonfinite;
}

}  // namespace mk
