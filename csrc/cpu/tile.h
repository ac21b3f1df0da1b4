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
// Of a group in one copy, for both of its passes.
constexpr int group_elements = 2304;

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
  static constexpr int size = group_elements > Capacity* Pack<R>::lanes ? group_elements : Capacity * Pack<R>::lanes;
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

// The E numbers of a component that lie side by side; of the commonest matrices by moves of a size that the compiler
// knows.
template <class R>
MK_FN void copy_dense(R* to, const R* from, int E) {
  switch (E) {
    case 4:
      return void(__builtin_memcpy(to, from, 4 * sizeof(R)));
    case 9:
      return void(__builtin_memcpy(to, from, 9 * sizeof(R)));
    case 25:
      return void(__builtin_memcpy(to, from, 25 * sizeof(R)));
    default:
      for (int e = 0; e < E; e++) to[e] = from[e];
  }
}

// Copies `count` components from k on to or from memory of the arithmetic type, one after the other. `skip`: components
// that are neither read (zeros instead) nor written.
template <class R, class Size, bool Write>
__attribute__((noinline)) void copy(const Job& job, void* base, bool grad, int64_t k, int count, Size size,
                                    const uint8_t* skip, R* buffer) {
  const int E = size.n * size.p;
  const Geometry& geometry = *job.geometry;
  const int64_t* const stride = grad ? geometry.grad_stride : geometry.weight_stride;
  const int64_t* const element = grad ? job.grad_offset : job.weight_offset;
  const bool in_order = grad ? job.grad_in_order : job.weight_in_order;
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    S* const memory = static_cast<S*>(base);
    const auto copy_one = [&](int64_t offset, R* here) {
      S* const there = memory + offset;
      if constexpr (std::is_same<S, R>::value) {
        if (in_order) return Write ? copy_dense(there, here, E) : copy_dense(here, there, E);
      }
      for (int e = 0; e < E; e++) {
        S* const x = there + (in_order ? e : element[e]);
        if constexpr (Write) put(x, here[e]);
        if constexpr (!Write) here[e] = real(*x);
      }
    };
    for (int done = 0; done < count;) {
      if (job.listed) {
        if (!(skip && skip[done])) {
          copy_one(offset_of(geometry, stride, job.listed[k + done]), buffer + int64_t(done) * E);
        } else if (!Write) {
          for (int e = 0; e < E; e++) buffer[int64_t(done) * E + e] = R(0);
        }
        done++;
        continue;
      }
      const Run run = run_at(job, k + done, k + count);
      int64_t offset = grad ? run.grad : run.weight;
      const int64_t step = grad ? run.grad_step : run.weight_step;
      if (!skip && in_order && step == E) {
        R* const here = buffer + int64_t(done) * E;
        sweep<R>(run.length * E, [&](int64_t i, auto tag) {
          if constexpr (Write) put(memory + offset + i, at<decltype(tag)>(here + i));
          if constexpr (!Write) to(here + i, get_as<decltype(tag)>(memory + offset + i));
        });
        done += int(run.length);
        continue;
      }
      for (int64_t i = 0; i < run.length; i++, done++, offset += step) {
        if (!(skip && skip[done])) {
          copy_one(offset, buffer + int64_t(done) * E);
        } else if (!Write) {
          for (int e = 0; e < E; e++) buffer[int64_t(done) * E + e] = R(0);
        }
      }
    }
  });
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
