// A pass of lanes.h over components [begin, end) of a job.
#pragma once

#include "cpu/job.h"

namespace mk {
namespace MK_ISA {

struct Pass {
  enum Kind { whole, first, second, group } kind;
  int64_t begin, end;
  Partial* out;            // whole, first
  uint8_t* newly_skipped;  // first: one byte a component of the job
  double step;             // second: lr / tau
  const uint8_t* skipped;  // second: null where no component is
  bool* stepped;           // group: whether both passes could be done at once
};

// The compilations of lanes.h: sizes known to the compiler, and any size.
bool run_fixed_size(const Job&, const Pass&);  // false: no such size
bool run_fixed_size_other(const Job&, const Pass&);
bool run_fixed_size_half(const Job&, const Pass&);
void run_any_size(const Job&, const Pass&);

// The compilation of matrices.h; see Kernels.
void matrices_whole(const Job&, int64_t begin, int64_t end, Partial*, Team, void* scratch);
void matrices_first(const Job&, int64_t begin, int64_t end, Partial*, uint8_t* states, void* kept, Team, void* scratch);
void matrices_second(const Job&, int64_t begin, int64_t end, double step, const uint8_t* states, const void* kept, Team,
                     void* scratch);

// The compilation of isa/lanes_collection.cpp; see Kernels.
int64_t collection_place(int64_t kernel);
void collection_first(const Collection&, int64_t chunk);
void collection_second(const Collection&, int64_t begin, int64_t end);

// One component, see alone.h: whether all of it is finite, and its step in the next wider type.
bool is_finite(const Job&, int64_t k);
double run_alone(const Job&, int64_t k, const double* step);

}  // namespace MK_ISA
}  // namespace mk
