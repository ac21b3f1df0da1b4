// A few components at a time, as many as the first-level cache holds.
#pragma once

#include "cpu/job_rules.h"
#include "cpu/rows.h"
#include "cpu/storage.h"

namespace mk {
namespace MK_ISA {
namespace {

// Of each of w, g and m, with what the rounds keep in the first-level cache.
constexpr int tile_elements = 1152;

// Components as the kernels see them, either one matrix after the other, or with the same element of all matrices side
// by side (`in_lanes`: channels_last weights lie so). In place where memory allows, else copied, as numbers of the
// arithmetic type.
struct Tile {
  int64_t k;  // first component, counted in the job
  int count;  // components in it; whole registers are read, so that copies are padded
  bool in_lanes, copied;
  void *w, *m;
  const void* g;
};

template <class R, int Capacity>
struct TileMemory {
  static constexpr int size = tile_elements > Capacity* Pack<R>::lanes ? tile_elements : Capacity * Pack<R>::lanes;
  alignas(64) R w[size], g[size], m[size];
};

// How many components from k on lie at one stride, and that stride.
struct Run {
  int64_t length, weight, grad, weight_step, grad_step;
};

MK_FN Run run_at(const Job& job, int64_t k, int64_t end) {
  const Geometry& geometry = *job.geometry;
  const int inner = geometry.batch_dims - 1;
  const int64_t component = job.component(k);
  Run run{1, offset_of(geometry, geometry.weight_stride, component),
          offset_of(geometry, geometry.grad_stride, component), 0, 0};
  if (!job.listed && inner >= 0) {
    run.length = geometry.size[inner] - component % geometry.size[inner];
    run.length = run.length < end - k ? run.length : end - k;
    run.weight_step = geometry.weight_stride[inner];
    run.grad_step = geometry.grad_stride[inner];
  }
  return run;
}

// Copies `count` components from k on to or from memory of the arithmetic type, one after the other. `skip`: components
// that are neither read (zeros instead) nor written.
template <class R, class Size, bool Write>
__attribute__((noinline)) void copy(const Job& job, void* base, bool grad, int64_t k, int count, Size size,
                                    const uint8_t* skip, R* buffer) {
  const int E = size.n * size.p;
  const int64_t* element = grad ? job.grad_offset : job.weight_offset;
  const bool in_order = grad ? job.grad_in_order : job.weight_in_order;
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    S* memory = static_cast<S*>(base);
    for (int done = 0; done < count;) {
      const Run run = run_at(job, k + done, k + count);
      int64_t offset = grad ? run.grad : run.weight;
      if (!skip && in_order && (grad ? run.grad_step : run.weight_step) == E) {
        R* here = buffer + int64_t(done) * E;
        sweep<R>(run.length * E, [&](int64_t i, auto tag) {
          if constexpr (Write) put(memory + offset + i, at<decltype(tag)>(here + i));
          if constexpr (!Write) to(here + i, get_as<decltype(tag)>(memory + offset + i));
        });
        done += int(run.length);
        continue;
      }
      for (int64_t i = 0; i < run.length; i++, done++, offset += grad ? run.grad_step : run.weight_step) {
        R* here = buffer + int64_t(done) * E;
        if (skip && skip[done]) {
          if (!Write)
            for (int e = 0; e < E; e++) here[e] = R(0);
        } else if (in_order) {
          for (int e = 0; e < E; e++) {
            if constexpr (Write) put(memory + offset + e, here[e]);
            if constexpr (!Write) here[e] = real(memory[offset + e]);
          }
        } else {
          for (int e = 0; e < E; e++) {
            if constexpr (Write) put(memory + offset + element[e], here[e]);
            if constexpr (!Write) here[e] = real(memory[offset + element[e]]);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
