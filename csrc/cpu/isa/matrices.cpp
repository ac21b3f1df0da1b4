// Stiefel matrices that are too large for a lane each.
#include "cpu/matrices.h"

#include "cpu/pass.h"

namespace mk {
namespace MK_ISA {
void matrices_whole(const Job& job, int64_t begin, int64_t end, Partial* out, Team team, void* scratch) {
  with_arithmetic(job, [&](auto r) { Matrices<decltype(r)>(job, team, scratch).whole(begin, end, out); });
}

void matrices_first(const Job& job, int64_t begin, int64_t end, Partial* out, uint8_t* states, void* kept, Team team,
                    void* scratch) {
  with_arithmetic(job, [&](auto r) {
    using R = decltype(r);
    Matrices<R>(job, team, scratch).first(begin, end, out, states, static_cast<R*>(kept));
  });
}

void matrices_second(const Job& job, int64_t begin, int64_t end, double step, const uint8_t* states, const void* kept,
                     Team team, void* scratch) {
  with_arithmetic(job, [&](auto r) {
    using R = decltype(r);
    Matrices<R>(job, team, scratch).second(begin, end, step, states, static_cast<const R*>(kept));
  });
}

}  // namespace MK_ISA
}  // namespace mk
