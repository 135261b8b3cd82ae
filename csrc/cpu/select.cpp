// The exact k-th score in one pass over the data: a sample brackets it, the pass counts the keys
// above the bracket and collects those inside, and the collected keys decide. The counts verify the
// bracket; where the sample misled, or too much lies inside, histograms of the data narrow it.
#include "cpu/select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/key_tiles.h"

namespace fastprune {
namespace {

constexpr int64_t kMinCapacity = 1 << 16;  // candidates kept at least; up to here no sampling
constexpr int64_t kCapacityDivisor = 32;   // of the elements; memory is touched as it fills
constexpr int64_t kSampleRun = 16;         // neighbours, a cache line of fp32
constexpr int64_t kSampleDivisor = 512;    // runs: one for so many elements, but no more than
constexpr int64_t kMaxRuns = 1 << 12;      // a run costs two page walks, a candidate next to none
constexpr double kSampleDeviations = 4;

// Keys low..high, both included.
template <typename Key>
struct Bracket {
  Key low = 0;
  Key high = std::numeric_limits<Key>::max();

  bool contains(Key key) const { return key >= low && key <= high; }
  bool is_one_key() const { return low == high; }
};

// Counts of the keys of a bracket in 4,096 equal slices.
template <typename Key>
class Histogram {
 public:
  explicit Histogram(Bracket<Key> bracket) : bracket_(bracket), bins_(kBins) {
    while (((bracket.high - bracket.low) >> shift_) >= static_cast<Key>(kBins)) ++shift_;
  }

  void add(Key key) { ++bins_[(key - bracket_.low) >> shift_]; }
  void add(const Histogram& other) {
    for (int64_t i = 0; i < kBins; ++i) bins_[i] += other.bins_[i];
  }

  // The slice that holds the rank-th largest key (from 0); takes what lies above it off the rank.
  Bracket<Key> slice_of_rank(int64_t* rank, int64_t* count) const {
    int64_t bin = kBins - 1;
    while (*rank >= bins_[bin]) *rank -= bins_[bin--];
    *count = bins_[bin];
    const Key low = bracket_.low + (static_cast<Key>(bin) << shift_);
    const Key width = (Key{1} << shift_) - 1;
    return {low, static_cast<Key>(low + std::min<Key>(width, bracket_.high - low))};
  }

 private:
  static constexpr int64_t kBins = 4096;

  Bracket<Key> bracket_;
  int shift_ = 0;
  std::vector<int64_t> bins_;
};

// The rank-th largest (from 0) of keys that all lie in the bracket; they are left as they are.
template <typename Key>
Key key_of_rank(const KeyReader<Key>& reader, const Key* keys, int64_t size, Bracket<Key> bracket,
                int64_t rank) {
  std::vector<Key> rest;
  while (size > kTile && !bracket.is_one_key()) {
    Histogram<Key> histogram(bracket);
    for (int64_t i = 0; i < size; ++i) histogram.add(keys[i]);
    int64_t count;
    bracket = histogram.slice_of_rank(&rank, &count);
    std::vector<Key> inside(count + kFilterSlack);
    FilterCounts<Key> unused;
    reader.tile().filter(keys, size, bracket.low, bracket.high, inside.data(), &unused);
    rest.swap(inside);
    keys = rest.data();
    size = count;
  }
  if (bracket.is_one_key()) return bracket.low;
  std::vector<Key> few(keys, keys + size);
  std::nth_element(few.begin(), few.begin() + rank, few.end(), std::greater<Key>());
  return few[rank];
}

// Selection in one segment.
template <typename Key>
class Segment {
 public:
  Segment(const KeyReader<Key>& reader, const TensorEntry* begin, const TensorEntry* end,
          ParallelFor parallel_for)
      : reader_(reader),
        begin_(begin),
        end_(end),
        parallel_for_(parallel_for),
        chunks_(chunks_of(begin, end)),
        slices_(chunks_.size()) {
    for (const TensorEntry* e = begin; e != end; ++e) size_ += e->numel;
    grain_ = grain_of(chunks_.size(), size_);
    capacity_ = std::min(size_, std::max(kMinCapacity, size_ / kCapacityDivisor));
    candidates_.reset(new Key[capacity_]);
  }

  Threshold select(int64_t num_kept, int32_t* flags) {
    num_kept = std::clamp<int64_t>(num_kept, 0, size_);
    const Key key = num_kept == 0 ? collect_nans() : find_key(num_kept - 1);
    if (!reader_.all_finite(smallest_, largest_)) *flags |= seen_flags();
    const int64_t num_ties = num_kept - above_ - count_candidates([=](Key k) { return k > key; });
    return {reader_.score(key), num_ties, tie_end(key, num_ties)};
  }

 private:
  struct Slice {  // the candidates of one chunk
    int64_t begin;
    int64_t size;
  };

  bool candidates_complete() const { return inside_ <= capacity_; }

  Key collect_nans() {  // keeping nothing is a threshold of NaN, which no key exceeds
    collect({reader_.nan(), reader_.nan()});
    return reader_.nan();
  }

  Key find_key(int64_t rank) {
    Bracket<Key> bracket = size_ <= capacity_ ? Bracket<Key>{} : sampled_bracket(rank);
    collect(bracket);
    if (rank < above_) {
      collect(narrowed({static_cast<Key>(bracket.high + 1), Bracket<Key>{}.high}, rank));
    } else if (rank >= above_ + inside_) {
      collect(narrowed({Bracket<Key>{}.low, static_cast<Key>(bracket.low - 1)},
                       rank - above_ - inside_));
    } else if (!candidates_complete() && !bracket.is_one_key()) {
      collect(narrowed(bracket, rank - above_));
    }
    if (bracket_.is_one_key()) return bracket_.low;
    return key_of_rank(reader_, candidates_.get(), inside_, bracket_, rank - above_);
  }

  // Where the rank-th largest of all keys should lie, from a sample spread evenly over the memory.
  // Pseudo-random shifts within each stride, so that no period of the data is met.
  Bracket<Key> sampled_bracket(int64_t rank) const {
    const int64_t runs = std::min(kMaxRuns, size_ / kSampleDivisor);
    std::vector<int64_t> ends;  // of the entries, in memory order of the list
    int64_t end = 0;
    for (const TensorEntry* e = begin_; e != end_; ++e) ends.push_back(end += e->numel);
    std::vector<Key> sample(runs * kSampleRun);
    const double stride = static_cast<double>(size_ - kSampleRun) / runs;
    parallel_for_(runs, 256, [&](int64_t first, int64_t last) {
      for (int64_t run = first; run < last; ++run) {
        const double shift = ((run * 0x9e3779b97f4a7c15u) >> 11) * 0x1p-53;
        const int64_t at = static_cast<int64_t>((run + shift) * stride);
        const int64_t index = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
        const TensorEntry& entry = begin_[index];
        const int64_t offset = at - (ends[index] - entry.numel);
        const int64_t length = std::min(kSampleRun, entry.numel - offset);
        Key* keys = sample.data() + run * kSampleRun;
        reader_.read(entry, offset, length, keys);
        for (int64_t i = length; i < kSampleRun; ++i) keys[i] = keys[i - length];
      }
    });
    return bracket_in_sample(sample, static_cast<double>(rank) / size_);
  }

  Bracket<Key> bracket_in_sample(const std::vector<Key>& sample, double fraction) const {
    const int64_t size = sample.size();
    const auto key_at = [&](int64_t rank) {
      return key_of_rank(reader_, sample.data(), size, Bracket<Key>{}, rank);
    };
    const auto middle = static_cast<int64_t>(size * fraction);
    const double margin = kSampleDeviations * deviation(sample, key_at(middle)) + kSampleRun;
    const auto first = static_cast<int64_t>(middle - margin);
    const auto last = static_cast<int64_t>(middle + margin);
    Bracket<Key> bracket;
    if (last < size) bracket.low = key_at(last);
    if (first >= 0) bracket.high = key_at(first);
    return bracket;
  }

  // The standard deviation of the number of sampled keys above one, from what neighbouring runs
  // say of it: keys of a run resemble each other, so a formula for independent keys would promise
  // too much, and whole layers differ, which an evenly spread sample does not suffer from.
  static double deviation(const std::vector<Key>& sample, Key key) {
    double sum_of_squares = 0;
    int64_t previous = 0;
    for (auto run = sample.begin(); run != sample.end(); run += kSampleRun) {
      const int64_t above = std::count_if(run, run + kSampleRun, [=](Key k) { return k > key; });
      const double difference = run == sample.begin() ? 0 : above - previous;
      sum_of_squares += difference * difference / 2;
      previous = above;
    }
    return std::sqrt(sum_of_squares);
  }

  // The pass over the data.
  void collect(Bracket<Key> bracket) {
    bracket_ = bracket;
    above_ = 0;
    std::atomic<int64_t> above{0}, next{0};
    std::atomic<Key> largest{0}, smallest{std::numeric_limits<Key>::max()};
    parallel_for_(chunks_.size(), grain_, [&](int64_t first, int64_t last) {
      std::unique_ptr<Key[]> found(new Key[kChunk + kFilterSlack]);
      FilterCounts<Key> counts;
      for (int64_t c = first; c < last; ++c) {
        int64_t size = 0;
        reader_.for_tiles(chunks_[c], [&](const Key* keys, int64_t n, int64_t) {
          size += reader_.tile().filter(keys, n, bracket.low, bracket.high, found.get() + size,
                                        &counts);
        });
        const int64_t at = next.fetch_add(size, std::memory_order_relaxed);
        slices_[c] = {at, size};
        if (at + size <= capacity_) {
          std::memcpy(candidates_.get() + at, found.get(), size * sizeof(Key));
        }
      }
      above.fetch_add(counts.above, std::memory_order_relaxed);
      update(largest, counts.largest, std::greater<Key>());
      update(smallest, counts.smallest, std::less<Key>());
    });
    above_ = above;
    inside_ = next;
    largest_ = largest;
    smallest_ = smallest;
  }

  template <typename Better>
  static void update(std::atomic<Key>& best, Key key, Better better) {
    Key held = best.load(std::memory_order_relaxed);
    while (better(key, held) && !best.compare_exchange_weak(held, key)) {
    }
  }

  // A part of the bracket that holds its rank-th largest key and fits the candidates, or one key.
  Bracket<Key> narrowed(Bracket<Key> bracket, int64_t rank) const {
    int64_t count = std::numeric_limits<int64_t>::max();
    while (count > capacity_ && !bracket.is_one_key()) {
      bracket = histogram(bracket).slice_of_rank(&rank, &count);
    }
    return bracket;
  }

  Histogram<Key> histogram(Bracket<Key> bracket) const {
    Histogram<Key> total(bracket);
    std::mutex mutex;
    parallel_for_(chunks_.size(), grain_, [&](int64_t first, int64_t last) {
      Histogram<Key> part(bracket);
      for (int64_t c = first; c < last; ++c) {
        reader_.for_tiles(chunks_[c], [&](const Key* keys, int64_t n, int64_t) {
          for (int64_t i = 0; i < n; ++i) {
            if (bracket.contains(keys[i])) part.add(keys[i]);
          }
        });
      }
      const std::lock_guard<std::mutex> lock(mutex);
      total.add(part);
    });
    return total;
  }

  int32_t seen_flags() const {
    std::atomic<int32_t> seen{0};
    parallel_for_(chunks_.size(), grain_, [&](int64_t first, int64_t last) {
      int32_t flags = 0;
      for (int64_t c = first; c < last; ++c) {
        reader_.for_tiles(chunks_[c], [&](const Key* keys, int64_t n, int64_t) {
          for (int64_t i = 0; i < n; ++i) flags |= reader_.flags(keys[i]);
        });
      }
      seen.fetch_or(flags);
    });
    return seen;
  }

  // Of the candidates; a bracket of one key holds none that differs from it.
  template <typename Predicate>
  int64_t count_candidates(const Predicate& predicate) const {
    if (bracket_.is_one_key()) return 0;
    return std::count_if(candidates_.get(), candidates_.get() + inside_, predicate);
  }

  // The position of the first tie that is not kept, or the segment's size.
  int64_t tie_end(Key key, int64_t num_ties) const {
    const std::vector<int64_t> ties = ties_by_chunk(key);
    int64_t rank = num_ties;
    size_t c = 0;
    for (const TensorEntry* entry = begin_; entry != end_; ++entry) {
      const size_t first = c;
      int64_t in_entry = 0;
      for (; c < chunks_.size() && chunks_[c].entry == entry; ++c) in_entry += ties[c];
      if (rank < in_entry) {
        const int64_t position = entry->layout.rank == 0 ? tie_in_row_major(key, rank, first, ties)
                                                         : tie_in_permuted(key, rank, first, c);
        return entry->first_position + position;
      }
      rank -= in_entry;
    }
    return size_;
  }

  std::vector<int64_t> ties_by_chunk(Key key) const {
    std::vector<int64_t> ties(chunks_.size());
    const auto count_equal = reader_.tile().count_equal;
    if (candidates_complete()) {
      for (size_t c = 0; c < ties.size(); ++c) {
        ties[c] = count_equal(candidates_.get() + slices_[c].begin, slices_[c].size, key);
      }
    } else {  // the bracket is the key alone
      for (size_t c = 0; c < ties.size(); ++c) ties[c] = slices_[c].size;
    }
    return ties;
  }

  int64_t tie_in_row_major(Key key, int64_t rank, size_t chunk,
                           const std::vector<int64_t>& ties) const {
    while (rank >= ties[chunk]) rank -= ties[chunk++];
    int64_t found = -1;
    reader_.for_tiles(chunks_[chunk], [&](const Key* keys, int64_t n, int64_t offset) {
      for (int64_t i = 0; i < n && found < 0; ++i) {
        if (keys[i] == key && rank-- == 0) found = offset + i;
      }
    });
    return found;
  }

  // Ties in memory order, their positions in another: a histogram of the positions, so that a
  // tensor that is nothing but ties needs no list of them.
  int64_t tie_in_permuted(Key key, int64_t rank, size_t first, size_t last) const {
    Bracket<uint64_t> positions{0, static_cast<uint64_t>(chunks_[first].entry->numel - 1)};
    // Ranks of histograms count from the top, so positions are turned round.
    const auto turned = [](uint64_t position) { return ~position; };
    positions = {turned(positions.high), turned(positions.low)};
    while (!positions.is_one_key()) {
      Histogram<uint64_t> histogram(positions);
      for (size_t c = first; c < last; ++c) {
        reader_.for_tiles(chunks_[c], [&](const Key* keys, int64_t n, int64_t offset) {
          for (int64_t i = 0; i < n; ++i) {
            if (keys[i] != key) continue;
            const uint64_t position = turned(position_of(chunks_[c].entry->layout, offset + i));
            if (positions.contains(position)) histogram.add(position);
          }
        });
      }
      int64_t count;
      positions = histogram.slice_of_rank(&rank, &count);
    }
    return static_cast<int64_t>(turned(positions.low));
  }

  const KeyReader<Key>& reader_;
  const TensorEntry* begin_;
  const TensorEntry* end_;
  ParallelFor parallel_for_;
  std::vector<Chunk> chunks_;
  int64_t size_ = 0;
  int64_t grain_ = 1;
  int64_t capacity_ = 0;

  // What the last pass found.
  Bracket<Key> bracket_;
  int64_t above_ = 0;
  int64_t inside_ = 0;
  Key largest_ = 0;
  Key smallest_ = 0;
  std::unique_ptr<Key[]> candidates_;  // in no order of chunks; complete when inside_ fits
  std::vector<Slice> slices_;
};

template <typename Key>
int32_t select_segments(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                        const int64_t* num_kept, int64_t num_segments, ParallelFor parallel_for,
                        Threshold* thresholds) {
  const KeyReader<Key> reader(kind);
  const TensorEntry* const end = entries + num_entries;
  int32_t flags = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const TensorEntry* const begin = entries;
    while (entries != end && entries->segment == s) ++entries;
    thresholds[s] = Segment<Key>(reader, begin, entries, parallel_for).select(num_kept[s], &flags);
  }
  return flags;
}

}  // namespace

int32_t select_threshold(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                         const int64_t* num_kept, int64_t num_segments, ParallelFor parallel_for,
                         Threshold* thresholds) {
  const bool is_double = num_entries > 0 && entries[0].dtype == DType::kFloat64;
  return (is_double ? select_segments<uint64_t>
                    : select_segments<uint32_t>)(entries, num_entries, kind, num_kept, num_segments,
                                                 parallel_for, thresholds);
}

}  // namespace fastprune
