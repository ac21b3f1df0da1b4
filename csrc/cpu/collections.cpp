#include "cpu/collections.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/driver.h"
#include "cpu/job_rules.h"

namespace mk {
namespace {

// Weights up to here are stepped by one thread each.
constexpr int64_t small_elements = 1 << 16;
// A thread's least share of a weight in the second sweep, in blocks.
constexpr int64_t least_blocks = 64;

// 3 x 3 kernels in float32, one after the other: what the sweeps know.
bool is_collectable(const Job& job) {
  const Geometry& g = *job.geometry;
  const bool usual = job.manifold == ManifoldCode::euclidean ||
                     (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr) ||
                     ((job.manifold == ManifoldCode::sphere || job.manifold == ManifoldCode::oblique) &&
                      job.retraction == Retraction::projection);
  return job.listed && !job.individual && job.rule == Rule::fg_sgd && usual && job.scale_stride == 0 &&
         job.storage == Storage::float32 && g.n == 3 && g.p == 3 && g.batch_dims == 1 && g.weight_stride[0] == 9 &&
         g.grad_stride[0] == 9 && job.weight_in_order && job.grad_in_order &&
         !(job.momentum && job.hyper.nesterov != 0);
}

// Whether one stands for the other in what the sweeps take from a job. The scale of Euclidean kernels is 1.
bool agree(const Job& a, const Job& b) {
  return a.hyper.momentum == b.hyper.momentum && a.hyper.dampening == b.hyper.dampening &&
         a.hyper.weight_decay == b.hyper.weight_decay && (a.manifold != b.manifold || a.scales[0] == b.scales[0]);
}

// Jobs of one weight that list each of its kernels once.
class Collected {
  const std::vector<Job>& jobs;
  const int begin, size;
  std::vector<int64_t>& nonfinite;
  const std::shared_ptr<const Numbering> numbering;

  struct Kernel {
    int number;     // of its job, in the order of the numbering
    int64_t k;      // in the job
    bool observed;  // whether it has its momentum and its part in the group's norm
  };

  int index(int number) const { return begin + numbering->order[number]; }
  const Job& job(int number) const { return jobs[index(number)]; }

  // f(kernel) for those that the sweeps left.
  void each_left(const std::vector<uint32_t>& left, const std::function<void(const Kernel&)>& f) const {
    const int64_t lanes = kernels().collection_lanes, count = jobs[begin].geometry->count;
    const std::vector<int32_t>& first = numbering->first;
    for (int64_t b = 0; b < int64_t(left.size()); b++) {
      if (!left[b]) continue;
      for (int64_t c = b * lanes; c < std::min((b + 1) * lanes, count); c++) {
        const int64_t place = kernels().collection_place(c), lane = place - b * lanes;
        const bool observed = left[b] >> (lane + Collection::most_lanes) & 1;
        if (!observed && !(left[b] >> lane & 1)) continue;
        const int number =
            int(std::upper_bound(first.begin(), first.end(), numbering->group[place]) - first.begin()) - 1;
        const int64_t* const listed = job(number).listed;
        f({number, std::lower_bound(listed, listed + job(number).count, c) - listed, observed});
      }
    }
  }

  // Whether kernels wait for the norm of their group.
  static bool waits(const Job& job) { return job.bounded || job.norms; }
  // NaN and Inf are written, as in torch.
  static bool is_plain(const Job& job) { return job.manifold == ManifoldCode::euclidean && !job.bounded; }

 public:
  Collected(const std::vector<Job>& jobs, int begin, int end, std::vector<int64_t>& nonfinite, const PlanTensors& plan)
      : jobs(jobs),
        begin(begin),
        size(end - begin),
        nonfinite(nonfinite),
        numbering(numbering_of(jobs, begin, end, plan)) {}

  int64_t elements() const { return jobs[begin].geometry->count * 9; }

  bool fits() const {
    if (!numbering->fits) return false;
    for (int i = 1; i < size; i++)
      if (!agree(job(i), job(i - 1)) || !agree(job(i), job(0))) return false;
    return true;
  }

  void run() const {
    const Kernels& k = kernels();
    const int64_t blocks = int64_t(numbering->group.size()) / k.collection_lanes;
    const int64_t chunks = (blocks + Collection::chunk - 1) / Collection::chunk;
    const size_t groups = size_t(numbering->end[Collection::manifolds - 1]) + 1;
    std::vector<double> square(size_t(chunks) * groups, 0);
    std::vector<float> step(groups, 0);
    std::vector<uint32_t> left(size_t(blocks), 0);
    Collection collection{&jobs[begin],
                          jobs[begin].geometry->count,
                          numbering->group.data(),
                          {},
                          int32_t(groups),
                          {1, 1, 1, 1},
                          square.data(),
                          step.data(),
                          left.data()};
    std::copy_n(numbering->end, Collection::manifolds, collection.end);
    for (int i = 0; i < size; i++) collection.scale[int(job(i).manifold)] = job(i).scales[0];

    at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t chunk = from; chunk < to; chunk++) k.collection_first(collection, chunk);
    });
    std::vector<std::vector<uint8_t>> skipped(static_cast<size_t>(size));
    std::vector<uint8_t> undefined(size_t(size), 0);
    each_left(left, [&](const Kernel& kernel) {
      const Job& its = job(kernel.number);
      if (!waits(its)) return;
      Partial partial{0, 0};
      std::vector<uint8_t>& left_out = skipped[size_t(kernel.number)];
      left_out.resize(size_t(its.count), 0);
      const auto first = its.manifold == ManifoldCode::euclidean ? k.elements_first : k.lanes_first;
      first(its, kernel.k, kernel.k + 1, &partial, left_out.data());
      square[size_t(numbering->first[kernel.number])] += partial.square;
      if (!is_plain(its)) nonfinite[index(kernel.number)] += partial.nonfinite;
      undefined[size_t(kernel.number)] |= is_plain(its) && partial.nonfinite;
    });

    // In the order of the chunks, whatever thread had them.
    for (size_t chunk = 1; chunk < size_t(chunks); chunk++)
      for (size_t group = 0; group < groups; group++) square[group] += square[chunk * groups + group];
    for (int i = 0; i < size; i++) {
      const size_t group = size_t(numbering->first[i]);
      step[group] = float(step_size_of<double>(job(i))(square[group]));
      if (job(i).norms) *job(i).norms = undefined[size_t(i)] ? std::nan("") : std::sqrt(square[group]);
    }

    at::parallel_for(0, blocks, least_blocks,
                     [&](int64_t from, int64_t to) { k.collection_second(collection, from, to); });
    each_left(left, [&](const Kernel& kernel) {
      const Job& its = job(kernel.number);
      const bool elements = its.manifold == ManifoldCode::euclidean;
      if (!kernel.observed && !waits(its)) {
        Partial partial{0, 0};
        (elements ? k.elements_whole : k.lanes_whole)(its, kernel.k, kernel.k + 1, &partial);
        nonfinite[index(kernel.number)] += partial.nonfinite;
      } else if (kernel.observed || is_plain(its) || !skipped[size_t(kernel.number)][size_t(kernel.k)]) {
        const double length = step[size_t(numbering->first[kernel.number])];
        (elements ? k.elements_second : k.lanes_second)(its, kernel.k, kernel.k + 1, length, nullptr);
      }
    });
  }
};

}  // namespace

std::vector<int> step_collections(const std::vector<Job>& jobs, std::vector<int64_t>& nonfinite,
                                  const PlanTensors& plan) {
  std::vector<Collected> small, large;
  std::vector<int> rest;
  for (int j = 0, end; j < int(jobs.size()); j = end) {
    end = j + 1;
    // What is swept must not depend on how many kernels are here: ranks share groups, and their bits.
    if (is_collectable(jobs[j]) && !plan.beside_individual[j]) {
      while (end < int(jobs.size()) && jobs[end].weight == jobs[j].weight && is_collectable(jobs[end])) end++;
      const Collected made(jobs, j, end, nonfinite, plan);
      if (made.fits()) {
        (made.elements() <= small_elements ? small : large).push_back(made);
        continue;
      }
    }
    for (int i = j; i < end; i++) rest.push_back(i);
  }
  at::parallel_for(0, int64_t(small.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) small[i].run();
  });
  for (const Collected& one : large) one.run();
  return rest;
}

}  // namespace mk
