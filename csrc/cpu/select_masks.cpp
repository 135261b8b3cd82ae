// The selection as one byte per element.
#include <algorithm>

#include "cpu/key_tiles.h"
#include "cpu/select.h"

namespace fastprune {
namespace {

template <typename Key>
class MaskWriter {
 public:
  MaskWriter(const KeyReader<Key>& reader, const Threshold& threshold)
      : reader_(reader), key_(reader.key(threshold.score)), tie_end_(threshold.tie_end) {}

  void write(const Chunk& chunk, uint8_t* mask) const {
    const TensorEntry& entry = *chunk.entry;
    reader_.for_tiles(chunk, [&](const Key* keys, int64_t size, int64_t offset) {
      if (entry.layout.rank == 0) {
        write_row_major(keys, size, entry.first_position + offset, mask + offset);
      } else {
        write_permuted(entry, keys, size, offset, mask + offset);
      }
    });
  }

 private:
  void write_row_major(const Key* keys, int64_t size, int64_t position, uint8_t* mask) const {
    const int64_t ties = std::clamp<int64_t>(tie_end_ - position, 0, size);
    reader_.tile().mark_from(keys, ties, key_, mask);
    reader_.tile().mark_above(keys + ties, size - ties, key_, mask + ties);
  }

  void write_permuted(const TensorEntry& entry, const Key* keys, int64_t size, int64_t offset,
                      uint8_t* mask) const {
    reader_.tile().mark_above(keys, size, key_, mask);
    if (reader_.tile().count_equal(keys, size, key_) == 0) return;
    for (int64_t i = 0; i < size; ++i) {
      if (keys[i] != key_) continue;
      mask[i] = entry.first_position + position_of(entry.layout, offset + i) < tie_end_;
    }
  }

  const KeyReader<Key>& reader_;
  Key key_;
  int64_t tie_end_;
};

template <typename Key>
void write_masks(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                 const Threshold* thresholds, ParallelFor parallel_for, uint8_t* const* masks) {
  const KeyReader<Key> reader(kind);
  const std::vector<Chunk> chunks = chunks_of(entries, entries + num_entries);
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  parallel_for(chunks.size(), grain_of(chunks.size(), elements), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const TensorEntry* entry = chunks[c].entry;
      MaskWriter<Key>(reader, thresholds[entry->segment]).write(chunks[c], masks[entry - entries]);
    }
  });
}

}  // namespace

void select_masks(const TensorEntry* entries, int64_t num_entries, ScoreKind kind,
                  const Threshold* thresholds, ParallelFor parallel_for, uint8_t* const* masks) {
  const bool is_double = num_entries > 0 && entries[0].dtype == DType::kFloat64;
  (is_double ? write_masks<uint64_t> : write_masks<uint32_t>)(entries, num_entries, kind,
                                                              thresholds, parallel_for, masks);
}

}  // namespace fastprune
