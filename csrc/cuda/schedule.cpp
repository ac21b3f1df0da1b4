#include "cuda/schedule.h"

#include <ATen/ops/empty.h>

#include <list>

#include "cpu/geometry.h"
#include "cuda/context.h"

namespace mk {
namespace cuda {
namespace {

// Optimizers that take turns; graphs keep theirs for good.
constexpr size_t most_schedules = 16;

std::vector<int64_t> key_of(const Arguments& a) {
  std::vector<int64_t> key{a.device.index(),
                           reinterpret_cast<int64_t>(current_stream(a.device)),
                           a.norms,
                           reinterpret_cast<int64_t>(a.groups.const_data_ptr()),
                           version_of(a.groups),
                           reinterpret_cast<int64_t>(a.components.const_data_ptr()),
                           version_of(a.components),
                           a.hyper.size(0)};
  for (size_t i = 0; i < a.params.size(); i++) {
    const at::Tensor& weight = a.params[i];
    key.push_back(int64_t(weight.scalar_type()));
    key.push_back(a.grads[i].defined() ? weight.dim() : -1 - weight.dim());
    key.push_back(a.momenta[i].numel() > 0);
    key.push_back(a.variances[i].numel());
    key.insert(key.end(), weight.sizes().begin(), weight.sizes().end());
    key.insert(key.end(), weight.strides().begin(), weight.strides().end());
    if (a.grads[i].defined()) key.insert(key.end(), a.grads[i].strides().begin(), a.grads[i].strides().end());
  }
  return key;
}

at::Tensor scratch(int64_t numbers, at::ScalarType type, at::Device device) {
  return at::empty({numbers}, at::TensorOptions().dtype(type).device(device));
}

void check_variance(size_t i, const at::Tensor& variance, int64_t count, Storage storage) {
  const auto number = storage == Storage::float64 ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(variance.numel() == count && variance.scalar_type() == number && variance.is_contiguous(),
                    "variances[", i, "]: wanted ", count, " contiguous numbers of ", number, ", got ",
                    variance.toString(), " with ", variance.numel(), ".");
}

std::unique_ptr<Schedule> make(const Arguments& a, std::vector<int64_t> key) {
  auto made = std::make_unique<Schedule>();
  made->key = std::move(key);
  made->plan_groups = a.groups;
  made->plan_components = a.components;

  Planner planner(shared_memory_of_block(a.device), a.norms);
  const GroupRow* rows = reinterpret_cast<const GroupRow*>(a.groups.const_data_ptr<int64_t>());
  const int64_t count = int64_t(a.params.size());
  // One geometry a parameter; Stiefel matrices with n < p have one of their own.
  std::vector<int32_t> upright(size_t(count), -1), transposed(size_t(count), -1);
  int64_t norm = 0, next_norm = 0;  // where the row's entries in `norms` start and end
  for (int64_t r = 0; r < a.groups.size(0); r++) {
    const GroupRow& row = rows[r];
    check_row(row, r, count, a.hyper.size(0), a.components.numel(), a.scales.numel());
    norm = next_norm;
    next_norm += row.individual ? row.count : 1;
    const size_t i = size_t(row.parameter);
    if (!a.grads[i].defined() || row.count == 0) continue;
    const Layout layout{View(row.view), row.out_dim, row.channel_groups, row.rows};
    const auto geometry = [&](std::vector<int32_t>& known, bool turned) {
      if (known[i] < 0) known[i] = planner.add_geometry(geometry_of(a.params[i], a.grads[i], layout, turned));
      return known[i];
    };
    Group g{};
    g.geometry = geometry(upright, false);
    g.parameter = int32_t(row.parameter);
    g.hyper = int32_t(row.hyper);
    g.rule = Rule(row.rule);
    g.manifold = ManifoldCode(row.manifold);
    g.retraction = Retraction(row.retraction);
    Geometry of = planner.geometries[size_t(g.geometry)];
    const bool turned = g.manifold == ManifoldCode::stiefel && of.n < of.p;
    if (turned) {
      g.geometry = geometry(transposed, true);
      of = planner.geometries[size_t(g.geometry)];
    }
    simplify(g.manifold, g.retraction, of);
    TORCH_CHECK_VALUE(row.listed || row.first <= of.count - row.count, "groups: row ", r,
                      " ends beyond the last component of params[", i, "].");
    g.storage = storage_of(a.params[i]);
    g.first = row.first;
    g.count = row.count;
    g.listed = row.listed != 0;
    g.scale = row.scale;
    g.scale_stride = row.scale_stride;
    g.norm = g.rule == Rule::fg_sgd ? norm : -1;
    g.individual = row.individual != 0;
    g.bounded = g.rule == Rule::fg_sgd && row.step_size != 0;
    if (g.rule == Rule::adam_g && g.manifold == ManifoldCode::grassmann)
      check_variance(i, a.variances[i], of.count, g.storage);
    if (!planner.add_group(g)) made->library.push_back({r, norm, of, turned});
  }

  Upload upload;
  made->groups_at = upload.add(planner.groups);
  made->geometries_at = upload.add(planner.geometries);
  made->offsets_at = upload.add(planner.element_offsets);
  for (const Launch& launch : planner.launches())
    made->launches.push_back({launch.kernel, launch.shared, unsigned(launch.tiles.size()), upload.add(launch.tiles)});
  at::Tensor host;
  made->tables = upload.send(a.device, &host);
  made->kept.push_back(host);
  Upload listed;
  listed.add(std::vector<int64_t>(a.components.const_data_ptr<int64_t>(),
                                  a.components.const_data_ptr<int64_t>() + a.components.numel()));
  made->components = listed.send(a.device, &host);
  made->kept.push_back(host);
  made->partials = scratch(planner.partials, at::kDouble, a.device);
  made->states = scratch(planner.states * state_numbers, at::kDouble, a.device);
  made->left_out = scratch(planner.left_out, at::kByte, a.device);
  return made;
}

}  // namespace

at::Tensor Upload::send(at::Device device, at::Tensor* host) const {
  const auto options = at::TensorOptions().dtype(at::kByte);
  *host = at::empty({int64_t(bytes.size())}, options.pinned_memory(device.is_cuda()));
  if (!bytes.empty()) std::memcpy(host->mutable_data_ptr(), bytes.data(), bytes.size());
  at::Tensor there = at::empty({int64_t(bytes.size())}, options.device(device));
  there.copy_(*host, /*non_blocking=*/true);
  return there;
}

int64_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : int64_t(tensor._version()); }

Schedule& schedule_for(const Arguments& a) {
  // Never given back at the end of the program, where the device may be gone already.
  static auto& schedules = *new std::list<std::unique_ptr<Schedule>>;
  std::vector<int64_t> key = key_of(a);
  for (auto at = schedules.begin(); at != schedules.end(); ++at) {
    if ((*at)->key != key) continue;
    schedules.splice(schedules.begin(), schedules, at);
    return *schedules.front();
  }
  schedules.push_front(make(a, std::move(key)));
  size_t seen = 0;
  for (auto at = schedules.begin(); at != schedules.end();) {
    at = ++seen > most_schedules && !(*at)->captured ? schedules.erase(at) : std::next(at);
  }
  return *schedules.front();
}

}  // namespace cuda
}  // namespace mk
