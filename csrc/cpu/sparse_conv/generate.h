// A layer as generated code: the sums of up to 28 outputs stay in registers, each input vector is
// loaded once for all of them, and the non-zeros are instructions. Against rows this saves the load
// of an input per multiplication, for which it pays with 11 bytes of code and weight.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv/code_store.h"
#include "cpu/sparse_conv/program.h"

namespace fastprune {
namespace sparse {

constexpr int64_t kGeneratedLanes = 16;
constexpr int64_t kGeneratedOutputs = 28;  // 32 registers, 3 inputs, 1 zero
constexpr int64_t kGeneratedPixels = 16;   // vectors that pass a piece of code one after another

struct GeneratedWork {
  const float* input;
  float* output;
  const float* residual;  // or null, as it was when the code was made
  // Of each of `vectors` vectors, floats from `input` and from `output`.
  const int64_t* input_offsets;
  const int64_t* output_offsets;
  int64_t vectors;  // at most kGeneratedPixels
};

class GeneratedRows {
 public:
  // `offset(output, column)`: floats from the window's first input. `plane`: floats from an output
  // channel to the next one. The code does no activation but ReLU.
  GeneratedRows() = default;
  GeneratedRows(const SparseWeight& weight, const std::function<int32_t(int64_t, int32_t)>& offset,
                int64_t plane, bool has_residual, bool has_relu, CodeStore* store);

  bool empty() const { return blocks_.empty(); }
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  // Of each block, and the number of all behind the last one.
  int64_t first_output(int64_t block) const { return outputs_ * block / blocks(); }
  int64_t multiplications() const { return multiplications_; }
  void run(int64_t block, const GeneratedWork& work) const;

 private:
  class Writer;
  struct Piece {
    int64_t code, weights;  // bytes and floats from the beginning of the store
  };
  struct Block {
    int64_t first_piece, num_pieces;
  };

  const CodeStore* store_ = nullptr;
  std::vector<Piece> pieces_;
  std::vector<Block> blocks_;
  int64_t outputs_ = 0, multiplications_ = 0;
};

}  // namespace sparse
}  // namespace fastprune
