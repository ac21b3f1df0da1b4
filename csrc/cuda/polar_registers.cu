#include "cuda/decompose_registers.cuh"

namespace mk {
namespace cuda {

void add_polar_in_registers(std::vector<BatchKernel>& table) {
  add_in_registers<Decomposition::polar, float, 2>(table);
  add_in_registers<Decomposition::polar, float, 3>(table);
  add_in_registers<Decomposition::polar, float, 4>(table);
  add_in_registers<Decomposition::polar, double, 2>(table);
  add_in_registers<Decomposition::polar, double, 3>(table);
}

}  // namespace cuda
}  // namespace mk
