#include "cpu/sparse_conv/generate.h"

#include <algorithm>

#include "cpu/sparse_conv/encoder.h"

namespace fastprune {
namespace sparse {
namespace {

constexpr int kFirstSum = 4;  // the registers before it: a zero and inputs in turn
constexpr int64_t kVectorBytes = 64, kVectorFloats = 16;
// Multiplications of one piece: its code stays in the first cache while all pixels pass.
constexpr int64_t kPieceLength = 1600;

using Code = void (*)(const float* input, const float* weights, float* output,
                      const float* residual, float* sums);

}  // namespace

// Writes the pieces of one block of outputs after the other.
class GeneratedRows::Writer {
 public:
  Writer(const SparseWeight& weight, const std::function<int32_t(int64_t, int32_t)>& offset,
         int64_t plane, bool has_residual, bool has_relu, GeneratedRows* rows)
      : weight_(weight),
        offset_(offset),
        plane_bytes_(plane * 4),
        has_residual_(has_residual),
        has_relu_(has_relu),
        rows_(rows) {}

  void write_block(int64_t first, int64_t end);
  const std::vector<uint8_t>& code() const { return encoder_.code(); }
  const std::vector<float>& weights() const { return weights_; }

 private:
  void begin_piece();
  int64_t next_weight(float value);
  void begin_sums(int64_t first, int64_t end);
  void end_sums(int64_t first, int64_t end);
  bool multiply_column(int64_t first, int64_t end);

  const SparseWeight& weight_;
  const std::function<int32_t(int64_t, int32_t)>& offset_;
  int64_t plane_bytes_;
  bool has_residual_, has_relu_;
  GeneratedRows* rows_;
  Encoder encoder_;
  std::vector<float> weights_;
  int64_t weights_base_ = 0;         // the weight that rsi points to
  int32_t next_[kGeneratedOutputs];  // non-zero of each output
  int next_input_ = 0;
  int64_t length_ = 0;  // multiplications in the piece
};

void GeneratedRows::Writer::begin_piece() {
  while (weights_.size() % kVectorFloats != 0) weights_.push_back(0);
  weights_base_ = static_cast<int64_t>(weights_.size());
  rows_->pieces_.push_back({encoder_.size(), weights_base_});
  length_ = 0;
}

// A weight's displacement from rsi, which moves on so that displacements stay short.
int64_t GeneratedRows::Writer::next_weight(float value) {
  constexpr int64_t kReach = 127, kStep = 255;
  int64_t distance = static_cast<int64_t>(weights_.size()) - weights_base_;
  if (distance > kReach) {
    encoder_.advance(Base::kRsi, kStep * 4);
    weights_base_ += kStep;
    distance -= kStep;
  }
  weights_.push_back(value);
  return distance * 4;
}

void GeneratedRows::Writer::begin_sums(int64_t first, int64_t end) {
  for (int64_t o = first; o < end; ++o) {
    const int sum = static_cast<int>(kFirstSum + o - first);
    encoder_.broadcast(sum, Base::kRsi, next_weight(weight_.bias[o]));
    if (has_residual_) encoder_.add(sum, Base::kRcx, o * plane_bytes_);
  }
}

void GeneratedRows::Writer::end_sums(int64_t first, int64_t end) {
  if (has_relu_) encoder_.zero(0);
  for (int64_t o = first; o < end; ++o) {
    const int sum = static_cast<int>(kFirstSum + o - first);
    if (has_relu_) encoder_.larger(sum, 0, sum);
    encoder_.store(sum, Base::kRdx, o * plane_bytes_);
  }
}

// The next column that any of the outputs keeps; false if there is none left.
bool GeneratedRows::Writer::multiply_column(int64_t first, int64_t end) {
  int32_t column = INT32_MAX;
  bool found = false;
  for (int64_t o = first; o < end; ++o) {
    const int32_t next = next_[o - first];
    if (next == weight_.starts[o + 1]) continue;
    column = std::min(column, weight_.columns[next]);
    found = true;
  }
  if (!found) return false;
  const int input = 1 + next_input_++ % (kFirstSum - 1);
  encoder_.load(input, Base::kRdi, int64_t{offset_(first, column)} * 4);
  for (int64_t o = first; o < end; ++o) {
    int32_t& next = next_[o - first];
    if (next == weight_.starts[o + 1] || weight_.columns[next] != column) continue;
    encoder_.multiply_add(static_cast<int>(kFirstSum + o - first), input, Base::kRsi,
                          next_weight(weight_.values[next]));
    ++next;
    ++length_;
  }
  return true;
}

void GeneratedRows::Writer::write_block(int64_t first, int64_t end) {
  const int64_t first_piece = static_cast<int64_t>(rows_->pieces_.size());
  for (int64_t o = first; o < end; ++o) next_[o - first] = weight_.starts[o];
  begin_piece();
  begin_sums(first, end);
  while (multiply_column(first, end)) {
    if (length_ < kPieceLength) continue;
    for (int64_t o = 0; o < end - first; ++o) {
      encoder_.store(static_cast<int>(kFirstSum + o), Base::kR8, o * kVectorBytes);
    }
    encoder_.finish();
    begin_piece();
    for (int64_t o = 0; o < end - first; ++o) {
      encoder_.load(static_cast<int>(kFirstSum + o), Base::kR8, o * kVectorBytes);
    }
  }
  end_sums(first, end);
  encoder_.finish();
  rows_->blocks_.push_back(
      {first_piece, static_cast<int64_t>(rows_->pieces_.size()) - first_piece});
}

GeneratedRows::GeneratedRows(const SparseWeight& weight,
                             const std::function<int32_t(int64_t, int32_t)>& offset, int64_t plane,
                             bool has_residual, bool has_relu, CodeStore* store)
    : store_(store) {
  Writer writer(weight, offset, plane, has_residual, has_relu, this);
  outputs_ = weight.outputs;
  multiplications_ = weight.starts[weight.outputs];
  const int64_t count = (outputs_ + kGeneratedOutputs - 1) / kGeneratedOutputs;
  for (int64_t i = 0; i < count; ++i) {
    writer.write_block(outputs_ * i / count, outputs_ * (i + 1) / count);
  }
  const int64_t code = store->add_code(writer.code());
  const int64_t weights = store->add_numbers(writer.weights());
  for (Piece& piece : pieces_) {
    piece.code += code;
    piece.weights += weights;
  }
}

void GeneratedRows::run(int64_t block, const GeneratedWork& work) const {
  alignas(kVectorBytes) float sums[kGeneratedPixels][kGeneratedOutputs * kVectorFloats];
  const float* weights = store_->numbers();
  const int64_t first = blocks_[block].first_piece;
  for (int64_t i = first; i < first + blocks_[block].num_pieces; ++i) {
    const Piece& piece = pieces_[i];
    const Code code =
        reinterpret_cast<Code>(reinterpret_cast<uintptr_t>(store_->code() + piece.code));
    for (int64_t v = 0; v < work.vectors; ++v) {
      const int64_t to = work.output_offsets[v];
      code(work.input + work.input_offsets[v], weights + piece.weights, work.output + to,
           work.residual == nullptr ? nullptr : work.residual + to, sums[v]);
    }
  }
}

}  // namespace sparse
}  // namespace fastprune
