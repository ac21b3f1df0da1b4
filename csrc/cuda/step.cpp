#include "cuda/step.h"

#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>

#include <cmath>
#include <mutex>

#include "cuda/context.h"
#include "cuda/library.h"
#include "cuda/schedule.h"

namespace mk {
namespace cuda {
namespace {

template <class T>
const T* at_byte(const at::Tensor& table, size_t byte) {
  return reinterpret_cast<const T*>(static_cast<const char*>(table.const_data_ptr()) + byte);
}

// Addresses, hyper-parameters and what else changes between steps, in device memory. Sent only where it is not there
// yet; a graph that is captured gets a table of its own, which no later step writes to.
class StepTable {
  Upload upload;
  size_t tensors_at, hyper_at, taken_at;
  at::Tensor there;

 public:
  StepTable(const Arguments& a, const std::vector<uint8_t>& taken) {
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < a.params.size(); i++) {
      const auto address = [](const at::Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; };
      tensors.push_back({address(a.params[i]), a.grads[i].defined() ? a.grads[i].const_data_ptr() : nullptr,
                         address(a.momenta[i]), address(a.variances[i])});
    }
    tensors_at = upload.add(tensors);
    taken_at = upload.add(taken);
    const Hyper* rows = reinterpret_cast<const Hyper*>(a.hyper.const_data_ptr<double>());
    hyper_at = upload.add(std::vector<Hyper>(rows, rows + a.hyper.size(0)));
  }

  void send(Schedule& schedule, at::Device device) {
    at::Tensor host;
    if (is_capturing(device)) {
      there = upload.send(device, &host);
      schedule.kept.insert(schedule.kept.end(), {host, there});
      schedule.captured = true;
      return;
    }
    if (schedule.step_content != upload.content()) {
      schedule.step_table = upload.send(device, &host);
      schedule.step_content = upload.content();
    }
    there = schedule.step_table;
  }

  const Tensor* tensors() const { return at_byte<Tensor>(there, tensors_at); }
  const uint8_t* taken() const { return at_byte<uint8_t>(there, taken_at); }
  const Hyper* hypers() const { return at_byte<Hyper>(there, hyper_at); }
};

void send_scales(Schedule& schedule, const at::Tensor& scales, at::Device device) {
  const int64_t version = version_of(scales);
  const bool same = schedule.plan_scales.defined() && schedule.plan_scales.is_same(scales) && !scales.is_inference();
  if (same && schedule.scales_version == version) return;
  Upload upload;
  upload.add(std::vector<double>(scales.const_data_ptr<double>(), scales.const_data_ptr<double>() + scales.numel()));
  at::Tensor host;
  schedule.scales = upload.send(device, &host);
  if (is_capturing(device)) schedule.kept.insert(schedule.kept.end(), {host, schedule.scales});
  schedule.plan_scales = scales;
  schedule.scales_version = version;
}

}  // namespace

void step_(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
           at::TensorList variances, const at::Tensor& steps, const at::Tensor& nonfinite, const at::Tensor& groups,
           const at::Tensor& components, const at::Tensor& scales, const at::Tensor& hyper,
           const std::optional<at::Tensor>& norms, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& live) {
  const int64_t count = int64_t(params.size());
  if (count == 0) return;
  const at::Device device = params[0].device();
  check_arguments(params, grads, momenta, variances, steps, nonfinite, groups, components, scales, hyper, norms, live,
                  device);
  const auto [grad, taken] = Gradients(params, grads, momenta, device);
  const GroupRow* rows = reinterpret_cast<const GroupRow*>(groups.const_data_ptr<int64_t>());
  int64_t entries = 0;
  for (int64_t r = 0; r < groups.size(0); r++) {
    const GroupRow& row = rows[r];
    check_row(row, r, count, hyper.size(0), components.numel(), scales.numel());
    entries += row.individual ? row.count : 1;
    const size_t i = size_t(row.parameter);
    if (!grad[i].defined() || row.count == 0) continue;
    const bool adaptive = Rule(row.rule) == Rule::adam_g && ManifoldCode(row.manifold) == ManifoldCode::grassmann;
    const Hyper& h = reinterpret_cast<const Hyper*>(hyper.const_data_ptr<double>())[row.hyper];
    if (adaptive || h.momentum != 0) check_buffer(row.parameter, params[i], momenta[i]);
  }
  if (norms.has_value()) check_norms(*norms, entries);
  const float *scale = number_of(grad_scale, "grad_scale", device), *inf = number_of(found_inf, "found_inf", device);

  static std::mutex one_at_a_time;  // schedules are shared by all optimizers
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const c10::DeviceGuard guard(device);
  const Arguments arguments{params,     grad,   momenta, variances,         groups,
                            components, scales, hyper,   norms.has_value(), device};
  Schedule& schedule = schedule_for(arguments);
  StepTable table(arguments, taken);
  table.send(schedule, device);
  send_scales(schedule, scales, device);
  std::optional<at::Tensor> measured;
  if (norms.has_value()) measured = at::full({entries}, std::nan(""), norms->options().device(device));

  const Tables tables{
      table.tensors(),
      at_byte<Group>(schedule.tables, schedule.groups_at),
      at_byte<Addressing>(schedule.tables, schedule.geometries_at),
      at_byte<int64_t>(schedule.tables, schedule.offsets_at),
      at_byte<int64_t>(schedule.components, 0),
      at_byte<double>(schedule.scales, 0),
      live.has_value() ? reinterpret_cast<const Hyper*>(live->const_data_ptr<double>()) : table.hypers(),
      table.taken(),
      steps.data_ptr<int64_t>(),
      nonfinite.data_ptr<int64_t>(),
      schedule.partials.data_ptr<double>(),
      schedule.states.data_ptr<double>(),
      schedule.left_out.data_ptr<uint8_t>(),
      measured.has_value() ? measured->data_ptr<double>() : nullptr,
      scale,
      inf,
      count};
  const Stream stream = current_stream(device);
  for (const LaunchOnDevice& launch : schedule.launches)
    launch.kernel->start(launch.blocks, launch.kernel->threads, launch.shared, stream, tables,
                         at_byte<Tile>(schedule.tables, launch.tiles));
  for (const LibraryGroup& group : schedule.library)
    step_by_library(group, rows[group.row], arguments, steps, nonfinite, measured, grad_scale, found_inf, live);
  static const Kernel* const advance = find({.engine = Engine::advance});
  advance->start(unsigned((count + advance->threads - 1) / advance->threads), advance->threads, 0, stream, tables,
                 nullptr);
  if (norms.has_value()) norms->copy_(*measured);  // which waits for the device
}

}  // namespace cuda
}  // namespace mk
