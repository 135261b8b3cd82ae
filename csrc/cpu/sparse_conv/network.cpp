#include "cpu/sparse_conv/network.h"

#include <stdexcept>
#include <unordered_map>

namespace fastprune {
namespace sparse {
namespace {

constexpr size_t kMostPlans = 4;

struct Networks {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Network>> by_key;
};

// Never destroyed: a finalizer may release a network while the process ends.
Networks& networks() {
  static Networks* all = new Networks;
  return *all;
}

}  // namespace

std::shared_ptr<const Plan> Network::plan(const std::vector<WeightArray>& weights,
                                          const std::vector<InputSpec>& inputs, Isa isa) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = plans_.begin(); it != plans_.end(); ++it) {
    if ((*it)->inputs() != inputs) continue;
    plans_.splice(plans_.begin(), plans_, it);
    return plans_.front();
  }
  const std::vector<Step> steps =
      parse_program(program_.data(), static_cast<int64_t>(program_.size()) / kStepFields,
                    static_cast<int64_t>(inputs.size()), weights);
  plans_.push_front(std::make_shared<const Plan>(steps, weights, inputs, isa));
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return plans_.front();
}

std::shared_ptr<Network> find_network(int64_t key, const std::vector<int64_t>& program) {
  Networks& all = networks();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::shared_ptr<Network>& network = all.by_key[key];
  if (network == nullptr) network = std::make_shared<Network>(program);
  if (network->program() != program) {
    throw std::invalid_argument(
        "sparse_network: `key` belongs to another network; draw a new one for each network");
  }
  return network;
}

void release_network(int64_t key) {
  Networks& all = networks();
  std::shared_ptr<Network> released;  // freed after the lock
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_key.find(key);
  if (found == all.by_key.end()) return;
  released = std::move(found->second);
  all.by_key.erase(found);
}

}  // namespace sparse
}  // namespace fastprune
