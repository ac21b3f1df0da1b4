#include "cuda/decompose_registers.cuh"

namespace mk {
namespace cuda {

void add_qr_in_registers(std::vector<BatchKernel>& table) {
  add_in_registers<Decomposition::qr, float, 2>(table);
  add_in_registers<Decomposition::qr, float, 3>(table);
  add_in_registers<Decomposition::qr, float, 4>(table);
  add_in_registers<Decomposition::qr, float, 5>(table);
  add_in_registers<Decomposition::qr, float, 6>(table);
  add_in_registers<Decomposition::qr, float, 7>(table);
  add_in_registers<Decomposition::qr, float, 8>(table);
  add_in_registers<Decomposition::qr, double, 2>(table);
  add_in_registers<Decomposition::qr, double, 3>(table);
  add_in_registers<Decomposition::qr, double, 4>(table);
  add_in_registers<Decomposition::qr, double, 5>(table);
  add_in_registers<Decomposition::qr, double, 6>(table);
}

}  // namespace cuda
}  // namespace mk
