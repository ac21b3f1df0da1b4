// The kernels of one instruction set: its table, element-wise steps and long vectors. setup.py compiles this folder
// once for each instruction set, with MK_ISA naming it.
#include "cpu/euclidean.h"
#include "cpu/pass.h"
#include "cpu/vectors.h"

namespace mk {
namespace MK_ISA {
namespace {

void elements_whole(const Job& job, int64_t begin, int64_t end, Partial* out) {
  with_arithmetic(job, [&](auto r) { Elements<decltype(r)>(job).whole(begin, end, out); });
}

void elements_first(const Job& job, int64_t begin, int64_t end, Partial* out, uint8_t* skipped) {
  with_arithmetic(job, [&](auto r) { Elements<decltype(r)>(job).first(begin, end, out, skipped); });
}

void elements_second(const Job& job, int64_t begin, int64_t end, double step, const uint8_t* skipped) {
  with_arithmetic(job, [&](auto r) { Elements<decltype(r)>(job).second(begin, end, step, skipped); });
}

void run_lanes(const Job& job, const Pass& pass) {
  if (!run_fixed_size(job, pass)) run_any_size(job, pass);
}

void lanes_whole(const Job& job, int64_t begin, int64_t end, Partial* out) {
  run_lanes(job, {Pass::whole, begin, end, out, nullptr, 0, nullptr, nullptr});
}

void lanes_first(const Job& job, int64_t begin, int64_t end, Partial* out, uint8_t* skipped) {
  run_lanes(job, {Pass::first, begin, end, out, skipped, 0, nullptr, nullptr});
}

void lanes_second(const Job& job, int64_t begin, int64_t end, double step, const uint8_t* skipped) {
  run_lanes(job, {Pass::second, begin, end, nullptr, nullptr, step, skipped, nullptr});
}

bool lanes_group(const Job& job, Partial* out) {
  bool stepped = false;
  run_lanes(job, {Pass::group, 0, job.count, out, nullptr, 0, nullptr, &stepped});
  return stepped;
}

void vectors_whole(const Job& job, int64_t begin, int64_t end, Partial* out, VectorState* states, void* scratch) {
  with_arithmetic(job, [&](auto r) { Vectors<decltype(r)>(job, scratch).whole(begin, end, out, states); });
}

void vectors_first(const Job& job, int64_t begin, int64_t end, Partial* out, VectorState* states, void* scratch) {
  with_arithmetic(job, [&](auto r) { Vectors<decltype(r)>(job, scratch).first(begin, end, out, states); });
}

void vectors_second(const Job& job, int64_t begin, int64_t end, double step, const VectorState* states, void* scratch) {
  with_arithmetic(job, [&](auto r) { Vectors<decltype(r)>(job, scratch).second(begin, end, step, states); });
}

}  // namespace
}  // namespace MK_ISA

#define MK_TABLE_NAME(isa) kernels_##isa
#define MK_TABLE(isa) MK_TABLE_NAME(isa)
extern const Kernels MK_TABLE(MK_ISA);
const Kernels MK_TABLE(MK_ISA) = {MK_ISA::elements_whole,   MK_ISA::elements_first,     MK_ISA::elements_second,
                                  MK_ISA::lanes_whole,      MK_ISA::lanes_first,        MK_ISA::lanes_second,
                                  MK_ISA::lanes_group,      MK_ISA::vectors_whole,      MK_ISA::vectors_first,
                                  MK_ISA::vectors_second,   MK_ISA::matrices_whole,     MK_ISA::matrices_first,
                                  MK_ISA::matrices_second,  MK_ISA::Pack<float>::lanes, MK_ISA::collection_place,
                                  MK_ISA::collection_first, MK_ISA::collection_second};

}  // namespace mk
