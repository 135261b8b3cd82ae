// Prepared networks, kept under the number that the caller gives them.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv/plan.h"

namespace fastprune {
namespace sparse {

class Network {
 public:
  Network(std::vector<Step> steps, size_t num_weights)
      : steps_(std::move(steps)), num_weights_(num_weights) {}

  // The plan for these inputs, made from `weights` if there is none yet. The few plans used last
  // are kept: each holds packed weights and activations.
  std::shared_ptr<const Plan> plan(const std::vector<WeightArray>& weights,
                                   const std::vector<InputSpec>& inputs, Isa isa);
  bool fits(size_t num_steps, size_t num_weights) const {
    return num_steps == steps_.size() && num_weights == num_weights_;
  }

 private:
  const std::vector<Step> steps_;
  const size_t num_weights_;
  std::mutex mutex_;
  std::list<std::shared_ptr<const Plan>> plans_;  // the last used one first
};

// Finds the network with this key, or parses the program. From several threads at once too.
std::shared_ptr<Network> find_network(int64_t key, const int64_t* program, int64_t num_steps,
                                      int64_t num_inputs, const std::vector<WeightArray>& weights);

// Frees it as soon as no call uses it; a key that is not there is no error.
void release_network(int64_t key);

}  // namespace sparse
}  // namespace fastprune
