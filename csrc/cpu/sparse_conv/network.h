// Prepared networks, kept under the number that the caller gives them.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv/plan.h"

namespace fastprune {
namespace sparse {

class Network {
 public:
  explicit Network(std::vector<int64_t> program) : program_(std::move(program)) {}

  const std::vector<int64_t>& program() const { return program_; }

  // The plan for these inputs, made from `weights` if there is none yet; then program and weights
  // are checked. The few plans used last are kept: each holds packed weights and activations.
  std::shared_ptr<const Plan> plan(const std::vector<WeightArray>& weights,
                                   const std::vector<InputSpec>& inputs, Isa isa);

 private:
  const std::vector<int64_t> program_;
  std::mutex mutex_;
  std::list<std::shared_ptr<const Plan>> plans_;  // the last used one first
};

// The network with this key, a new one if there is none. From several threads at once too.
std::shared_ptr<Network> find_network(int64_t key, const std::vector<int64_t>& program);

// Frees it as soon as no call uses it; a key that is not there is no error.
void release_network(int64_t key);

}  // namespace sparse
}  // namespace fastprune
