#include "cpu/sparse_conv/pack.h"

#include <algorithm>
#include <numeric>

namespace fastprune {
namespace sparse {
namespace {

// The columns that any of the outputs from `first` keeps, and for each the place of each output's
// value, -1 where it keeps none.
struct Union {
  std::vector<int32_t> columns;
  std::vector<int32_t> places;  // `block` for each column
};

Union unite(const SparseWeight& w, int64_t first, int block) {
  Union result;
  int32_t next[4], end[4];
  for (int b = 0; b < block; ++b) {
    const bool exists = first + b < w.outputs;
    next[b] = exists ? w.starts[first + b] : 0;
    end[b] = exists ? w.starts[first + b + 1] : 0;
  }
  while (true) {
    int32_t column = INT32_MAX;
    bool found = false;
    for (int b = 0; b < block; ++b) {
      if (next[b] == end[b]) continue;
      column = std::min(column, w.columns[next[b]]);
      found = true;
    }
    if (!found) return result;
    result.columns.push_back(column);
    for (int b = 0; b < block; ++b) {
      const bool has = next[b] < end[b] && w.columns[next[b]] == column;
      result.places.push_back(has ? next[b]++ : -1);
    }
  }
}

int64_t united_columns(const SparseWeight& w, int block) {
  int64_t columns = 0;
  for (int64_t o = 0; o < w.outputs; o += block) {
    columns += static_cast<int64_t>(unite(w, o, block).columns.size());
  }
  return columns;
}

// Outputs of one block read one group of inputs.
bool may_block(const SparseWeight& w, int64_t groups, int block) {
  return groups == 1 || w.outputs / groups % block == 0;
}

// Time per column and tile of a block, an estimate, of one output that is on its own.
constexpr double kColumnCost[] = {1, 1.15, 2.0};

// What a block keeps in one panel, as places in its union's columns.
struct Run {
  int64_t block, begin, end;

  int64_t length() const { return end - begin; }
};

Run run_of(const Union& rows, int64_t block, int32_t first_column, int32_t end_column) {
  const auto begin = std::lower_bound(rows.columns.begin(), rows.columns.end(), first_column);
  const auto end = std::lower_bound(begin, rows.columns.end(), end_column);
  return {block, begin - rows.columns.begin(), end - rows.columns.begin()};
}

template <int B>
void write_entries(const SparseWeight& w, const Union& rows, const Run& run, bool backwards,
                   const std::function<int32_t(int64_t, int32_t)>& offset, void* to) {
  auto* entry = static_cast<Entry<B>*>(to);
  for (int64_t i = run.begin; i < run.end; ++i, ++entry) {
    const int64_t k = backwards ? run.begin + run.end - 1 - i : i;
    entry->offset = offset(run.block * B, rows.columns[k]);
    for (int b = 0; b < B; ++b) {
      const int32_t place = rows.places[k * B + b];
      entry->values[b] = place < 0 ? 0 : w.values[place];
    }
  }
}

}  // namespace

int choose_block(const SparseWeight& weight, int64_t groups, Kernel wanted) {
  if (wanted == Kernel::kRows) return 1;
  int best = 1;
  double least = kColumnCost[0] * weight.starts[weight.outputs];
  for (int i = 1; i < kNumBlockSizes; ++i) {
    const int block = kBlockSizes[i];
    if (!may_block(weight, groups, block)) continue;
    const double cost = kColumnCost[i] * united_columns(weight, block);
    if (cost < least || (wanted == Kernel::kBlocks && best == 1)) {
      best = block;
      least = cost;
    }
  }
  return best;
}

PackedRows pack_rows(const SparseWeight& w, int block, int64_t num_parts,
                     const std::vector<int32_t>& panels,
                     const std::function<int32_t(int64_t, int32_t)>& offset) {
  const int64_t num_blocks = (w.outputs + block - 1) / block;
  PackedRows packed{block, static_cast<int64_t>(panels.size()) - 1, {}, {}, {0}, {}, {}, {}, 0};
  std::vector<Union> unions;
  for (int64_t i = 0; i < num_blocks; ++i) {
    unions.push_back(unite(w, i * block, block));
    packed.num_entries += static_cast<int64_t>(unions.back().columns.size());
  }
  // Each part gets every num_parts-th block, long ones first.
  std::vector<int64_t> sorted(num_blocks);
  std::iota(sorted.begin(), sorted.end(), int64_t{0});
  std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) {
    return unions[a].columns.size() > unions[b].columns.size();
  });
  const int64_t entry_size = (1 + block) * 4;
  packed.entries = Buffer(packed.num_entries * entry_size);
  const auto write = block == 1   ? write_entries<1>
                     : block == 2 ? write_entries<2>
                                  : write_entries<4>;
  int64_t written = 0;
  bool backwards = false;  // every other row, to begin with the inputs that were read last
  for (int64_t part = 0; part < num_parts; ++part) {
    for (int64_t panel = 0; panel < packed.num_panels; ++panel) {
      packed.starts.push_back(written);
      std::vector<Run> runs;
      for (int64_t i = part; i < num_blocks; i += num_parts) {
        runs.push_back(run_of(unions[sorted[i]], sorted[i], panels[panel], panels[panel + 1]));
      }
      // Runs of one length follow each other, so that the end of the loop is foreseen.
      std::stable_sort(runs.begin(), runs.end(),
                       [](const Run& a, const Run& b) { return a.length() > b.length(); });
      for (const Run& run : runs) {
        write(w, unions[run.block], run, backwards, offset,
              packed.entries.data() + written * entry_size);
        packed.lengths.push_back(static_cast<int32_t>(run.length()));
        for (int64_t o = run.block * block; o < (run.block + 1) * block; ++o) {
          packed.outputs.push_back(o < w.outputs ? static_cast<int32_t>(o) : -1);
          packed.bias.push_back(o < w.outputs ? w.bias[o] : 0);
        }
        written += run.length();
        backwards = !backwards;
      }
    }
    packed.parts.push_back(packed.parts.back() + (num_blocks - part + num_parts - 1) / num_parts);
  }
  return packed;
}

}  // namespace sparse
}  // namespace fastprune
