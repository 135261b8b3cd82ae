// The threshold of a layer from what the move of its weights sees, without another look at them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/key_tiles.h"
#include "cpu/select.h"

namespace fastprune {

// Keys of new weights around the last threshold. Most steps move it by less than the margin; then
// they and the number of keys above them tell the new one, and the weights are not read again.
template <typename Key>
class Candidates {
 public:
  explicit Candidates(double threshold) : reader_(ScoreKind::kMagnitude) {
    constexpr int kMantissa = std::numeric_limits<typename KeyTraits<Key>::Score>::digits - 1;
    constexpr Key kMargin = Key{1} << (kMantissa - 5);  // a 32nd of a power of two
    const Key key = reader_.key(threshold);
    low_ = key - std::min(key, kMargin);
    high_ = key + kMargin;
  }

  // Those of a chunk.
  class Part {
   public:
    explicit Part(Candidates* all) : all_(all) {}
    ~Part() {
      if (all_ != nullptr) all_->add(found_, size_, counts_);
    }
    Part(const Part&) = delete;

    void add(const Key* keys, int64_t size) {
      if (all_ == nullptr) return;
      size_ += all_->reader_.tile().filter(keys, size, all_->low_, all_->high_, found_ + size_,
                                           &counts_);
    }
    // Of weights that were not moved.
    void form(const void* dense, int64_t size, Key* keys) const {
      if (all_ == nullptr) return;
      all_->reader_.read({dense, nullptr, size, 0, 0, kDType, kDType, {}}, 0, size, keys);
    }

   private:
    Candidates* all_;  // null: of a tensor that is not pruned
    Key found_[kChunk + kFilterSlack];
    int64_t size_ = 0;
    FilterCounts<Key> counts_;
  };

  // False if they do not tell: the threshold is none of them, or only some of its ties are kept.
  bool select(int64_t kept, int64_t pool_size, ParallelFor parallel_for, Threshold* found) const {
    if (kept == pool_size) {
      *found = {reader_.score(smallest_), 0, pool_size};
      return pool_size > 0;
    }
    const int64_t size = keys_.size(), rest = kept - above_;
    if (rest < 1 || rest > size) return false;
    // A magnitude's key is its bits.
    const TensorEntry entry{keys_.data(), nullptr, size, 0, 0, kDType, kDType, {}};
    select_threshold(&entry, 1, ScoreKind::kMagnitude, &rest, 1, parallel_for, found);
    if (found->tie_end != size) return false;
    found->tie_end = pool_size;
    return true;
  }

 private:
  static constexpr DType kDType = sizeof(Key) == 8 ? DType::kFloat64 : DType::kFloat32;

  void add(const Key* found, int64_t size, const FilterCounts<Key>& counts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    keys_.insert(keys_.end(), found, found + size);
    above_ += counts.above;
    smallest_ = std::min(smallest_, counts.smallest);
  }

  KeyReader<Key> reader_;
  Key low_, high_;
  std::vector<Key> keys_;
  int64_t above_ = 0;
  Key smallest_ = std::numeric_limits<Key>::max();
  std::mutex mutex_;
};

}  // namespace fastprune
